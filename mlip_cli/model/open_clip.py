"""Weights by OpenCLIP's names, which are OpenAI's too, or by those of transformers' CLIPModel: renamed to ours, and the
recipe that they fit.

All sides name the same tensors. Only names, transposed projections and axes of length one differ; transformers also
keeps query, key and value apart.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
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
NO_WEIGHTS = (
    *("attn_mask", "input_resolution", "context_length", "vocab_size"),
    *("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids", "n_averaged"),
)
"""Entries of some files that repeat what the shapes say, or count what an average is of."""

WRAPPERS = ("module", "model", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What DDP and averages, Lightning, torch.compile, FSDP and recomputation add to names, in front or in between."""

OF_TRANSFORMERS = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.": "visual.conv1.",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",  # spelled like this there
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "vision_model.post_layernorm.": "visual.ln_post.",
    "visual_projection.weight": "visual.proj",
    "text_model.embeddings.token_embedding.": "token_embedding.",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.encoder.layers.": "transformer.resblocks.",
    "text_model.final_layer_norm.": "ln_final.",
    "text_projection.weight": "text_projection",
}
"""Beginnings of transformers' names -> OpenCLIP's."""
BLOCKS_OF_TRANSFORMERS = {
    ".layer_norm1.": ".ln_1.",
    ".self_attn.out_proj.": ".attn.out_proj.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}
QUERY_KEY_VALUE = re.compile(r"(.+)\.self_attn\.([qkv])_proj\.(weight|bias)")

ONLY_OURS = ("frequency.", "frequency_projection.", "token_projections.", "log_scales.", "logit_biases.")
"""Beginnings of the names that OpenCLIP has no tensor for, but for the scale and the bias of spatial_global."""

READ = "mlip reads plain ViTs that pool by a class token, with causal text transformers over CLIP's vocabulary"


def from_open_clip(weights: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """OpenCLIP's weights by our names and in our shapes, some as views.

    What wrappers add to names is taken off, as is `text.` of models with a separate text tower; transformers' names
    are read too. `source` begins the message of an error.

    Raises:
        UsageError: names of parts that our towers do not have, or two tensors for one part.
    """
    found, unknown = {}, []
    for name, tensor in from_transformers(unwrapped(weights, source=source), source=source).items():
        name = name.removeprefix("text.")
        ours = _our_name(name)
        if ours is not None:
            tensor = _transposed(tensor) if name in TRANSPOSED else tensor[(None,) * LEADING_AXES.get(name, 0)]
            found[ours] = tensor.reshape(-1) if name in SCALARS else tensor
        elif name not in NO_WEIGHTS:
            unknown.append(name)
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UsageError(f"{source}: {', '.join(unknown[:3])}{more}: no such part here; {READ}")
    return found


def unwrapped(weights: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """The same tensors by their names without those of wrappers, such as `module.` and `_orig_mod.`, in any order.

    Raises:
        UsageError: two names are the same without them.
    """
    found: dict[str, Tensor] = {}
    for given, tensor in weights.items():
        name = ".".join(part for part in given.split(".") if part not in WRAPPERS)
        if name in found:
            raise UsageError(f"{source}: two tensors are named {name} but for wrappers, one of them {given}; keep one")
        found[name] = tensor
    return found


def from_transformers(weights: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """The weights of transformers' CLIPModel by OpenCLIP's names and in its shapes; other names stay as they are.

    Raises:
        UsageError: query, key and value of a block do not fit together.
    """
    found: dict[str, Tensor] = {}
    apart: dict[str, dict[str, Tensor]] = {}
    for given, tensor in weights.items():
        start = next((start for start in OF_TRANSFORMERS if given.startswith(start)), None)
        if start is None:
            found[given] = tensor
            continue
        name = OF_TRANSFORMERS[start] + given.removeprefix(start)
        one_of_three = QUERY_KEY_VALUE.fullmatch(name)
        if one_of_three is not None:
            block, letter, kind = one_of_three.groups()
            apart.setdefault(f"{block}.attn.in_proj_{kind}", {})[letter] = tensor
            continue
        for theirs, own in BLOCKS_OF_TRANSFORMERS.items():
            name = name.replace(theirs, own)
        found[name] = _transposed(tensor) if name in TRANSPOSED else tensor
    for name, parts in apart.items():
        if len(parts) < 3 or len({tensor.shape for tensor in parts.values()}) > 1 or not parts["q"].ndim:
            raise UsageError(
                f"{source}: {name}: query, key and value are not three tensors of one shape; save them again"
            )
        found[name] = torch.cat([parts[letter] for letter in "qkv"])
    return found


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.T if tensor.ndim == 2 else tensor  # of another shape it fits nowhere, which loading says


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


def as_yaml(section: ModelConfig, *, with_frequency: bool) -> str:
    """A section from `model_section` as one line of YAML, if asked for with its `frequency: null`."""
    shown: dict[str, Any] = {"embed_dim": True, "vision": {"timm", "pool"}, "text": True}
    shown |= {"frequency": True} if with_frequency else {}
    values = section.model_dump(include=shown, exclude={"text": {"dropout"}})
    return f"model: {json.dumps(values)}".replace('"', "")
