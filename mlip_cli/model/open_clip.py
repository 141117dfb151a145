"""Weights by OpenCLIP's names, which are OpenAI's too: renamed to ours, and the recipe that they fit.

Both sides name the same tensors. Only names, transposed projections and axes of length one differ.
"""

import json
import re
from collections.abc import Mapping
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

ONLY_OURS = ("frequency.", "frequency_projection.", "token_projections.", "log_scales.", "logit_biases.")
"""Beginnings of the names that OpenCLIP has no tensor for, but for the scale and the bias of spatial_global."""

READ = "mlip reads plain ViTs that pool by a class token, with causal text transformers over CLIP's vocabulary"


def from_open_clip(weights: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """OpenCLIP's weights by our names and in our shapes, some as views.

    Names may begin with `module.`, as OpenCLIP's trainer writes them, or `text.`, as in models with a separate text
    tower. `source` begins the message of an error.

    Raises:
        UsageError: names of parts that our towers do not have.
    """
    found, unknown = {}, []
    for given, tensor in weights.items():
        name = given.removeprefix("module.").removeprefix("text.")
        ours = _our_name(name)
        if ours is not None:
            tensor = tensor.T if name in TRANSPOSED else tensor[(None,) * LEADING_AXES.get(name, 0)]
            found[ours] = tensor.reshape(1) if name in SCALARS else tensor
        elif name not in NO_WEIGHTS:
            unknown.append(name)
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UsageError(f"{source}: {', '.join(unknown[:3])}{more}: no such part here; {READ}")
    return found


def _our_name(name: str) -> str | None:
    in_block = re.fullmatch(r"(.+?)\.(\d+)\.(.+[._])(weight|bias)", name)
    if in_block is None:
        return OUTSIDE_BLOCKS.get(name)
    blocks, number, module, kind = in_block.groups()
    if blocks not in BLOCKS or module not in MODULES_OF_A_BLOCK:
        return None
    return f"{BLOCKS[blocks]}.{number}.{MODULES_OF_A_BLOCK[module]}{kind}"


DEFAULTS: dict[str, dict[str, Any]] = {
    "vision_cfg": {
        "layers": 12,
        "width": 768,
        "head_width": 64,
        "mlp_ratio": 4.0,
        "patch_size": 16,
        "image_size": 224,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": VOCAB_SIZE,
        "width": 512,
        "heads": 8,
        "layers": 12,
    },
}
"""The keys in OpenCLIP's configurations of plain ViTs, with OpenCLIP's defaults."""

TOP_KEYS = ("embed_dim", "quick_gelu", *DEFAULTS)

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
    strange = [f"{key} {value}" for key, value in configuration.items() if key not in TOP_KEYS]
    for section, defaults in DEFAULTS.items():
        for key, value in configuration[section].items():
            if key not in defaults or isinstance(value, list):  # a ResNet has a list of layers
                strange.append(f"{section}.{key} {value}")
    vision, text = (defaults | configuration[section] for section, defaults in DEFAULTS.items())
    if text["vocab_size"] != VOCAB_SIZE:
        strange.append(f"text_cfg.vocab_size {text['vocab_size']}")
    if strange:
        raise UsageError(f"{source}: {', '.join(strange)}: no such part here; {READ}")
    width, head_width = vision["width"], vision["head_width"]
    form = vision["patch_size"], width, vision["layers"], width // head_width, int(width * vision["mlp_ratio"])
    is_quick = bool(configuration.get("quick_gelu"))
    tower = TIMM_TOWERS.get(form, "").replace("_clip_", "_clip_quickgelu_" if is_quick else "_clip_")
    if not timm.is_model(tower):
        raise UsageError(f"{source}: mlip knows no tower of timm with this form; use another architecture")
    return ModelConfig(
        embed_dim=configuration["embed_dim"],
        vision=Vision(timm=tower),
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


def as_yaml(section: ModelConfig) -> str:
    """A section from `model_section` as one line of YAML."""
    values = section.model_dump(
        include={"embed_dim": True, "vision": {"timm"}, "text": True}, exclude={"text": {"dropout"}}
    )
    return f"model: {json.dumps(values)}".replace('"', "")
