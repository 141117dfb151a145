"""What a CLIP computes apart from its weights: of our model, of OpenCLIP's configuration, and how they differ."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from mlip_cli.errors import UsageError
from mlip_cli.model.clip import CLIP
from mlip_cli.model.open_clip_weights import to_open_clip
from mlip_cli.model.text import ACTIVATIONS
from mlip_cli.types import VOCAB_SIZE

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
