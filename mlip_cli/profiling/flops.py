"""Parameters and floating-point operations of a model, by formula.

We count the operations of matrix products, a multiply-add as 2 FLOPs. We leave out norms, softmax, sums and sorting;
counters that include layer norms report 17.58 instead of 17.56 GMACs for ViT-B/16. With N patches of p x p pixels, P
prefix tokens, width D and MLP width M, an image tower takes these multiply-adds an image:

    patch embedding       N * 3p^2 * D
    attention of a block  t * 4D^2 + 2 * t^2 * D      t = P + tokens in the block; a merge stands before its block,
    MLP of a block        t * 2 * D * M               so the block before the merge still runs on all of them
    a merge of n tokens   ceil(n/2) * floor(n/2) * d  matching on keys of width d, tokens (D) right behind a stem
    guidance              N * p^4                     DCT of the grey picture, once, for the frequency domain
    head                  D * E
    a block of a stem     a global filter, and N * 2 * D * M for its MLP, on patches alone

ViT-B/16 at 224 px (N = 196, P = 1, D = 768, M = 3072, E = 512): 17.56 G multiply-adds, 35.1 GFLOPs.
"""

import math
from collections.abc import Iterable, Sequence
from typing import cast

from torch import nn

from mlip_cli.model.clip import CLIP
from mlip_cli.model.frequency import FrequencyBranch, SpectralBlock, StemBlock
from mlip_cli.model.packing import Group
from mlip_cli.model.vision import ObservedBlock
from mlip_cli.recipe.merge_plan import MergePlan


def gflops(macs: float) -> float:
    """Multiply-adds -> 10^9 floating-point operations."""
    return 2e-9 * macs


def linear_weights(modules: Iterable[nn.Module]) -> int:
    """Entries of the matrices of all linear maps: multiply-adds of a token that passes each once."""
    return sum(m.weight.numel() for module in modules for m in module.modules() if isinstance(m, nn.Linear))


def attention_macs(block: nn.Module, num_tokens: int, *, width: int) -> int:
    """Multiply-adds of a timm block's projections, scores and weighted sums; 0 for a spectral block.

    timm's attention is as wide as the tower. A block may have several side by side. Where one matrix serves attention
    and MLP, all of it counts here.
    """
    attentions = _attentions(block)
    return num_tokens * linear_weights(attentions) + 2 * num_tokens**2 * width * len(attentions)


def mlp_macs(block: nn.Module, num_tokens: int) -> int:
    """Multiply-adds of all linear maps of a block that are not its attention's."""
    return num_tokens * (linear_weights([block]) - linear_weights(_attentions(block)))


def _attentions(block: nn.Module) -> list[nn.Module]:
    return [module for module in block.modules() if hasattr(module, "head_dim")]


def merge_macs(before: int, *, metric_width: int) -> int:
    """Multiply-adds of one merge: products of two halves of the keys, for cosines as for squared distances."""
    return math.ceil(before / 2) * (before // 2) * metric_width


def filter_gflops(block: SpectralBlock) -> float:
    """GFLOPs of a block's global filter: two real FFTs of h*w points a channel, 2.5 n log2 n each, a complex product.

    The products of matrices that stand in for the FFTs take more operations; they do not count.
    """
    h, w, width = block.filter.kernel.shape
    return 1e-9 * width * (2 * 2.5 * h * w * math.log2(h * w) + 6 * h * (w // 2 + 1))


def image_gflops(model: CLIP, plan: MergePlan) -> dict[str, float]:
    """GFLOPs of `encode_image` for one image at `plan`, by part."""
    tower, trunk = model.vision, model.vision.trunk
    stem = [block for block in trunk.blocks if isinstance(block, StemBlock)]
    seen = [
        (block, count if isinstance(block, StemBlock) else count + tower.num_prefix)
        for block, count in zip(trunk.blocks, plan.tokens, strict=True)
    ]
    filters = {"global filters": sum(filter_gflops(block) for block in stem)} if stem else {}
    parts = {
        "patch embedding": gflops(tower.num_patches * 3 * tower.patch_size**2 * tower.width),
        **filters,
        "attention": gflops(sum(attention_macs(block, count, width=tower.width) for block, count in seen)),
        "MLP": gflops(sum(mlp_macs(block, count) for block, count in seen)),
        "merging": gflops(_merging_macs(model, plan)),
        "head": gflops(linear_weights([model.image_projection])),
    }
    pool = trunk.attn_pool
    if pool is not None:  # one query against all tokens
        num_tokens = plan.tokens[-1] + (tower.num_prefix if trunk.pool_include_prefix else 0)
        keys_and_values = linear_weights([pool.kv])
        once = linear_weights([pool]) - keys_and_values
        parts["pooling"] = gflops(num_tokens * keys_and_values + once + 2 * num_tokens * tower.width)
    return parts


def _merging_macs(model: CLIP, plan: MergePlan) -> int:
    """Multiply-adds of all merges of `plan` and of their guidance; dropping tokens takes none."""
    tower = model.vision
    macs, before = 0, tower.num_patches
    for place, after in sorted(plan.merges.items()):
        if after < before and not plan.drops:
            seen = tower.trunk.blocks[place - 2]  # it returns its keys, or its tokens serve as such
            metric_width = seen.attn.head_dim if isinstance(seen, ObservedBlock) else tower.width
            macs += merge_macs(before, metric_width=metric_width)
        before = after
    channels = 3 if reads_pixels(model) else 1  # guidance of one channel, unless it shares the branch's spectrum
    return macs + (dct_macs(model, channels) if plan.asks_frequency else 0)


def dct_macs(model: CLIP, channels: int) -> int:
    """Multiply-adds of the block DCT of one image's patches."""
    return model.vision.num_patches * channels * model.vision.patch_size**4


def reads_pixels(model: CLIP) -> bool:
    """Whether the model has a frequency branch on DCT coefficients."""
    return isinstance(model.frequency, FrequencyBranch) and model.frequency.reads_pixels


def frequency_gflops(model: CLIP, plan: MergePlan, *, other_crop: bool = False) -> float:
    """GFLOPs of the frequency branch for one image: its blocks and its projection, not its token head.

    A stem's blocks belong to the image tower, so only the projection counts here. A branch that reads another crop
    embeds it, or takes its DCT, by itself.
    """
    branch, macs, filters = model.frequency, 0, 0.0
    if isinstance(branch, FrequencyBranch):
        filters = sum(filter_gflops(cast(SpectralBlock, block)) for block in branch.blocks)
        macs = model.vision.num_patches * linear_weights([branch])
        if branch.reads_pixels and (other_crop or not plan.asks_frequency):  # else guidance has made the spectrum
            macs += dct_macs(model, 3)
        elif other_crop:
            macs += model.vision.num_patches * 3 * model.vision.patch_size**2 * model.vision.width
    if model.frequency_projection is not None:
        macs += model.frequency_projection.weight.numel()
    return gflops(macs) + filters


def token_head_gflops(model: CLIP, plan: MergePlan, num_text_tokens: float) -> float:
    """GFLOPs of the projections that only token losses read, for one pair."""
    counts = {"spatial": plan.tokens[-1], "frequency": plan.num_patches, "text": num_text_tokens}
    heads = model.token_projections.items()  # those of losses over words read the mean token
    return gflops(sum(counts.get(name, 1) * linear_weights([head]) for name, head in heads))


def text_gflops(model: CLIP, num_tokens: int) -> float:
    """GFLOPs of `encode_text` for one caption of `num_tokens`, padding included; causal attention is counted whole."""
    width = model.text.width
    macs = sum(attention_macs(b, num_tokens, width=width) + mlp_macs(b, num_tokens) for b in model.text.blocks)
    return gflops(macs + linear_weights([model.text_projection]))


def groups_of_captions(
    model: CLIP, num_captions: int, *, width: int, lengths: Sequence[int] | None
) -> tuple[Group, ...]:
    """The groups in which a batch's captions pass the text tower: by their `lengths`, or all at the batch's `width`."""
    return model.text.groups(lengths, width) or (Group(num_captions, width),)


def mean_tokens(groups: Sequence[Group]) -> float:
    """Tokens that the text tower computes for a caption, padding included."""
    return sum(rows * width for rows, width in groups) / sum(rows for rows, _ in groups)


def step_gflops(
    model: CLIP,
    plan: MergePlan,
    *,
    batch_size: int,
    num_text_tokens: int,
    captions_per_image: int = 1,
    text_lengths: Sequence[int] | None = None,
    other_crop: bool = False,
) -> float:
    """GFLOPs of a training step by definition: three times those of the forward pass at `plan`.

    The backward pass of a matrix product is two such products; a frozen tower has none. A forward pass that is done
    twice, for micro-batches, counts once; the matrices of the losses (B^2 * E and smaller) do not count.

    Args:
        num_text_tokens: width of the batch's captions.
        text_lengths: tokens of each of them; None: all are as long as the batch is wide.
    """
    captions = captions_per_image * batch_size
    groups = groups_of_captions(model, captions, width=num_text_tokens, lengths=text_lengths)
    towers = {
        model.vision: sum(image_gflops(model, plan).values()),
        model.text: sum(rows * text_gflops(model, width) for rows, width in groups) / batch_size,
    }
    learns = {tower: any(parameter.requires_grad for parameter in tower.parameters()) for tower in towers}
    pair = sum((3 if learns[tower] else 1) * gflops_of_tower for tower, gflops_of_tower in towers.items())
    pair += 3 * frequency_gflops(model, plan, other_crop=other_crop)
    pair += 3 * token_head_gflops(model, plan, captions_per_image * mean_tokens(groups))
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
