"""The text tower: token embedding, timm blocks, pooling ("CLIP", Radford et al., ICML 2021).

CLIP's is causal and pools at EOS. SigLIP's ("Sigmoid loss for language image pre-training", Zhai et al., ICCV 2023)
attends both ways and pools the last token of the padded caption.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from mlip_cli.model.blocks import ACTIVATIONS, run_block
from mlip_cli.model.packing import Group, Packing, TextBlock, text_groups
from mlip_cli.recipe.config import Text


def end_of_text(token_ids: Tensor, eos_id: int | None = None) -> Tensor:
    """Position of the first `eos_id`, or of the largest id, which is CLIP's EOS: (B, L) -> (B,)."""
    return (token_ids if eos_id is None else (token_ids == eos_id).int()).argmax(-1)


def word_mask(token_ids: Tensor) -> Tensor:
    """True at words, False at BOS, EOS, padding and repeated ids: (B, L) -> (B, L) bool.

    Padding is what stands behind EOS. Id 0 does not mark it, because 0 is a word ("!").
    """
    length = token_ids.shape[1]
    position = torch.arange(length, device=token_ids.device)
    inside = (position > 0) & (position < end_of_text(token_ids)[:, None])
    earlier = position[:, None] > position[None]
    repeated = ((token_ids[:, :, None] == token_ids[:, None]) & earlier & inside[:, None]).any(-1)
    return inside & ~repeated


def caption_mask(token_ids: Tensor) -> Tensor:
    """True at every word, also a repeated one, and at EOS: (B, L) -> (B, L) bool. No row is empty."""
    position, end = torch.arange(token_ids.shape[1], device=token_ids.device), end_of_text(token_ids)[:, None]
    return ((position > 0) & (position < end)) | (position == end)


class TextTower(nn.Module):
    """Token ids (B, L) -> hidden tokens (B, L, D), L up to context_length, or (T, D) of packed captions.

    Where attention is causal and a caption is pooled at its end, tokens behind EOS change nothing, so that sequences
    may be shorter than context_length, and each caption of a batch nearly as short as it is.
    """

    def __init__(self, config: Text) -> None:
        super().__init__()
        width = config.width
        self.width = width
        self.context_length = config.context_length
        self.grad_checkpointing = False
        self.is_causal = config.causal
        self.pools_last = config.pool == "last"
        self.eos_id = config.eos_id
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        norm = partial(nn.LayerNorm, eps=config.norm_eps)  # 1e-6 would change CLIP's text features by 4e-3
        blocks = [
            TextBlock(
                width,
                config.num_heads,
                config.mlp_ratio,
                qkv_bias=True,
                proj_drop=config.dropout,
                norm_layer=norm,
                act_layer=ACTIVATIONS[config.activation],
            )
            for _ in range(config.depth)
        ]
        for block in blocks:
            block.mlp.drop1.p = 0.0  # timm also drops inside the MLP; the recipe's dropout comes after it
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm(width)
        self._init_weights(blocks)

    def _init_weights(self, blocks: list[TextBlock]) -> None:
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        residual_std = self.width**-0.5 * (2 * len(blocks)) ** -0.5
        for block in blocks:
            for linear, std in (
                (block.attn.qkv, self.width**-0.5),
                (block.attn.proj, residual_std),
                (block.mlp.fc1, (2 * self.width) ** -0.5),
                (block.mlp.fc2, residual_std),
            ):
                nn.init.normal_(linear.weight, std=std)
                nn.init.zeros_(linear.bias)

    def groups(self, lengths: Sequence[int] | None, width: int) -> tuple[Group, ...] | None:
        """The groups for captions of these `lengths` in a batch of this `width`; None: all run at that width."""
        if lengths is None or not self.is_causal or self.pools_last:
            return None
        groups = text_groups(lengths, width)
        return None if groups[0].width == width else groups

    def packing(self, token_ids: Tensor, lengths: Sequence[int] | None) -> Packing | None:
        """How to pack the captions (B, L), whose `lengths` the CPU knows; None: they stay as they are."""
        groups = self.groups(lengths, token_ids.shape[1])
        if groups is None:
            return None
        return Packing.of(groups, end_of_text(token_ids, self.eos_id), width=token_ids.shape[1])

    def forward(self, token_ids: Tensor, packing: Packing | None = None) -> Tensor:
        if packing is None:
            x = self.token_embedding(token_ids) + self.positional_embedding[: token_ids.shape[1]]
        else:
            x = self.token_embedding(packing.pack(token_ids)) + packing.positions(self.positional_embedding)
        groups = None if packing is None else packing.groups
        for block in self.blocks:
            x = run_block(block, x, again=self.grad_checkpointing, is_causal=self.is_causal, groups=groups)
        return self.norm(x)

    def pool(self, hidden: Tensor, token_ids: Tensor, packing: Packing | None = None) -> Tensor:
        """The token at EOS, or the last one: (B, L, D) or (T, D), (B, L) -> (B, D)."""
        if packing is not None:
            return hidden[packing.starts() + end_of_text(token_ids, self.eos_id)]
        return hidden[:, -1] if self.pools_last else pool_text(hidden, token_ids, self.eos_id)


def pool_text(hidden: Tensor, token_ids: Tensor, eos_id: int | None = None) -> Tensor:
    """The token at EOS: (B, L, D), (B, L) -> (B, D)."""
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), end_of_text(token_ids, eos_id)]
