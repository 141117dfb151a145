"""Captions packed by length, so that the text tower computes little padding.

Captions of similar length form a group, padded to one width. The tokens of all groups lie one after the other, (T, D):
embeddings, norms and linear layers see one matrix of T tokens, and only attention goes group by group. Attention is
causal and a caption ends at EOS, so what is left out changes nothing. A block runs once for all groups: ranks with
different groups gather its sharded weights equally often.

The groups follow from lengths that the CPU knows, the order of the rows from token ids on the device, so that the CPU
never waits for the device.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor

WIDTHS = (8, 16, 24, 32, 48)
"""Widths of groups, in tokens; the widest group is as wide as the batch."""
PARTS = 16
"""Rows come into a group by sixteenths of all rows, so that few shapes occur, whatever the batch size."""


class Group(NamedTuple):
    """So many captions, padded to `width` tokens."""

    rows: int
    width: int


def text_groups(lengths: Sequence[int], width: int) -> tuple[Group, ...]:
    """Groups of captions sorted by length, shortest first: every caption is in one, and none is cut.

    What does not fill a sixteenth goes into the next wider group.

    Args:
        lengths: tokens of each caption, at most `width`.
        width: of the batch.
    """
    ordered = sorted(lengths)
    step, start, groups = max(1, len(ordered) // PARTS), 0, []
    for own in (*(narrow for narrow in WIDTHS if narrow < width), width):
        end = bisect_right(ordered, own)
        rows = end - start if end == len(ordered) else (end - start) // step * step
        if rows:
            groups.append(Group(rows, own))
            start += rows
    assert start == len(ordered), f"a caption of {ordered[-1]} tokens in a batch {width} wide"
    return tuple(groups)


@dataclass(frozen=True)
class Packing:
    """Where the tokens of R captions lie among T packed tokens."""

    groups: tuple[Group, ...]
    order: Tensor
    """(R,) int64: rows of the batch from the shortest caption to the longest, as the groups take them."""
    place: Tensor
    """(R,) int64: the place of each row in `order`."""
    width: int
    """Of the batch."""

    @classmethod
    def of(cls, groups: tuple[Group, ...], ends: Tensor, *, width: int) -> "Packing":
        """For captions whose last tokens are at `ends` (R,), and which are no longer than the groups suppose."""
        order = ends.argsort(stable=True)
        return cls(groups, order, order.argsort(), width)

    def pack(self, token_ids: Tensor) -> Tensor:
        """(R, L) -> (T,)"""
        parts = token_ids[self.order].split([rows for rows, _ in self.groups])
        return torch.cat([part[:, :width].flatten() for part, (_, width) in zip(parts, self.groups, strict=True)])

    def positions(self, embedding: Tensor) -> Tensor:
        """The embedding of each token's position: (L, D) -> (T, D)."""
        return torch.cat([embedding[:width].expand(rows, -1, -1).flatten(0, 1) for rows, width in self.groups])

    def padded(self, tokens: Tensor) -> Tensor:
        """The tokens of each row of the batch, and zeros where its group is narrower: (T, D) -> (R, L, D)."""
        parts = tokens.split([rows * width for rows, width in self.groups])
        wide = [
            F.pad(part.unflatten(0, group), (0, 0, 0, self.width - group.width))
            for part, group in zip(parts, self.groups, strict=True)
        ]
        return torch.cat(wide).index_select(0, self.place)

    def starts(self) -> Tensor:
        """The place of each row's first token among the packed ones: (R,)."""
        found, start = [], 0
        for rows, width in self.groups:
            found.append(start + width * torch.arange(rows, device=self.order.device))
            start += rows * width
        return torch.cat(found)[self.place]


class TextBlock(Block):
    """timm's block, which also takes packed captions."""

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        groups: tuple[Group, ...] | None = None,
    ) -> Tensor:
        """(B, L, D) -> (B, L, D), or with `groups`, which are always causal, (T, D) -> (T, D)."""
        if groups is None:
            return super().forward(x, attn_mask, is_causal)
        x = x + attend_in_groups(self.attn, self.norm1(x), groups)
        return x + self.mlp(self.norm2(x))


def attend_in_groups(attention: Attention, x: Tensor, groups: tuple[Group, ...]) -> Tensor:
    """Causal self-attention inside each caption of packed ones: (T, D) -> (T, D)."""
    heads = 3, attention.num_heads, attention.head_dim
    attended = []
    for part, group in zip(attention.qkv(x).split([rows * width for rows, width in groups]), groups, strict=True):
        q, k, v = part.view(*group, *heads).permute(2, 0, 3, 1, 4)
        attended.append(_causal(q, k, v, fused=attention.fused_attn).transpose(1, 2).reshape(-1, attention.attn_dim))
    return attention.proj_drop(attention.proj(torch.cat(attended)))


def _causal(q: Tensor, k: Tensor, v: Tensor, *, fused: bool) -> Tensor:
    """3 x (B, heads, L, d) -> (B, heads, L, d)"""
    if fused:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    logits = q * q.shape[-1] ** -0.5 @ k.mT
    ahead = logits.new_full(logits.shape[-2:], -torch.inf).triu(1)
    return (logits + ahead).softmax(-1) @ v
