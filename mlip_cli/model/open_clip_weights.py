"""Weights between OpenCLIP's names, which are OpenAI's too, and ours: state dict -> state dict, both ways.

Both name the same tensors; what differs is the names, transposed projections and axes of length one. So there and back
gives every tensor bit for bit. What only one side has is named here.
"""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from mlip_cli.errors import UsageError

BLOCKS = {"visual.transformer.resblocks": "vision.trunk.blocks", "transformer.resblocks": "text.blocks"}
IN_A_BLOCK = {
    "ln_1.weight": "norm1.weight",
    "ln_1.bias": "norm1.bias",
    "attn.in_proj_weight": "attn.qkv.weight",
    "attn.in_proj_bias": "attn.qkv.bias",
    "attn.out_proj.weight": "attn.proj.weight",
    "attn.out_proj.bias": "attn.proj.bias",
    "ln_2.weight": "norm2.weight",
    "ln_2.bias": "norm2.bias",
    "mlp.c_fc.weight": "mlp.fc1.weight",
    "mlp.c_fc.bias": "mlp.fc1.bias",
    "mlp.c_proj.weight": "mlp.fc2.weight",
    "mlp.c_proj.bias": "mlp.fc2.bias",
}
OUTSIDE_BLOCKS = {
    "visual.conv1.weight": "vision.trunk.patch_embed.proj.weight",
    "visual.class_embedding": "vision.trunk.cls_token",
    "visual.positional_embedding": "vision.trunk.pos_embed",
    "visual.ln_pre.weight": "vision.trunk.norm_pre.weight",
    "visual.ln_pre.bias": "vision.trunk.norm_pre.bias",
    "visual.ln_post.weight": "vision.trunk.norm.weight",
    "visual.ln_post.bias": "vision.trunk.norm.bias",
    "visual.proj": "image_projection.weight",
    "token_embedding.weight": "text.token_embedding.weight",
    "positional_embedding": "text.positional_embedding",
    "ln_final.weight": "text.norm.weight",
    "ln_final.bias": "text.norm.bias",
    "text_projection": "text_projection.weight",
    "logit_scale": "log_scales.spatial_global",
    "logit_bias": "logit_biases.spatial_global",
}
TRANSPOSED = ("visual.proj", "text_projection")
"""(D, E) there, (E, D) here."""
LEADING_AXES = {"visual.class_embedding": 2, "visual.positional_embedding": 1}
"""How many axes of length one come first here and not there."""
SCALARS = ("logit_scale", "logit_bias")
"""() there, or (1,); (1,) here."""

NO_WEIGHTS = ("attn_mask", "input_resolution", "context_length", "vocab_size")
"""Entries of older files that say again what the shapes say."""

PATCH_BIAS = "vision.trunk.patch_embed.proj.bias"
"""Of towers that are given by their sizes: a bias that there is part of the positions of the patches."""

ONLY_OURS = ("frequency.", "frequency_projection.", "token_projections.", "log_scales.", "logit_biases.")
"""First parts of our names without a counterpart, but for the scale and the bias of spatial_global."""


def from_open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's weights by our names and in our shapes, some as views.

    Takes the prefixes that its trainer (`module.`) and its models with a text tower of their own (`text.`) put before
    the names. There is no patch bias in the result: zero where our tower has one.

    Raises:
        UsageError: names that no plain ViT with a class token or no causal text transformer has.
    """
    given = _without_prefixes(weights)
    ours = {name: _our_name(name) for name in given if name not in NO_WEIGHTS}
    unknown = [name for name, our_name in ours.items() if our_name is None]
    if unknown:
        raise UsageError(
            f"{_some(unknown)}: no counterpart here; what is read are ViTs that pool by a class token, with causal "
            "text transformers"
        )
    return {our_name: _reshaped_to_ours(name, given[name]) for name, our_name in ours.items() if our_name is not None}


def to_open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights by OpenCLIP's names and in its shapes, contiguous, without what `without_counterpart` names.

    A patch bias is added to the positions of the patches, where it gives the same sums but for the last bit.

    Raises:
        UsageError: names that OpenCLIP's plain ViT cannot have, as those of registers or of a spectral stem.
    """
    dropped = {*without_counterpart(weights), PATCH_BIAS}
    names = {name: _open_clip_name(name) for name in weights if name not in dropped}
    unknown = [name for name, their_name in names.items() if their_name is None]
    if unknown:
        raise UsageError(f"{_some(unknown)}: no counterpart in OpenCLIP's ViT")
    theirs = {t: _reshaped_to_theirs(t, weights[name]) for name, t in names.items() if t is not None}
    if PATCH_BIAS in weights:
        positions = theirs["visual.positional_embedding"].clone()
        positions[1:] += weights[PATCH_BIAS]
        theirs["visual.positional_embedding"] = positions
    return theirs


def without_counterpart(names: Iterable[str]) -> list[str]:
    """Those of our names that OpenCLIP's CLIP has nothing for: frequency branch, token heads, other losses' scales."""
    kept = OUTSIDE_BLOCKS.values()
    return [name for name in names if name.startswith(ONLY_OURS) and name not in kept]


def _our_name(name: str) -> str | None:
    return _renamed(name, BLOCKS, IN_A_BLOCK, OUTSIDE_BLOCKS)


def _open_clip_name(name: str) -> str | None:
    return _renamed(name, _turned(BLOCKS), _turned(IN_A_BLOCK), _turned(OUTSIDE_BLOCKS))


def _turned(names: dict[str, str]) -> dict[str, str]:
    return {value: key for key, value in names.items()}


def _renamed(name: str, blocks: dict[str, str], inside: dict[str, str], outside: dict[str, str]) -> str | None:
    in_block = re.fullmatch(r"(.+?)\.(\d+)\.(.+)", name)
    if in_block is None or in_block[1] not in blocks:
        return outside.get(name)
    rest = inside.get(in_block[3])
    return rest and f"{blocks[in_block[1]]}.{in_block[2]}.{rest}"


def _reshaped_to_ours(name: str, tensor: Tensor) -> Tensor:
    if name in TRANSPOSED:
        return tensor.T
    if name in SCALARS:
        return tensor.reshape(1)
    return tensor[(None,) * LEADING_AXES.get(name, 0)]


def _reshaped_to_theirs(name: str, tensor: Tensor) -> Tensor:
    if name in TRANSPOSED:
        return tensor.T.contiguous()
    if name in SCALARS:
        return tensor.reshape(())
    return tensor[(0,) * LEADING_AXES.get(name, 0)].contiguous()


def _without_prefixes(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {name: name.removeprefix("module.") for name in weights}
    return {short.removeprefix("text."): weights[name] for name, short in names.items()}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
