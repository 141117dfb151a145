"""Weights between OpenCLIP's names, which are OpenAI's too, and ours: state dict -> state dict, both ways.

Both name the same tensors; what differs is the names, transposed projections and axes of length one. So there and back
gives every tensor bit for bit. What only one side has is named here.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mlip_cli.errors import UsageError
from mlip_cli.model.clip import CLIP
from mlip_cli.model.text import ACTIVATIONS
from mlip_cli.types import VOCAB_SIZE

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


IN_OPEN_CLIP: dict[str, dict[str, Any]] = {
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
"""Keys of OpenCLIP's configurations that are read, with its defaults."""
NEUTRAL = {"pool_type": ("tok", "argmax"), "pos_embed_type": ("learnable",), "proj_type": ("linear",)}
"""Values of other keys that say what we do anyway, besides null and false."""
WITHOUT_EFFECT = ("patch_dropout", "output_tokens", "pad_id", "eos_id")
"""Keys that change neither weights nor features where the others are as we read them."""
NAMES_AND_STARTING_VALUES = ("custom_text", "nonscalar_logit_scale", "init_logit_scale", "init_logit_bias")
AT_THE_TOP = ("embed_dim", "quick_gelu", *IN_OPEN_CLIP, *NAMES_AND_STARTING_VALUES)

NORM_EPS = 1e-5
"""PyTorch's default, which OpenCLIP keeps where `norm_kwargs` says nothing."""


@dataclass(frozen=True)
class Blocks:
    """The transformer inside a tower."""

    width: int
    depth: int
    num_heads: int
    mlp_width: int
    activation: str
    """`gelu` or `quick_gelu`."""
    norm_eps: float


@dataclass(frozen=True)
class Architecture:
    """A CLIP of a plain ViT with a class token and a causal text transformer."""

    embed_dim: int
    image_size: int
    """That of the configuration; another one only resamples the positions."""
    patch_size: int
    norm_pre: bool
    """True with a LayerNorm before the first block."""
    image: Blocks
    context_length: int
    text: Blocks


def of_open_clip(config: dict[str, Any]) -> Architecture:
    """The architecture that a configuration of OpenCLIP (`model_cfg`) describes.

    Raises:
        UsageError: it has parts that our towers cannot have; they are named.
    """
    strange = [key for key in config if key not in AT_THE_TOP]
    for section, known in IN_OPEN_CLIP.items():
        strange += [
            f"{section}.{key} {value}"
            for key, value in config[section].items()
            if key not in known and key not in WITHOUT_EFFECT and value and value not in NEUTRAL.get(key, ())
        ]
    vision = IN_OPEN_CLIP["vision_cfg"] | config["vision_cfg"]
    text = IN_OPEN_CLIP["text_cfg"] | config["text_cfg"]
    strange += [f"vision_cfg.{k} {vision[k]}" for k in ("layers", "image_size") if not isinstance(vision[k], int)]
    strange += [
        f"{section}.norm_kwargs.{key} {value}"
        for section, tower in (("vision_cfg", vision), ("text_cfg", text))
        for key, value in (tower["norm_kwargs"] or {}).items()
        if key != "eps"
    ]
    if text["vocab_size"] != VOCAB_SIZE:
        strange.append(f"text_cfg.vocab_size {text['vocab_size']}")
    if strange:
        raise UsageError(
            f"{', '.join(strange)}: no such part here; what is read are ViTs that pool by a class token, with causal "
            "text transformers over CLIP's vocabulary"
        )
    activation = "quick_gelu" if config.get("quick_gelu") else "gelu"
    return Architecture(
        embed_dim=config["embed_dim"],
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        norm_pre=not vision["no_ln_pre"],
        image=_configured(vision, activation, num_heads=vision["width"] // vision["head_width"]),
        context_length=text["context_length"],
        text=_configured(text, activation, num_heads=text["heads"]),
    )


def _configured(tower: dict[str, Any], activation: str, *, num_heads: int) -> Blocks:
    return Blocks(
        width=tower["width"],
        depth=tower["layers"],
        num_heads=num_heads,
        mlp_width=int(tower["width"] * tower["mlp_ratio"]),
        activation=activation,
        norm_eps=(tower["norm_kwargs"] or {}).get("eps", NORM_EPS),
    )


def of_model(model: CLIP) -> Architecture:
    """The architecture of our model, without what is only ours: frequency branch, token heads, merging.

    Raises:
        UsageError: an image tower that is no plain ViT with a class token.
    """
    to_open_clip({name: tensor.to("meta") for name, tensor in model.state_dict().items()})  # refuses other parts
    trunk = model.vision.trunk
    if trunk.global_pool != "token" or trunk.no_embed_class:
        raise UsageError(
            f"model.vision: pools by {trunk.global_pool!r}, and OpenCLIP's ViT by its class token, which has a position"
        )
    return Architecture(
        embed_dim=model.image_projection.out_features,
        image_size=model.image_size,
        patch_size=model.vision.patch_size,
        norm_pre=_has_norm_pre(trunk),
        image=_built("model.vision", trunk.norm, list(trunk.blocks)),
        context_length=model.context_length,
        text=_built("model.text", model.text.norm, list(model.text.blocks)),
    )


def _has_norm_pre(trunk: VisionTransformer) -> bool:
    return not isinstance(trunk.norm_pre, nn.Identity)


def _built(place: str, norm: nn.LayerNorm, blocks: list[Block]) -> Blocks:
    attention, mlp = blocks[0].attn, blocks[0].mlp
    words = {kind: word for word, kind in ACTIVATIONS.items()}
    if type(mlp.act) not in words:
        raise UsageError(f"{place}: activation {type(mlp.act).__name__}; OpenCLIP has GELU and QuickGELU")
    return Blocks(
        width=attention.num_heads * attention.head_dim,
        depth=len(blocks),
        num_heads=attention.num_heads,
        mlp_width=mlp.fc1.out_features,
        activation=words[type(mlp.act)],
        norm_eps=norm.eps,
    )


def differences(ours: Architecture, theirs: Architecture) -> Iterator[tuple[str, Any, Any]]:
    """(Recipe key or words for what a tower of timm brings along, our value, theirs), but for the image size."""
    pairs = [
        ("model.embed_dim", ours.embed_dim, theirs.embed_dim),
        ("model.vision.patch_size", ours.patch_size, theirs.patch_size),
        ("model.vision's norm before its blocks", ours.norm_pre, theirs.norm_pre),
        *_of_blocks("model.vision", "model.vision's activation", ours.image, theirs.image),
        ("model.text.context_length", ours.context_length, theirs.context_length),
        *_of_blocks("model.text", "model.text.activation", ours.text, theirs.text),
    ]
    return ((key, mine, other) for key, mine, other in pairs if mine != other)


def _of_blocks(tower: str, activation: str, ours: Blocks, theirs: Blocks) -> list[tuple[str, Any, Any]]:
    """(Key or words, our value, theirs) of everything in the transformer of the section `tower`."""
    keys = {name: f"{tower}.{name}" for name in ("width", "depth", "num_heads")}
    keys |= {"mlp_width": f"{tower}'s MLP width", "activation": activation, "norm_eps": f"{tower}'s norm eps"}
    return [(key, getattr(ours, name), getattr(theirs, name)) for name, key in keys.items()]


def fitting_recipe(architecture: Architecture) -> str | None:
    """The section of a recipe that gives this architecture, as YAML; None where no tower of ours has its form."""
    image, text = architecture.image, architecture.text
    by_sizes = not architecture.norm_pre and replace(image, activation="gelu", norm_eps=1e-6) == image
    if by_sizes and image.mlp_width == 4 * image.width:
        vision = (
            f"patch_size: {architecture.patch_size}, width: {image.width}, depth: {image.depth}, "
            f"num_heads: {image.num_heads}"
        )
    else:
        name = timm_tower(architecture)
        if name is None:
            return None
        vision = f"timm: {name}"
    return (
        f"model: {{embed_dim: {architecture.embed_dim}, vision: {{{vision}}}, "
        f"text: {{width: {text.width}, depth: {text.depth}, num_heads: {text.num_heads}, "
        f"context_length: {architecture.context_length}, activation: {text.activation}}}}}"
    )


def timm_tower(architecture: Architecture) -> str | None:
    """Name of timm's tower of this form, one for its image size if there is one; None if timm has none."""
    names = [
        name
        for name in timm.list_models(f"vit_*_patch{architecture.patch_size}_*clip*")
        if ("quickgelu" in name) == (architecture.image.activation == "quick_gelu")
    ]
    names.sort(key=lambda name: not name.endswith(f"_{architecture.image_size}"))
    return next((name for name in names if _is_tower(name, architecture)), None)


def _is_tower(name: str, architecture: Architecture) -> bool:
    with torch.device("meta"):
        trunk = timm.create_model(name, num_classes=0)
    if type(trunk) is not VisionTransformer or _has_norm_pre(trunk) != architecture.norm_pre:
        return False
    return _built(name, trunk.norm, list(trunk.blocks)) == architecture.image
