"""What the losses read of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mlip_cli.types import Encoded, PartOf


@dataclass(frozen=True)
class Features:
    """The part of `Encoded` that losses over the whole batch read; micro-batches are cached in this form."""

    image: Tensor
    """(B, E)"""
    text: Tensor
    """(B, E)"""
    frequency: Tensor | None
    """(B, E)"""
    scales: dict[str, Tensor]
    """Logit scale (1,) of each loss by its name."""
    biases: dict[str, Tensor]
    """Logit bias (1,) of each sigmoid loss by its name."""
    labels: Tensor | None = None
    """(B,): that of `Batch`."""
    tokens: "TokenFeatures | None" = None
    """None where no token loss goes over the whole batch."""


@dataclass(frozen=True)
class TokenFeatures:
    """What token losses over the whole batch read."""

    images: dict[str, Tensor]
    """(B, K, T) by the name of the loss."""
    sizes: dict[str, Tensor]
    """(B, K) by the name of the loss."""
    text: Tensor
    """(B, L, T)"""
    caption_mask: Tensor
    """(B, L) bool"""


def image_tokens(encoded: Encoded, loss: str) -> tuple[Tensor, Tensor]:
    """Image tokens that a token loss reads, and how many patches each stands for: (B, K, T), (B, K)."""
    if loss == "spatial_token":
        tokens, sizes = encoded.image_tokens, encoded.token_sizes
        assert tokens is not None
        return tokens, sizes
    tokens = encoded.frequency_tokens
    assert tokens is not None
    return tokens, torch.ones_like(tokens[..., 0])


def features_of(encoded: Encoded, *, token_losses: Sequence[str] = (), labels: Tensor | None = None) -> Features:
    """What batch-level losses need of `encoded`.

    Args:
        token_losses: names of the token losses among them.
        labels: those of the batch.
    """
    tokens = None
    if token_losses:
        assert encoded.text_tokens is not None
        images = {name: image_tokens(encoded, name) for name in token_losses}
        tokens = TokenFeatures(
            {name: patches for name, (patches, _) in images.items()},
            {name: sizes for name, (_, sizes) in images.items()},
            encoded.text_tokens,
            encoded.caption_mask,
        )
    return Features(
        encoded.image_features,
        encoded.text_features,
        encoded.frequency_features,
        encoded.scales,
        encoded.biases,
        labels,
        tokens,
    )


class ObjectiveLike(Protocol):
    """What training needs of an objective; terms are 0-d tensors by loss name, not weighted."""

    batch_token_losses: tuple[str, ...]
    """Names of the token losses between all pairs of the global batch."""

    def batch_terms(self, features: Features, part: PartOf = ...) -> dict[str, Tensor]:
        """Losses between all pairs of the global batch."""

    def sample_terms(self, encoded: Encoded, num_captions: Tensor, part: PartOf = ...) -> dict[str, Tensor]:
        """Losses inside pairs; `num_captions` counts the usable captions of the global batch."""

    def count_captions(self, text_mask: Tensor) -> Tensor:
        """Usable captions of this share: (B, L) -> 0-d."""

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """Weighted sum."""
