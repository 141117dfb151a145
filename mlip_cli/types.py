"""The tensors that cross borders.

Shape legend, used in every docstring:

    B  images (or captions) in a batch          E  embed_dim of the joint space
    H, W  image height and width in pixels      T  token_dim of the token-level space
    h, w  patch grid                            D  width of a tower
    N = h*w  patches of an image                P  prefix tokens (class, registers)
    K  patch tokens that remain after merging   L  text tokens
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from typing import Protocol, Self

import torch
from torch import Tensor

PartOf = Callable[[str], AbstractContextManager[object]]
"""The name of a part of some work -> a context that is open while that part runs, for a clock."""


class _Movable:
    """A dataclass whose tensors move to a device together."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        return self.with_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with `change` of each tensor."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return type(self)(**{name: change(v) if isinstance(v, Tensor) else v for name, v in values.items()})


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be used, with its place and the reason."""

    shard: str
    key: str
    reason: str


@dataclass(frozen=True)
class Batch(_Movable):
    """One rank's share of a global batch."""

    images: Tensor
    """(B, 3, H, W): uint8 pixels, or normalised floats."""
    token_ids: Tensor
    """(B*C, L) int64: BOS, caption, EOS, zeros; the C captions of a picture follow one another. C is mostly 1."""
    keys: tuple[str, ...]
    """Key of each sample, for messages."""
    bad_samples: tuple[BadSample, ...] = ()
    """Samples of this share that were replaced."""
    labels: Tensor | None = None
    """(B,) int64: samples with the same label show the same concept; None: every sample differs."""
    other_images: Tensor | None = None
    """(B, 3, H, W): another crop of each picture, for a branch that reads one."""
    word_ids: Tensor | None = None
    """(V,) int64: the words of the global batch, for losses over them."""
    text_lengths: tuple[int, ...] | None = None
    """(B*C): tokens of each caption, BOS and EOS included, which the CPU knows; None: padding is computed too."""

    def pin_memory(self) -> Self:
        """The batch in pinned memory, so that copies to a GPU do not wait."""
        return self.with_tensors(lambda tensor: tensor.pin_memory())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are given, by field."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def split(self, size: int) -> list[Self]:
        """Micro-batches of up to `size` samples."""
        captions = len(self.token_ids) // len(self.images)
        starts = range(0, len(self.images), size)
        rows = {"images": 1, "token_ids": captions, "text_lengths": captions, "labels": 1, "other_images": 1}
        given = {name: n for name, n in rows.items() if getattr(self, name) is not None}
        return [
            replace(self, **{name: getattr(self, name)[n * start : n * (start + size)] for name, n in given.items()})
            for start in starts
        ]


@dataclass(frozen=True)
class ImageFeatures:
    """The features of a picture, from both domains."""

    spatial: Tensor
    """(B, E), not normalised, as from `encode_image`."""
    frequency: Tensor | None
    """(B, E), not normalised, or None without a frequency head."""


@dataclass(frozen=True)
class Encoded:
    """Everything that the losses read of a batch with C captions a picture. Features are not normalised."""

    image_features: Tensor
    """(B, E)"""
    text_features: Tensor
    """(B*C, E)"""
    frequency_features: Tensor | None
    """(B, E)"""
    image_tokens: Tensor | None
    """(B, K, T): projected patch tokens after merging."""
    token_sizes: Tensor
    """(B, K): number of patches that each token stands for; at least fp32."""
    frequency_tokens: Tensor | None
    """(B, N, T): projected frequency tokens, one per patch."""
    text_tokens: Tensor | None
    """(B*C, L, T): projected text tokens."""
    text_mask: Tensor
    """(B*C, L) bool: words, without BOS, EOS, padding and repeated ids."""
    scales: dict[str, Tensor]
    """Loss -> logit scale (1,), exponentiated."""
    biases: dict[str, Tensor]
    """Sigmoid loss -> logit bias (1,)."""
    caption_mask: Tensor
    """(B*C, L) bool: every word and EOS, without BOS and padding."""
    assign: tuple[Tensor, ...] = ()
    """One tensor (B, N) per merge: the group of every original patch."""
    word_features: Mapping[str, Tensor] = field(default_factory=dict)
    """Loss over words -> (B, W): the mean of the domain's tokens, projected to the width W of the text tower."""
    vocabulary: Tensor | None = None
    """(V, W): embeddings of the words of the global batch."""


@dataclass(frozen=True)
class MergeStage(_Movable):
    """One merge as the original patches see it: their groups, and the guidance of the merge."""

    block: int
    """The block before which the tokens merged, counted from 1."""
    groups: Tensor
    """(B, N) int64: the group of each patch after this merge, groups numbered by their smallest patch."""
    spatial: Tensor | None
    """(B, N) in [0, 1]: rank of the patch's token before this merge, by the attention to one of its patches. None
    without guidance."""
    frequency: Tensor | None
    """(B, N) in [0, 1]: the same in the frequency domain, as the mean over the token's patches."""
    mixed: Tensor | None
    """(B, N) in [0, 1]: the guidance that the cost of a merge used."""


class Encoder(Protocol):
    """What evaluation needs of a model. Images are uint8 pixels or normalised floats."""

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, E)"""

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """(B, L) -> (B, E)"""

    def image_features(self, images: Tensor) -> ImageFeatures:
        """(B, 3, H, W) -> spatial and frequency features"""
