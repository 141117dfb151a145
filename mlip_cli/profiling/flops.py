"""Parameters and GFLOPs of a model, for the commands that print them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from timm.layers import DiffAttention
from timm.models.vision_transformer import DiffParallelScalingBlock
from torch import nn

from mlip_cli.model.clip import CLIP
from mlip_cli.model.frequency import FrequencyBranch, SpectralBlock, StemBlock
from mlip_cli.model.vision import ObservedBlock
from mlip_cli.recipe.merge_plan import MergePlan

TWO_MAPS = (DiffAttention, DiffParallelScalingBlock)
"""A head has two maps of attention, each with keys of half its width."""


def linear_weights(modules: Iterable[nn.Module]) -> int:
    """Entries of the matrices of all linear maps: multiply-adds of a token that passes each once."""
    return sum(m.weight.numel() for module in modules for m in module.modules() if isinstance(m, nn.Linear))


@dataclass(frozen=True)
class BlockSizes:
    """What a transformer block's cost depends on."""

    width: int
    """D, summed over heads."""
    attention_weights: int
    """Entries of the matrices that every token passes in attention: 4D^2."""
    mlp_weights: int
    """Entries of all other matrices of the block: 2DM."""

    def attention_macs(self, num_tokens: int) -> int:
        """Multiply-adds of projections, scores and weighted sums."""
        return num_tokens * self.attention_weights + 2 * num_tokens**2 * self.width

    def mlp_macs(self, num_tokens: int) -> int:
        """Multiply-adds of the MLP."""
        return num_tokens * self.mlp_weights


def block_sizes(block: Any) -> BlockSizes:
    """Sizes of a timm transformer block; where one matrix serves attention and MLP, all are attention's."""
    attentions: list[Any] = [module for module in block.modules() if hasattr(module, "head_dim")]
    width = sum(a.num_heads * a.head_dim * (2 if isinstance(a, TWO_MAPS) else 1) for a in attentions)
    weights = linear_weights(attentions)
    return BlockSizes(width, weights, linear_weights([block]) - weights)


@dataclass(frozen=True)
class SpectralSizes:
    """What a spectral block's cost depends on; it runs on patches alone, before any merge."""

    grid: tuple[int, int]
    width: int
    mlp_weights: int
    """Entries of the matrices of its MLP: 2DM."""

    def filter_gflops(self) -> float:
        """GFLOPs of the global filter."""
        return global_filter_gflops(*self.grid, self.width)

    def mlp_gflops(self) -> float:
        """GFLOPs of the MLP."""
        return gflops(self.grid[0] * self.grid[1] * self.mlp_weights)


def spectral_sizes(block: SpectralBlock) -> SpectralSizes:
    """Sizes of a spectral block."""
    h, w, width = block.filter.kernel.shape
    return SpectralSizes((h, w), width, linear_weights([block]))


@dataclass(frozen=True)
class ImageTowerSizes:
    """What an image tower's cost depends on."""

    num_patches: int
    num_prefix: int
    patch_size: int
    width: int
    blocks: tuple[BlockSizes, ...]
    metric_width: int
    """Width of what matching compares: one head's keys, or the whole token where keys cannot be read."""
    head_weights: int
    """Entries of the matrices that only the pooled feature passes: DE."""
    stem: tuple[SpectralSizes, ...] = ()
    """Spectral blocks before `blocks`."""


def image_tower_sizes(model: CLIP) -> ImageTowerSizes:
    """Sizes of the image tower with its projection into the joint space."""
    tower = model.vision
    stem = [block for block in tower.trunk.blocks if isinstance(block, StemBlock)]
    blocks: list[Any] = list(tower.trunk.blocks)[len(stem) :]
    return ImageTowerSizes(
        num_patches=tower.num_patches,
        num_prefix=tower.num_prefix,
        patch_size=tower.patch_size,
        width=tower.width,
        blocks=tuple(block_sizes(block) for block in blocks),
        metric_width=blocks[0].attn.head_dim if isinstance(blocks[0], ObservedBlock) else tower.width,
        head_weights=model.image_projection.weight.numel(),
        stem=tuple(spectral_sizes(block) for block in stem),
    )


def image_gflops(model: CLIP, plan: MergePlan) -> dict[str, float]:
    """GFLOPs of `encode_image` for one image at `plan`, by part."""
    sizes = image_tower_sizes(model)
    merges = {} if plan.drops else plan.merges
    parts = image_tower_gflops(sizes, tokens=plan.tokens, merges=merges, asks_frequency=plan.asks_frequency)
    pool = model.vision.trunk.attn_pool
    if pool is not None:  # one query against all tokens
        num_tokens = plan.tokens[-1] + (model.vision.num_prefix if model.vision.trunk.pool_include_prefix else 0)
        keys_and_values = linear_weights([pool.kv])
        once = linear_weights([pool]) - keys_and_values
        parts["pooling"] = gflops(num_tokens * keys_and_values + once + 2 * num_tokens * model.vision.width)
    return parts


def frequency_gflops(model: CLIP) -> float:
    """GFLOPs of the frequency branch for one image: its blocks and its projection, not its token head.

    Of a stem the projection alone: its blocks are the image tower's.
    """
    branch, macs, filters = model.frequency, 0, 0.0
    if isinstance(branch, FrequencyBranch):
        filters = sum(spectral_sizes(cast(SpectralBlock, block)).filter_gflops() for block in branch.blocks)
        macs = model.vision.num_patches * linear_weights([branch])
        if branch.reads_pixels:
            macs += model.vision.num_patches * 3 * 2 * branch.patch_size**3
    if model.frequency_projection is not None:
        macs += model.frequency_projection.weight.numel()
    return gflops(macs) + filters


def token_head_gflops(model: CLIP, plan: MergePlan, num_text_tokens: int) -> float:
    """GFLOPs of the projections that only token losses read, for one pair."""
    counts = {"spatial": plan.tokens[-1], "frequency": plan.num_patches, "text": num_text_tokens}
    return gflops(sum(counts[name] * linear_weights([head]) for name, head in model.token_projections.items()))


def text_gflops(model: CLIP, num_tokens: int) -> float:
    """GFLOPs of `encode_text` for one caption of `num_tokens`."""
    blocks = [block_sizes(block) for block in model.text.blocks]
    return text_tower_gflops(blocks, num_tokens=num_tokens, head_weights=model.text_projection.weight.numel())


def step_gflops(model: CLIP, plan: MergePlan, *, batch_size: int, num_text_tokens: int) -> float:
    """GFLOPs of a training step as its definition counts them: three times those of the forward pass at `plan`.

    The backward pass of a matrix product is two such products; a frozen tower has none. A forward pass that is done
    twice, for micro-batches, counts once; the matrices of the losses (B^2 * E and smaller) do not count.
    """
    towers = {
        model.vision: sum(image_gflops(model, plan).values()),
        model.text: text_gflops(model, num_text_tokens),
    }
    learns = {tower: any(parameter.requires_grad for parameter in tower.parameters()) for tower in towers}
    pair = sum((3 if learns[tower] else 1) * gflops_of_tower for tower, gflops_of_tower in towers.items())
    pair += 3 * (frequency_gflops(model) + token_head_gflops(model, plan, num_text_tokens))
    return batch_size * pair


def parameters(model: CLIP) -> dict[str, int]:
    """Number of parameters by part; the parts add up to the model."""
    embedding = model.text.token_embedding
    parts = {
        "image tower": _count([model.vision, model.image_projection]),
        "text tower": _count([model.text, model.text_projection]) - _count([embedding]),
        "word embeddings": _count([embedding]),
        "frequency branch": _count([m for m in (model.frequency, model.frequency_projection) if m is not None]),
        "token heads": _count([model.token_projections]),
        "logit scales": _count([model.log_scales, model.logit_biases]),
    }
    assert sum(parts.values()) == _count([model]), parts
    return {name: count for name, count in parts.items() if count}


def _count(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def gflops(macs: float) -> float:
    """Multiply-adds -> 10^9 floating-point operations."""
    return 2e-9 * macs


def merge_macs(before: int, *, metric_width: int) -> int:
    """Multiply-adds of one merge: similarities between two halves of the tokens before it."""
    return math.ceil(before / 2) * (before // 2) * metric_width


def image_tower_gflops(
    sizes: ImageTowerSizes, *, tokens: Sequence[int], merges: Mapping[int, int], asks_frequency: bool
) -> dict[str, float]:
    """GFLOPs of one image by part.

    Args:
        tokens: patch tokens inside each block.
        merges: block (counted from 1) -> patch tokens after the merge before it; none where tokens drop.
        asks_frequency: the merges use the frequency guidance.
    """
    merging, before = 0, sizes.num_patches
    for _, after in sorted(merges.items()):
        if after < before:
            merging += merge_macs(before, metric_width=sizes.metric_width)
        before = after
    if asks_frequency:
        merging += sizes.num_patches * 2 * sizes.patch_size**3
    seen = [
        (block, count + sizes.num_prefix) for block, count in zip(sizes.blocks, tokens[len(sizes.stem) :], strict=True)
    ]
    filters = {"global filters": sum(block.filter_gflops() for block in sizes.stem)} if sizes.stem else {}
    return {
        "patch embedding": gflops(sizes.num_patches * 3 * sizes.patch_size**2 * sizes.width),
        **filters,
        "attention": gflops(sum(block.attention_macs(count) for block, count in seen)),
        "MLP": gflops(sum(block.mlp_macs(count) for block, count in seen))
        + sum(block.mlp_gflops() for block in sizes.stem),
        "merging": gflops(merging),
        "head": gflops(sizes.head_weights),
    }


def text_tower_gflops(blocks: Sequence[BlockSizes], *, num_tokens: int, head_weights: int) -> float:
    """GFLOPs of one caption of `num_tokens`, padding included; causal attention is counted whole."""
    macs = sum(block.attention_macs(num_tokens) + block.mlp_macs(num_tokens) for block in blocks)
    return gflops(macs + head_weights)


def global_filter_gflops(h: int, w: int, width: int) -> float:
    """GFLOPs of a global filter: two real FFTs of h*w points a channel, 2.5 n log2 n each, and a complex product.

    Products of matrices, which stand in for the FFTs where they are faster, take more operations; they do not count.
    """
    return 1e-9 * width * (2 * 2.5 * h * w * math.log2(h * w) + 6 * h * (w // 2 + 1))
