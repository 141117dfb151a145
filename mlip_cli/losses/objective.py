"""The weighted sum of named losses: some compare all pairs of the global batch, others the tokens inside a pair."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from mlip_cli.distributed import gather, rank, world_size
from mlip_cli.losses.contrastive import cross_entropy, info_nce, sigmoid_loss
from mlip_cli.losses.features import CAPTION_MASK, FREQUENCY, IMAGE, TEXT, TEXT_TOKENS, Features, image_tokens
from mlip_cli.losses.filip import filip_scores, filip_words
from mlip_cli.losses.token_alignment import is_valid, sparc_sum
from mlip_cli.recipe.config import LOSS_NAMES, GlobalLoss, Losses, TokenLoss
from mlip_cli.types import Encoded, PartOf

IMAGE_SIDE = {"spatial_global": IMAGE, "frequency_global": FREQUENCY}
"""Global loss -> the image feature that it compares with the text feature."""


def is_over_batch(term: GlobalLoss | TokenLoss) -> bool:
    """True for a loss between all pairs of the global batch, False for one inside each pair."""
    return isinstance(term, GlobalLoss) or term.kind == "filip"


class Objective:
    """Named losses and their weights; the mean over ranks of `total` is the loss of the global batch.

    Logits are at least fp32, whatever precision the towers computed in. `part` opens a context by the name of each loss
    while that loss is computed.
    """

    def __init__(self, losses: Losses) -> None:
        self.terms: dict[str, GlobalLoss | TokenLoss] = {
            name: term for name in LOSS_NAMES if (term := getattr(losses, name)) is not None
        }
        self.batch_token_losses = tuple(
            name for name, term in self.terms.items() if isinstance(term, TokenLoss) and is_over_batch(term)
        )
        self.shares_concepts = losses.positives == "concept"

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
        read = [*(IMAGE_SIDE[name] for name in on), TEXT]
        local = [F.normalize(features.tensors[name].to(dtype), dim=-1) for name in read]
        everyone = gather(torch.cat(local, dim=1)).split([x.shape[1] for x in local], dim=1)
        texts, all_texts = local[-1], everyone[-1]
        offset = rank() * len(texts)
        terms = {}
        for (name, term), images, all_images in zip(on.items(), local, everyone, strict=False):
            scale = features.tensors[f"scale.{name}"]
            with part(name):
                if term.kind == "sigmoid":
                    bias = features.tensors[f"bias.{name}"]
                    terms[name] = sigmoid_loss(images, all_texts, scale, bias, offset=offset, labels=labels)
                else:
                    terms[name] = info_nce(
                        images,
                        texts,
                        all_images,
                        all_texts,
                        scale,
                        offset=offset,
                        label_smoothing=term.label_smoothing,
                        labels=labels,
                    )
        return terms

    def _token_terms(self, features: Features, labels: Tensor | None, part: PartOf) -> dict[str, Tensor]:
        """Ranks gather the tokens of texts and the scores of images, never the tokens of images."""
        if not self.batch_token_losses:
            return {}
        read = features.tensors
        words, word_weights = (gather(x) for x in filip_words(read[TEXT_TOKENS], read[CAPTION_MASK]))
        offset = rank() * len(read[TEXT_TOKENS])
        terms = {}
        for name in self.batch_token_losses:
            with part(name):
                tokens, sizes = read[f"tokens.{name}"], read[f"sizes.{name}"]
                image_scores, text_scores = filip_scores(tokens, sizes, words, word_weights)
                own = slice(offset, offset + len(image_scores))
                sides = (image_scores, gather(text_scores)[:, own].T)
                image_to_text, text_to_image = (
                    cross_entropy(read[f"scale.{name}"] * scores, offset=offset, labels=labels) for scores in sides
                )
                terms[name] = (image_to_text + text_to_image) / 2
        return terms

    def sample_terms(self, encoded: Encoded, num_captions: Tensor, part: PartOf = nullcontext) -> dict[str, Tensor]:
        """Losses inside pairs: one 0-d tensor each, not weighted.

        `num_captions` is the sum of `count_captions` over the global batch.
        """
        terms = {}
        with torch.autocast(encoded.image_features.device.type, enabled=False):
            for name, term in self.terms.items():
                if is_over_batch(term):
                    continue
                with part(name):
                    tokens, sizes = image_tokens(encoded, name)
                    assert encoded.text_tokens is not None
                    loss_sum = sparc_sum(tokens, sizes, encoded.text_tokens, encoded.text_mask, encoded.scales[name])
                    terms[name] = loss_sum * world_size() / num_captions.clamp(min=1)
        return terms

    def count_captions(self, text_mask: Tensor) -> Tensor:
        """Number of captions of this share that losses inside pairs can use: (B, L) bool -> 0-d."""
        return is_valid(text_mask).sum()

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """Weighted sum of `terms`: 0-d."""
        return torch.stack([self.terms[name].weight * value for name, value in terms.items()]).sum()
