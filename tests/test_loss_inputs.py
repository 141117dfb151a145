"""Odd but finite inputs give finite losses and gradients; what is not finite is never hidden. In fp32, as trained."""

from dataclasses import fields, replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from mlip_cli.losses.features import features_of
from mlip_cli.losses.objective import Objective
from mlip_cli.losses.token_alignment import sparc_sum
from mlip_cli.losses.words import count_captions
from mlip_cli.recipe.config import LOSS_NAMES, GlobalLoss, Losses, TokenLoss, WordsLoss
from mlip_cli.types import Encoded

KINDS: tuple[Literal["sparc", "filip", "pooled"], ...] = ("sparc", "filip", "pooled")
LOSSES = {
    "infonce": Losses(spatial_global=GlobalLoss(), frequency_global=GlobalLoss(label_smoothing=0.1)),
    "sigmoid": Losses(spatial_global=GlobalLoss(kind="sigmoid"), frequency_global=GlobalLoss(kind="sigmoid")),
    "align": Losses(align=GlobalLoss()),
    "words": Losses(spatial_global=None, spatial_words=WordsLoss(), frequency_words=WordsLoss()),
    **{kind: Losses(spatial_token=TokenLoss(kind=kind), frequency_token=TokenLoss(kind=kind)) for kind in KINDS},
}

TOKEN_IDS = torch.arange(28).reshape(4, 7) % 19
"""Some words are in several captions, none twice in one. The vocabulary of `encoded` is that of all ids."""


def encoded(n: int = 4) -> Encoded:
    draws = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws).requires_grad_()

    words = torch.arange(7) < torch.tensor([6, 3, 5, 2] * n)[:n, None]
    return Encoded(
        image_features=leaf(n, 8),
        text_features=leaf(n, 8),
        frequency_features=leaf(n, 8),
        image_tokens=leaf(n, 5, 6),
        token_sizes=torch.randint(1, 4, (n, 5), generator=draws).float(),
        frequency_tokens=leaf(n, 9, 6),
        text_tokens=leaf(n, 7, 6),
        text_mask=words & (torch.arange(7) > 0),
        scales={name: torch.tensor([100.0], requires_grad=True) for name in LOSS_NAMES},
        biases={name: torch.tensor([-10.0], requires_grad=True) for name in LOSS_NAMES},
        caption_mask=words,
        word_features={name: leaf(n, 6) for name in ("spatial_words", "frequency_words")},
        vocabulary=leaf(int(TOKEN_IDS.max()) + 1, 6),
    )


def terms_of(losses: Losses, given: Encoded) -> dict[str, Tensor]:
    token_ids = TOKEN_IDS[: len(given.text_mask)]
    counts = count_captions(token_ids, given.text_mask)
    assert given.vocabulary is not None
    given = replace(given, vocabulary=given.vocabulary[counts.word_ids])
    objective = Objective(losses)
    terms = objective.batch_terms(features_of(given, token_losses=objective.batch_token_losses))
    return terms | objective.sample_terms(given, token_ids, counts)


def assert_finite(terms: dict[str, Tensor], given: Encoded) -> None:
    leaves = [x for x in (getattr(given, f.name) for f in fields(given)) if isinstance(x, Tensor) and x.requires_grad]
    leaves += [*given.scales.values(), *given.biases.values(), *given.word_features.values()]
    grads = torch.autograd.grad(torch.stack(list(terms.values())).sum(), leaves, allow_unused=True)
    assert len(terms) >= 2
    assert all(term.isfinite() for term in terms.values())
    assert all(grad.isfinite().all() for grad in grads if grad is not None)
    assert any(grad is not None for grad in grads)


def filled(given: Encoded, value: float) -> Encoded:
    """Every feature and token `value`."""
    tensors = (
        "image_features",
        "text_features",
        "frequency_features",
        "image_tokens",
        "frequency_tokens",
        "text_tokens",
        "vocabulary",
    )
    means = {name: torch.full_like(mean, value).requires_grad_() for name, mean in given.word_features.items()}
    alike = {name: torch.full_like(getattr(given, name), value).requires_grad_() for name in tensors}
    return replace(given, word_features=means, **alike)


@pytest.mark.parametrize("kind", LOSSES)
def test_captions_without_words_are_defined(kind: str) -> None:
    """One of four, then all of them, also without EOS."""
    given = encoded()
    for rows in (slice(1, 2), slice(None)):
        text_mask, caption_mask = given.text_mask.clone(), given.caption_mask.clone()
        text_mask[rows] = caption_mask[rows] = False
        assert_finite(
            terms_of(LOSSES[kind], one := replace(given, text_mask=text_mask, caption_mask=caption_mask)), one
        )


@pytest.mark.parametrize("kind", LOSSES)
def test_a_batch_of_one_is_defined_and_has_nothing_to_contrast_with(kind: str) -> None:
    given = encoded(1)
    terms = terms_of(LOSSES[kind], given)
    assert_finite(terms, given)
    if kind in ("infonce", "align", "filip", "pooled"):
        assert all(term.item() == 0 for term in terms.values())


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-30, 1e30])
@pytest.mark.parametrize("kind", LOSSES)
def test_vectors_of_zeros_all_alike_tiny_or_huge_are_defined(kind: str, value: float) -> None:
    given = filled(encoded(), value)
    assert_finite(terms_of(LOSSES[kind], given), given)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["image", "text"])
def test_one_value_that_is_not_finite_is_seen_in_every_term_that_reads_it(kind: str, value: float, side: str) -> None:
    """The guard of the training loop skips such a step, which it can only where the loss does not hide the value."""
    given = encoded()
    names = {
        "image": ("image_features", "frequency_features", "image_tokens", "frequency_tokens"),
        "text": ("text_features", "text_tokens", "vocabulary"),
    }[side]

    def spoil(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().clone()
        tensor[(1, 2, 0)[: tensor.ndim]] = value  # of the second caption, the last word
        return tensor.requires_grad_()

    spoiled = {name: spoil(getattr(given, name)) for name in names}
    if side == "image":
        spoiled["word_features"] = {name: spoil(mean) for name, mean in given.word_features.items()}
    read = terms_of(LOSSES[kind], replace(given, **spoiled))
    assert not any(term.isfinite() for name, term in read.items() if side == "image" or name != "align")


def test_a_padded_word_that_is_not_finite_is_not_read() -> None:
    given = encoded()
    assert given.text_tokens is not None
    tokens = torch.where(given.caption_mask[..., None], given.text_tokens, torch.nan).detach().requires_grad_()
    spoiled = replace(given, text_tokens=tokens)
    for name, value in terms_of(LOSSES["filip"], given).items():
        assert torch.equal(terms_of(LOSSES["filip"], spoiled)[name], value)


def sparc_number_by_number(patches: Tensor, sizes: Tensor, words: Tensor, mask: Tensor, scale: float) -> float:
    """Our reading of the formula in plain numbers, with sizes as weights and no tensor operation over a batch."""
    total = 0.0
    for v, s, t, m in zip(patches.tolist(), sizes.tolist(), words.tolist(), mask.tolist(), strict=True):
        v, t = [unit(x) for x in v], [unit(x) for x, is_word in zip(t, m, strict=True) if is_word]
        if len(t) < 2:
            continue
        groups = [group(v, s, word) for word in t]
        logits = [[scale * dot(c, word) for word in t] for c in groups]
        columns = [list(column) for column in zip(*logits, strict=True)]
        total += sum((log_sum_exp(z[k]) - z[k][k]) / 2 / len(t) for z in (logits, columns) for k in range(len(t)))
    return total


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def unit(a: list[float]) -> list[float]:
    return [x / dot(a, a) ** 0.5 for x in a]


def log_sum_exp(values: list[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).logsumexp(0).item()


def group(patches: list[list[float]], sizes: list[float], word: list[float]) -> list[float]:
    similarity = [dot(word, patch) for patch in patches]
    low, high = min(similarity), max(similarity)
    if high - low < 1e-6:
        weights = list(sizes)
    else:
        stretched = [(x - low) / (high - low) for x in similarity]
        weights = [0.0 if x < 1 / sum(sizes) else x * size for x, size in zip(stretched, sizes, strict=True)]
    whole = sum(weights)
    return unit([
        sum(w / whole * patch[d] for w, patch in zip(weights, patches, strict=True)) for d in range(len(word))
    ])  # fmt: skip


def test_sparc_number_by_number() -> None:
    """Sizes, repeated words as holes in the mask, captions of one word or none, a flat picture, huge padded rows."""
    draws = torch.Generator().manual_seed(2)
    patches = torch.randn(6, 5, 4, generator=draws, dtype=torch.float64)
    patches[2] = patches[2, :1]
    patches[3, 1:4] = patches[3, :1]
    sizes = torch.randint(1, 9, (6, 5), generator=draws).double()
    sizes[5] = 1  # one similarity in five or so is below the threshold
    words = torch.randn(6, 7, 4, generator=draws, dtype=torch.float64)
    mask = torch.tensor(
        [[0, 1, 1, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 0, 1, 1], [0] * 7, [1] * 7]
    ).bool()
    words = torch.where(mask[..., None], words, 1e30)
    found = sparc_sum(patches, sizes, words, mask, torch.tensor([14.0], dtype=torch.float64))
    assert found.item() == pytest.approx(sparc_number_by_number(patches, sizes, words, mask, 14.0), rel=1e-12)
