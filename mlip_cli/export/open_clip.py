"""Write a model in OpenCLIP's layout: `open_clip.create_model_and_transforms("local-dir:FOLDER")` loads it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.layers import PatchEmbed
from timm.layers.activations import QuickGELU
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mlip_cli.errors import UsageError
from mlip_cli.export.tokenizer import write_tokenizer
from mlip_cli.files import write_json
from mlip_cli.model.clip import CLIP
from mlip_cli.model.open_clip import to_open_clip
from mlip_cli.model.vision import ObservedBlock, is_observable
from mlip_cli.recipe.config import Recipe, Text
from mlip_cli.runs.foreign import OPEN_CLIP_CONFIG, WEIGHTS_OF_OPEN_CLIP
from mlip_cli.runs.loading import LoadedRun
from mlip_cli.terminal.output import plural

NOT_IN = "use --format onnx or safetensors, which hold every model"


@dataclass(frozen=True)
class PlainTower:
    """An image tower that is a ViT with a class token, as OpenCLIP's and transformers' own classes are."""

    width: int
    depth: int
    num_heads: int
    mlp_width: int
    patch_size: int
    activation: str
    eps: float
    has_pre_norm: bool
    has_layer_scale: bool
    norms_mean: bool
    """The mean of the patches is pooled, and normed behind that; otherwise the class token."""


def plain_tower(trunk: VisionTransformer) -> PlainTower | None:
    """The form of a trunk, if it is one of these; None otherwise."""
    norms_mean = trunk.global_pool == "avg" and not isinstance(trunk.fc_norm, nn.Identity)
    pools_class = trunk.global_pool == "token" and isinstance(trunk.fc_norm, nn.Identity)
    blocks = list(trunk.blocks)
    is_plain = (
        trunk.cls_token is not None
        and trunk.num_prefix_tokens == 1
        and (norms_mean or pools_class)
        and not trunk.no_embed_class
        and all(isinstance(block, Block) and _is_plain(block) for block in blocks)
        and type(trunk.patch_embed) is PatchEmbed
        and isinstance(trunk.patch_embed.norm, nn.Identity)
    )
    if not is_plain:
        return None
    first = blocks[0]
    return PlainTower(
        width=trunk.embed_dim,
        depth=len(blocks),
        num_heads=first.attn.num_heads,
        mlp_width=first.mlp.fc1.out_features,
        patch_size=trunk.patch_embed.patch_size[0],
        activation=activation_of(first.mlp.act),
        eps=first.norm1.eps,
        has_pre_norm=isinstance(trunk.norm_pre, nn.LayerNorm),
        has_layer_scale=hasattr(first.ls1, "gamma"),
        norms_mean=norms_mean,
    )


def _is_plain(block: Block) -> bool:
    attention = block.attn
    plain_attention = is_observable(block) or isinstance(block, ObservedBlock)
    return plain_attention and attention.qkv.bias is not None and isinstance(attention.q_norm, nn.Identity)


def activation_of(module: nn.Module) -> str:
    """The recipe's word for an activation; "" if it has none."""
    if isinstance(module, QuickGELU):
        return "quick_gelu"
    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return {"GELU": "gelu", "GELUTanh": "gelu_tanh"}.get(type(module).__name__, "")


def refused(format: str, why: str) -> UsageError:
    """The error of a model that a format cannot hold."""
    return UsageError(f"--format {format}: {why}; {NOT_IN}")


def without_stem(model: CLIP, format: str) -> None:
    """Check that the image tower is a plain ViT.

    Raises:
        UsageError: its first blocks are spectral.
    """
    if model.vision.stem_depth:
        raise refused(format, f"the image tower begins with {plural(model.vision.stem_depth, 'spectral block')}")


def not_held(recipe: Recipe, model: CLIP) -> list[str]:
    """Lines on what a format of plain CLIPs does not hold of a model."""
    lost = []
    if model.frequency is not None:
        lost.append("the frequency branch and its feature")
    if len(model.token_projections):
        lost.append("the heads of the losses over words and tokens")
    if model.plan.at:
        lost.append(f"token merging (evaluation here merges at the rate {model.plan.rate:.3f})")
    return lost


def configuration(loaded: LoadedRun) -> dict[str, Any]:
    """OpenCLIP's configuration of a model: model_cfg and preprocess_cfg.

    Raises:
        UsageError: OpenCLIP has no such model.
    """
    recipe, model = loaded.recipe, loaded.model
    without_stem(model, "open_clip")
    vision, is_quick = _vision(recipe, model)
    text = _text(recipe.model.text)
    bias = dict(model.logit_biases.items()).get("spatial_global")
    is_custom = (
        "timm_model_name" in vision or text["no_causal_mask"] or text["proj_bias"] or "hf_tokenizer_name" in text
    )
    return {
        "model_cfg": {
            "embed_dim": recipe.model.embed_dim,
            **({"quick_gelu": True} if is_quick else {}),
            **({"custom_text": True} if is_custom else {}),
            **({"init_logit_bias": float(bias)} if bias is not None else {}),
            "vision_cfg": vision,
            "text_cfg": text,
        },
        "preprocess_cfg": {
            "mean": list(recipe.data.pixel_mean),
            "std": list(recipe.data.pixel_std),
            "interpolation": "bicubic",
            "resize_mode": "squash" if recipe.data.resize == "squash" else "shortest",
        },
    }


def _vision(recipe: Recipe, model: CLIP) -> tuple[dict[str, Any], bool]:
    """vision_cfg, and whether the whole model has QuickGELU."""
    size, own = recipe.data.image_size, recipe.model.vision
    text_quick = recipe.model.text.activation == "quick_gelu"
    plain = plain_tower(model.vision.trunk)
    if plain is not None and own.projection == "linear":
        if text_quick != (plain.activation == "quick_gelu"):
            raise refused(
                "open_clip", f"activations {plain.activation} and {recipe.model.text.activation} in one model"
            )
        section: dict[str, Any] = {
            "image_size": size,
            "layers": plain.depth,
            "width": plain.width,
            "head_width": plain.width // plain.num_heads,
            "patch_size": plain.patch_size,
            "mlp_ratio": plain.mlp_width / plain.width,
            "no_ln_pre": not plain.has_pre_norm,
            "norm_kwargs": {"eps": plain.eps},
        }
        if plain.has_layer_scale:
            section["ls_init_value"] = 1e-5  # any number: the weights have the factors
        if plain.norms_mean:
            section |= {"pool_type": "avg", "final_ln_after_pool": True}
        if plain.activation == "gelu_tanh":
            section["act_kwargs"] = {"approximate": "tanh"}
        return section, text_quick
    if own.timm is None:
        raise refused("open_clip", f"model.vision.pool {own.pool} of a tower without a name of timm")
    return _timm_vision(own.timm, own.projection, size, model), text_quick


def _timm_vision(name: str, projection: str, size: int, model: CLIP) -> dict[str, Any]:
    with torch.device("meta"):
        there = timm.create_model(name, num_classes=0)
    trunk = model.vision.trunk
    usual = there.patch_embed.img_size[0]
    if usual != size:
        raise refused("open_clip", f"{name} at {size} px, where OpenCLIP builds it for {usual}")
    return {
        "image_size": size,
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": trunk.global_pool,
        "timm_proj": "none" if projection == "none" else "linear",
        "timm_proj_bias": projection == "with_bias",
    }


def _text(text: Text) -> dict[str, Any]:
    tokenizer = text.tokenizer
    section: dict[str, Any] = {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "heads": text.num_heads,
        "layers": text.depth,
        "mlp_ratio": text.mlp_ratio,
        "norm_kwargs": {"eps": text.norm_eps},
        "no_causal_mask": not text.causal,
        "proj_bias": text.projection == "with_bias",
        "pool_type": "last" if text.pool == "last" else "argmax" if text.eos_id is None else "eos",
    }
    if text.eos_id is not None:
        section["eos_id"] = text.eos_id
    if text.projection == "none":
        section["proj_type"] = "none"
    if text.activation == "gelu_tanh":
        section["act_kwargs"] = {"approximate": "tanh"}
    if tokenizer is not None:
        section["hf_tokenizer_name"] = "."
        section["tokenizer_kwargs"] = {"clean": tokenizer.clean} | (
            {"strip_sep_token": True} if tokenizer.zero_id is not None else {}
        )
    return section


def write_open_clip(loaded: LoadedRun, folder: Path) -> list[str]:
    """Write configuration, weights and tokenizer into `folder`; return what OpenCLIP's format does not hold.

    Raises:
        UsageError: OpenCLIP has no such model.
    """
    described = configuration(loaded)
    section = described["model_cfg"]
    weights = to_open_clip(
        loaded.model.state_dict(),
        of_timm="timm_model_name" in section["vision_cfg"],
        custom_text=section.get("custom_text", False),
    )
    write_json(folder / OPEN_CLIP_CONFIG, described)
    save_weights(weights, folder / WEIGHTS_OF_OPEN_CLIP[0])
    write_tokenizer(loaded.recipe.model.text, folder)
    return not_held(loaded.recipe, loaded.model)


def save_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file, with the mark that transformers asks for."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def loaded_by_open_clip(folder: Path) -> tuple[Any, Any]:
    """The model and the tokenizer that OpenCLIP makes of a folder."""
    import open_clip

    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return model.eval(), open_clip.get_tokenizer(f"local-dir:{folder}")
