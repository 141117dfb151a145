"""The tensors that cross borders.

Shape legend, used in every docstring:

    B  images (or captions) in a batch          E  embed_dim of the joint space
    H, W  image height and width in pixels      T  token_dim of the token-level space
    h, w  patch grid                            D  width of a tower
    N = h*w  patches of an image                P  prefix tokens (class, registers)
    K  patch tokens that remain after merging   L  text tokens
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

VOCAB_SIZE = 49408
"""Ids of CLIP's byte-pair vocabulary; the last two are BOS and EOS."""

PartOf = Callable[[str], AbstractContextManager[object]]
"""The name of a part of some work -> a context that is open while that part runs, for a clock."""


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


class Encoder(Protocol):
    """What evaluation needs of a model: uint8 or normalised images and token ids to features."""

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, E)"""

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """(B, L) -> (B, E)"""

    def image_features(self, images: Tensor) -> ImageFeatures:
        """(B, 3, H, W) -> spatial and frequency features"""
