"""The tensors that cross borders.

Shape legend, used in every docstring:

    B  images (or captions) in a batch          E  embed_dim of the joint space
    H, W  image height and width in pixels      T  token_dim of the token-level space
    h, w  patch grid                            D  width of a tower
    N = h*w  patches of an image                P  prefix tokens (class, registers)
    K  patch tokens that remain after merging   L  text tokens
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

VOCAB_SIZE = 49408
"""Ids of CLIP's byte-pair vocabulary; the last two are BOS and EOS."""


class _Movable:
    """Dataclasses of tensors that move together."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        moved: dict[str, Any] = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            moved[field.name] = value.to(device, non_blocking=non_blocking) if isinstance(value, Tensor) else value
        return type(self)(**moved)


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be used, and where it lies."""

    shard: str
    key: str
    reason: str


@dataclass(frozen=True)
class Batch(_Movable):
    """One rank's share of a global batch."""

    images: Tensor
    """(B, 3, H, W): uint8 pixels, or floats that are normalised already."""
    token_ids: Tensor
    """(B, L) int64: BOS, caption, EOS, zeros."""
    keys: tuple[str, ...]
    """Key of each sample, for messages."""
    bad_samples: tuple[BadSample, ...] = ()
    """Samples of this share that were replaced."""
    labels: Tensor | None = None
    """(B,) int64: samples of equal label show the same concept; None: each stands for itself."""

    def pin_memory(self) -> "Batch":
        """The same in pinned memory, from which copies to a GPU do not wait; torch's DataLoader calls it too."""
        labels = None if self.labels is None else self.labels.pin_memory()
        return replace(self, images=self.images.pin_memory(), token_ids=self.token_ids.pin_memory(), labels=labels)


@dataclass(frozen=True)
class ImageFeatures:
    """What the image side gives at the end of the tower."""

    spatial: Tensor
    """(B, E), not normalised: what `encode_image` returns."""
    frequency: Tensor | None
    """(B, E), not normalised, or None without a frequency branch."""


@dataclass(frozen=True)
class Encoded:
    """All that the losses need of a batch; features are not normalised."""

    image_features: Tensor
    """(B, E)"""
    text_features: Tensor
    """(B, E)"""
    frequency_features: Tensor | None
    """(B, E)"""
    image_tokens: Tensor | None
    """(B, K, T): projected patch tokens after merging."""
    token_sizes: Tensor
    """(B, K): how many patches each token stands for; at least fp32."""
    frequency_tokens: Tensor | None
    """(B, N, T): projected tokens of the frequency branch, one a patch."""
    text_tokens: Tensor | None
    """(B, L, T): projected text tokens."""
    text_mask: Tensor
    """(B, L) bool: real words, without BOS, EOS, padding and repeated ids."""
    scales: dict[str, Tensor]
    """Logit scale (1,) of each loss by its name, exponentiated."""
    biases: dict[str, Tensor]
    """Logit bias (1,) of each sigmoid loss by its name."""
    caption_mask: Tensor
    """(B, L) bool: every word and EOS, without BOS and padding."""
    assign: tuple[Tensor, ...] = ()
    """Of each merge, the group (B, N) that every original patch is in."""


@dataclass(frozen=True)
class MergeStage(_Movable):
    """What one merge did to the original patches, and the guidance that it followed."""

    block: int
    """The block before which the tokens merged, counted from 1."""
    groups: Tensor
    """(B, N) int64: the group of each patch after this merge, groups numbered by their smallest patch."""
    spatial: Tensor | None
    """(B, N) in [0, 1]: rank of the token that the patch was in before this merge, by the attention that the token gets
    as a whole, so that one of several patches ranks higher; None without guidance."""
    frequency: Tensor | None
    """(B, N) in [0, 1]: the same of the frequency domain, a mean over the token's patches."""
    mixed: Tensor | None
    """(B, N) in [0, 1]: what the matching received."""


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

    def batch_terms(self, features: Features) -> dict[str, Tensor]:
        """Losses between all pairs of the global batch."""

    def sample_terms(self, encoded: Encoded, num_captions: Tensor) -> dict[str, Tensor]:
        """Losses inside pairs; `num_captions` counts the usable captions of the global batch."""

    def count_captions(self, text_mask: Tensor) -> Tensor:
        """Usable captions of this share: (B, L) -> 0-d."""

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """Weighted sum."""


class Encoder(Protocol):
    """What evaluation needs of a model: uint8 or normalised images and token ids to features."""

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, E)"""

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """(B, L) -> (B, E)"""

    def image_features(self, images: Tensor) -> ImageFeatures:
        """(B, 3, H, W) -> spatial and frequency features"""
