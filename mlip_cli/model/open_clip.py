"""Weights by OpenCLIP's names, which are OpenAI's too: renamed to ours and back, and the recipe that they fit.

Both sides name the same tensors. Only names, transposed projections and axes of length one differ, so there and back
gives every tensor bit for bit.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import timm
from torch import Tensor

from mlip_cli.errors import UsageError
from mlip_cli.recipe.config import Model as ModelConfig
from mlip_cli.recipe.config import Text, Vision
from mlip_cli.types import VOCAB_SIZE

BLOCKS = {"visual.transformer.resblocks": "vision.trunk.blocks", "transformer.resblocks": "text.blocks"}
MODULES_OF_A_BLOCK = {
    "ln_1.": "norm1.",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj.": "attn.proj.",
    "ln_2.": "norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
IN_A_BLOCK = {theirs + kind: ours + kind for theirs, ours in MODULES_OF_A_BLOCK.items() for kind in ("weight", "bias")}
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
"""(D, E) in OpenCLIP, (E, D) here."""
LEADING_AXES = {"visual.class_embedding": 2, "visual.positional_embedding": 1}
"""Number of axes of length one that come first here and that OpenCLIP does not have."""
SCALARS = ("logit_scale", "logit_bias")
"""() or (1,) in OpenCLIP, (1,) here."""
NO_WEIGHTS = ("attn_mask", "input_resolution", "context_length", "vocab_size")
"""Entries of older files that repeat what the shapes say."""

PATCH_BIAS = "vision.trunk.patch_embed.proj.bias"
"""A bias of towers that a recipe gives by their sizes. In OpenCLIP the positions of the patches include it."""
ONLY_OURS = ("frequency.", "frequency_projection.", "token_projections.", "log_scales.", "logit_biases.")
"""Beginnings of the names that OpenCLIP has no tensor for, but for the scale and the bias of spatial_global."""

READ = "mlip reads plain ViTs that pool by a class token, with causal text transformers over CLIP's vocabulary"


def from_open_clip(weights: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """OpenCLIP's weights by our names and in our shapes, some as views; there is no patch bias in them.

    Names may begin with `module.`, as OpenCLIP's trainer writes them, or `text.`, as in models with a separate text
    tower. `source` begins the message of an error.

    Raises:
        UsageError: names of parts that our towers do not have.
    """
    found, unknown = {}, []
    for given, tensor in weights.items():
        name = given.removeprefix("module.").removeprefix("text.")
        ours = _renamed(name, BLOCKS, IN_A_BLOCK, OUTSIDE_BLOCKS)
        if ours is None and name not in NO_WEIGHTS:
            unknown.append(name)
        elif ours is not None:
            tensor = tensor.T if name in TRANSPOSED else tensor[(None,) * LEADING_AXES.get(name, 0)]
            found[ours] = tensor.reshape(1) if name in SCALARS else tensor
    if unknown:
        raise UsageError(f"{source}: {_some(unknown)}: no such part here; {READ}")
    return found


def to_open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights by OpenCLIP's names and in its shapes, contiguous, without the tensors of `without_counterpart`.

    A patch bias is added to the positions of the patches; sums then differ by rounding alone.

    Raises:
        UsageError: names that OpenCLIP's plain ViT does not have, such as those of registers or of a spectral stem.
    """
    tables = [{ours: theirs for theirs, ours in table.items()} for table in (BLOCKS, IN_A_BLOCK, OUTSIDE_BLOCKS)]
    left_out = {*without_counterpart(weights), PATCH_BIAS}
    found, unknown = {}, []
    for name, tensor in weights.items():
        theirs = _renamed(name, *tables)
        if theirs is not None:
            tensor = tensor.T if theirs in TRANSPOSED else tensor[(0,) * LEADING_AXES.get(theirs, 0)]
            found[theirs] = (tensor.reshape(()) if theirs in SCALARS else tensor).contiguous()
        elif name not in left_out:
            unknown.append(name)
    if unknown:
        raise UsageError(f"{_some(unknown)}: OpenCLIP's ViT has no such part")
    if PATCH_BIAS in weights:
        positions = found["visual.positional_embedding"].clone()
        positions[1:] += weights[PATCH_BIAS]
        found["visual.positional_embedding"] = positions
    return found


def without_counterpart(names: Iterable[str]) -> list[str]:
    """Our names that OpenCLIP's CLIP has no tensor for: frequency branch, token heads, scales of other losses."""
    shared = OUTSIDE_BLOCKS.values()
    return [name for name in names if name.startswith(ONLY_OURS) and name not in shared]


def _renamed(name: str, blocks: dict[str, str], inside: dict[str, str], outside: dict[str, str]) -> str | None:
    in_block = re.fullmatch(r"(.+?)\.(\d+)\.(.+)", name)
    if in_block is None or in_block[1] not in blocks:
        return outside.get(name)
    rest = inside.get(in_block[3])
    return rest and f"{blocks[in_block[1]]}.{in_block[2]}.{rest}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


DEFAULTS: dict[str, dict[str, Any]] = {
    "vision_cfg": {
        "layers": 12,
        "width": 768,
        "head_width": 64,
        "mlp_ratio": 4.0,
        "patch_size": 16,
        "image_size": 224,
        "no_ln_pre": False,
        "norm_kwargs": None,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": VOCAB_SIZE,
        "width": 512,
        "heads": 8,
        "layers": 12,
        "mlp_ratio": 4.0,
        "norm_kwargs": None,
    },
}
"""Keys of OpenCLIP's configurations that describe a tower, with OpenCLIP's defaults."""
NEUTRAL = {"pool_type": ("tok", "argmax"), "pos_embed_type": ("learnable",), "proj_type": ("linear",)}
"""Values of other keys that describe our towers too, besides null and false."""
NO_EFFECT = ("patch_dropout", "output_tokens", "pad_id", "eos_id")
"""Keys that change neither weights nor features."""
TOP_KEYS = ("embed_dim", "quick_gelu", *DEFAULTS)
TOP_KEYS += ("custom_text", "nonscalar_logit_scale", "init_logit_scale", "init_logit_bias")
"""The latter name tensors in another way or say how they start."""

NORM_EPS = 1e-5
"""PyTorch's default, which OpenCLIP keeps unless `norm_kwargs` says otherwise."""

TIMM_TOWERS = {
    (16, 256, 10, 4, 1024): "vit_xsmall_patch16_clip_224",
    (32, 512, 12, 8, 2048): "vit_medium_patch32_clip_224",
    (16, 512, 12, 8, 2048): "vit_medium_patch16_clip_224",
    (32, 640, 12, 10, 2560): "vit_betwixt_patch32_clip_224",
    (32, 768, 12, 12, 3072): "vit_base_patch32_clip_224",
    (16, 768, 12, 12, 3072): "vit_base_patch16_clip_224",
    (16, 896, 12, 14, 3584): "vit_base_patch16_plus_clip_240",
    (14, 1024, 24, 16, 4096): "vit_large_patch14_clip_224",
    (14, 1280, 32, 16, 5120): "vit_huge_patch14_clip_224",
    (14, 1408, 40, 16, 6144): "vit_giant_patch14_clip_224",
    (14, 1664, 48, 16, 8192): "vit_gigantic_patch14_clip_224",
}
"""Patch size, width, depth, number of heads and MLP width of OpenCLIP's ViTs -> timm's name."""


def model_section(configuration: Mapping[str, Any], *, source: str) -> ModelConfig:
    """The recipe's section `model` for a CLIP that computes what a configuration of OpenCLIP (`model_cfg`) describes.

    `source` begins the message of an error.

    Raises:
        UsageError: the configuration has parts that our towers cannot have, or no tower of timm has its form.
    """
    vision, text = (defaults | configuration[section] for section, defaults in DEFAULTS.items())
    strange = [key for key in configuration if key not in TOP_KEYS]
    strange += [*_strange("vision_cfg", vision), *_strange("text_cfg", text)]
    if strange:
        raise UsageError(f"{source}: {', '.join(strange)}: no such part here; {READ}")
    is_quick = bool(configuration.get("quick_gelu"))
    tower = _image_tower(vision, is_quick=is_quick)
    if tower is None:
        raise UsageError(f"{source}: mlip knows no tower of timm with this form; use another architecture")
    return ModelConfig(
        embed_dim=configuration["embed_dim"],
        vision=tower,
        text=Text(
            width=text["width"],
            depth=text["layers"],
            num_heads=text["heads"],
            context_length=text["context_length"],
            activation="quick_gelu" if is_quick else "gelu",
        ),
        frequency=None,
        merging=None,
    )


def _strange(section: str, tower: Mapping[str, Any]) -> list[str]:
    """Keys of a section, with their values, that describe no tower of ours."""
    found = []
    for key, value in tower.items():
        if key in DEFAULTS[section]:
            is_fixed = key == "vocab_size" or (section, key) == ("text_cfg", "mlp_ratio")
            is_ours = not isinstance(value, list) and (not is_fixed or value == DEFAULTS[section][key])
        else:
            is_ours = not value or key in NO_EFFECT or value in NEUTRAL.get(key, ())
        if not is_ours:
            found.append(f"{section}.{key} {value}")
    for key, value in (tower["norm_kwargs"] or {}).items():
        if key != "eps" or (section == "text_cfg" and value != NORM_EPS):
            found.append(f"{section}.norm_kwargs.{key} {value}")
    return found


def _image_tower(vision: Mapping[str, Any], *, is_quick: bool) -> Vision | None:
    """The tower by its sizes or by timm's name; None if there is none of this form."""
    patch_size, width, depth = vision["patch_size"], vision["width"], vision["layers"]
    num_heads, mlp_width = width // vision["head_width"], int(width * vision["mlp_ratio"])
    norms = not vision["no_ln_pre"], (vision["norm_kwargs"] or {}).get("eps", NORM_EPS)
    if norms == (False, 1e-6) and not is_quick and mlp_width == 4 * width:
        return Vision(patch_size=patch_size, width=width, depth=depth, num_heads=num_heads)
    name = TIMM_TOWERS.get((patch_size, width, depth, num_heads, mlp_width), "") if norms == (True, NORM_EPS) else ""
    name = name.replace("_clip_", "_clip_quickgelu_") if is_quick else name
    return Vision(timm=name) if timm.is_model(name) else None


def as_yaml(section: ModelConfig) -> str:
    """A section from `model_section` as one line of YAML."""

    def line(values: Mapping[str, Any]) -> str:
        return "{" + ", ".join(f"{key}: {value}" for key, value in values.items()) + "}"

    text = section.text.model_dump(exclude={"dropout"})
    vision = section.vision.model_dump(exclude_defaults=True)
    return f"model: {line({'embed_dim': section.embed_dim, 'vision': line(vision), 'text': line(text)})}"
