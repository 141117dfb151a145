"""The weighted sum of named losses: some compare all pairs of the global batch, others the tokens inside a pair."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mlip_cli.distributed import gather, rank, world_size
from mlip_cli.losses.contrastive import cross_entropy, info_nce, sigmoid_loss
from mlip_cli.losses.features import CAPTION_MASK, FREQUENCY, IMAGE, TEXT, TEXT_TOKENS, Features, image_tokens
from mlip_cli.losses.filip import filip_scores, filip_words
from mlip_cli.losses.pooled import caption_queries, pooled_scores
from mlip_cli.losses.token_alignment import sparc_sum
from mlip_cli.losses.words import CaptionCounts, words_sum
from mlip_cli.recipe.config import LOSS_NAMES, GlobalLoss, Losses, TokenLoss, WordsLoss
from mlip_cli.types import Encoded, PartOf

SIDES = {"spatial_global": (IMAGE, TEXT), "frequency_global": (FREQUENCY, TEXT), "align": (IMAGE, FREQUENCY)}
"""Global loss -> the two features of a pair that it compares."""

Term = GlobalLoss | WordsLoss | TokenLoss


def is_over_batch(term: Term) -> bool:
    """True for a loss between all pairs of the global batch, False for one inside each pair."""
    return isinstance(term, GlobalLoss) or (isinstance(term, TokenLoss) and term.kind != "sparc")


class Objective:
    """Named losses and their weights; the mean over ranks of `total` is the loss of the global batch.

    Of several captions a picture, a loss is the mean over them. Logits are at least fp32, whatever precision the towers
    computed in. `part` opens a context by the name of each loss while that loss is computed.
    """

    def __init__(self, losses: Losses) -> None:
        self.terms: dict[str, Term] = {name: term for name in LOSS_NAMES if (term := getattr(losses, name)) is not None}
        self.batch_token_losses = {
            name: term.kind for name, term in self.terms.items() if isinstance(term, TokenLoss) and is_over_batch(term)
        }
        """Token loss over the batch -> its kind."""
        self.counts_captions = not all(is_over_batch(term) for term in self.terms.values())
        """True if there are losses inside pairs, which need `count_captions`."""
        self.reads_words = any(isinstance(term, WordsLoss) for term in self.terms.values())
        self.shares_concepts = losses.read_labels

    def batch_terms(self, features: Features, part: PartOf = nullcontext) -> dict[str, Tensor]:
        """Losses between all pairs of the global batch: one 0-d tensor each, not weighted."""
        if not any(is_over_batch(term) for term in self.terms.values()):
            return {}
        assert (features.labels is not None) is self.shares_concepts, "losses.positives: a batch without its labels"
        labels = None if features.labels is None else gather(features.labels)
        with torch.autocast(features.tensors[IMAGE].device.type, enabled=False):
            return self._global_terms(features, labels, part) | self._token_terms(features, labels, part)

    def _global_terms(self, features: Features, labels: Tensor | None, part: PartOf) -> dict[str, Tensor]:
        on = {name: term for name, term in self.terms.items() if isinstance(term, GlobalLoss)}
        if not on:
            return {}
        dtype = torch.promote_types(features.tensors[IMAGE].dtype, torch.float32)
        read = list(dict.fromkeys(feature for name in on for feature in SIDES[name]))
        local = [F.normalize(features.tensors[name].to(dtype), dim=-1) for name in read]
        everyone = gather(torch.cat([x.flatten(1) for x in local], dim=1)).split([x[0].numel() for x in local], dim=1)
        own = dict(zip(read, map(_captions_apart, local), strict=True))
        all_ranks = {
            name: _captions_apart(x.unflatten(1, mine.shape[1:]))
            for name, x, mine in zip(read, everyone, local, strict=True)
        }
        offset = rank() * len(local[0])
        terms = {}
        for name, term in on.items():
            left, right = SIDES[name]
            loss = _global_loss(name, term, features, offset=offset, labels=labels)
            with part(name):
                terms[name] = _mean(
                    loss(own[left][0], mine, all_ranks[left][0], others)
                    for mine, others in zip(own[right], all_ranks[right], strict=True)
                )
        return terms

    def _token_terms(self, features: Features, labels: Tensor | None, part: PartOf) -> dict[str, Tensor]:
        """Token losses over the batch, mean over the captions of a picture."""
        read = features.tensors
        terms = {}
        for name in self.batch_token_losses:
            captions = zip(read[TEXT_TOKENS].unbind(1), read[CAPTION_MASK].unbind(1), strict=True)
            with part(name):
                terms[name] = _mean(
                    self._token_term(name, features, text_tokens, mask, labels) for text_tokens, mask in captions
                )
        return terms

    def _token_term(
        self, name: str, features: Features, text_tokens: Tensor, caption_mask: Tensor, labels: Tensor | None
    ) -> Tensor:
        """One token loss for one caption (B, L, T) a picture: 0-d.

        Ranks gather the tokens of texts and the scores of images, never the tokens of images.
        """
        read = features.tensors
        tokens, sizes, scale = read[f"tokens.{name}"], read[f"sizes.{name}"], read[f"scale.{name}"]
        if self.batch_token_losses[name] == "filip":
            image_scores, text_scores = filip_scores(
                tokens, sizes, *map(gather, filip_words(text_tokens, caption_mask))
            )
        else:
            image_scores = text_scores = pooled_scores(
                tokens, sizes, gather(caption_queries(text_tokens, caption_mask)), scale
            )
        offset = rank() * len(tokens)
        sides = image_scores, gather(text_scores)[:, offset : offset + len(tokens)].T
        return _mean(cross_entropy(scale * scores, offset=offset, labels=labels) for scores in sides)

    def sample_terms(
        self, encoded: Encoded, token_ids: Tensor, counts: CaptionCounts | None, part: PartOf = nullcontext
    ) -> dict[str, Tensor]:
        """Losses inside pairs: one 0-d tensor each, not weighted.

        Args:
            token_ids: (B*C, L), those that `encoded` comes from.
            counts: of the global batch; None if `counts_captions` is False.
        """
        terms: dict[str, Tensor] = {}
        with torch.autocast(encoded.image_features.device.type, enabled=False):
            for name, term in self.terms.items():
                if is_over_batch(term):
                    continue
                assert counts is not None
                with part(name):
                    if isinstance(term, WordsLoss):
                        loss_sum, number = self._words_sum(name, encoded, token_ids, counts), counts.with_words
                    else:
                        loss_sum, number = self._sparc_sum(name, encoded), counts.valid
                    terms[name] = loss_sum * world_size() / number.clamp(min=1)
        return terms

    def _words_sum(self, name: str, encoded: Encoded, token_ids: Tensor, counts: CaptionCounts) -> Tensor:
        assert encoded.vocabulary is not None
        features, scale = encoded.word_features[name], encoded.scales[name]
        return words_sum(features, encoded.vocabulary, token_ids, encoded.text_mask, scale, counts)

    def _sparc_sum(self, name: str, encoded: Encoded) -> Tensor:
        tokens, sizes = image_tokens(encoded, name)
        assert encoded.text_tokens is not None
        captions = len(encoded.text_tokens) // len(tokens)
        tokens, sizes = (x.repeat_interleave(captions, 0) if captions > 1 else x for x in (tokens, sizes))
        return sparc_sum(tokens, sizes, encoded.text_tokens, encoded.text_mask, encoded.scales[name])

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """Weighted sum of `terms`: 0-d."""
        return torch.stack([self.terms[name].weight * value for name, value in terms.items()]).sum()


def _global_loss(
    name: str, term: GlobalLoss, features: Features, *, offset: int, labels: Tensor | None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """A global loss as a function of both sides of this rank (B, E), and then of both sides of all ranks (W*B, E)."""
    scale = features.tensors[f"scale.{name}"]
    if term.kind == "infonce":
        smoothing = term.label_smoothing
        return partial(info_nce, scale=scale, offset=offset, label_smoothing=smoothing, labels=labels)
    bias = features.tensors[f"bias.{name}"]
    return lambda left, _right, _all_left, all_right: sigmoid_loss(
        left, all_right, scale, bias, offset=offset, labels=labels
    )


def _captions_apart(features: Tensor) -> tuple[Tensor, ...]:
    """(B, E) -> itself; (B, C, E) -> one (B, E) for each caption of a picture."""
    return features.unbind(1) if features.ndim == 3 else (features,)


def _mean(values: Iterable[Tensor]) -> Tensor:
    terms = list(values)
    return torch.stack(terms).mean() if len(terms) > 1 else terms[0]
