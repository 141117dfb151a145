"""Weights by OpenCLIP's names, which are OpenAI's too: renamed to ours and back, and the models that they fit.

Both sides name the same tensors. Only names, transposed projections and axes of length one differ, so there and back
gives every tensor bit for bit.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import timm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mlip_cli.errors import UsageError
from mlip_cli.model.clip import CLIP
from mlip_cli.model.text import ACTIVATIONS
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
    found = {}
    for theirs, name in _open_clip_names(weights).items():
        tensor = weights[name].T if theirs in TRANSPOSED else weights[name][(0,) * LEADING_AXES.get(theirs, 0)]
        found[theirs] = (tensor.reshape(()) if theirs in SCALARS else tensor).contiguous()
    if PATCH_BIAS in weights:
        positions = found["visual.positional_embedding"].clone()
        positions[1:] += weights[PATCH_BIAS]
        found["visual.positional_embedding"] = positions
    return found


def without_counterpart(names: Iterable[str]) -> list[str]:
    """Our names that OpenCLIP's CLIP has no tensor for: frequency branch, token heads, scales of other losses."""
    shared = OUTSIDE_BLOCKS.values()
    return [name for name in names if name.startswith(ONLY_OURS) and name not in shared]


def _open_clip_names(names: Iterable[str]) -> dict[str, str]:
    """OpenCLIP's name -> ours, for the tensors that both sides have; raises UsageError for parts of neither kind."""
    tables = [{ours: theirs for theirs, ours in table.items()} for table in (BLOCKS, IN_A_BLOCK, OUTSIDE_BLOCKS)]
    left_out = {*without_counterpart(names), PATCH_BIAS}
    renamed = {name: _renamed(name, *tables) for name in names if name not in left_out}
    if unknown := [name for name, theirs in renamed.items() if theirs is None]:
        raise UsageError(f"{_some(unknown)}: OpenCLIP's ViT has no such part")
    return {theirs: name for name, theirs in renamed.items() if theirs is not None}


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

IMAGE_KEYS, TEXT_KEYS = (
    (*(f"{tower}.{name}" for name in ("width", "depth", "num_heads")), f"{tower}'s MLP width", f"{tower}'s norm eps")
    for tower in ("model.vision", "model.text")
)
"""The recipe's key, or words where no key says it, of each number that `_described` and `_built` give."""

TIMM_TOWERS = {
    (32, 768, 12, 12, 3072): "vit_base_patch32_clip_224",
    (16, 768, 12, 12, 3072): "vit_base_patch16_clip_224",
    (14, 1024, 24, 16, 4096): "vit_large_patch14_clip_224",
    (14, 1280, 32, 16, 5120): "vit_huge_patch14_clip_224",
    (14, 1408, 40, 16, 6144): "vit_giant_patch14_clip_224",
    (14, 1664, 48, 16, 8192): "vit_gigantic_patch14_clip_224",
}
"""Patch size, width, depth, number of heads and MLP width of published ViTs -> timm's name."""


def misfits(model: CLIP, configuration: Mapping[str, Any], *, source: str) -> list[str]:
    """Each way in which a model of ours computes something else than a configuration of OpenCLIP (`model_cfg`) says.

    The image size is not compared: positions can be resampled. `source` begins the message of an error.

    Raises:
        UsageError: the configuration has parts that our towers cannot have; they are named.
    """
    theirs = described_form(configuration, source=source)
    try:
        ours = built_form(model)
    except UsageError as error:
        return [str(error)]
    return [f"{key} {ours[key]} (there {value})" for key, value in theirs.items() if ours[key] != value]


def described_form(configuration: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """What the CLIP of a configuration computes: recipe key, or words where no key says it -> value.

    Raises:
        UsageError: it has parts that our towers cannot have; they are named.
    """
    vision, text = (defaults | configuration[section] for section, defaults in DEFAULTS.items())
    strange = [key for key in configuration if key not in TOP_KEYS]
    strange += [*_strange("vision_cfg", vision), *_strange("text_cfg", text)]
    if strange:
        raise UsageError(f"{source}: {', '.join(strange)}: no such part here; {READ}")
    activation = "quick_gelu" if configuration.get("quick_gelu") else "gelu"
    return {
        "model.embed_dim": configuration["embed_dim"],
        "model.vision.patch_size": vision["patch_size"],
        "model.vision's norm before its blocks": not vision["no_ln_pre"],
        **dict(zip(IMAGE_KEYS, _described(vision, num_heads=vision["width"] // vision["head_width"]), strict=True)),
        "model.vision's activation": activation,
        "model.text.context_length": text["context_length"],
        **dict(zip(TEXT_KEYS, _described(text, num_heads=text["heads"]), strict=True)),
        "model.text.activation": activation,
    }


def built_form(model: CLIP) -> dict[str, Any]:
    """What our model computes, by the keys of `described_form`: without the parts that OpenCLIP does not have.

    Raises:
        UsageError: an image tower that is not a plain ViT with a class token.
    """
    _open_clip_names(model.state_dict())  # refuses other parts
    trunk = model.vision.trunk
    if trunk.global_pool != "token" or trunk.no_embed_class:
        raise UsageError(
            f"model.vision: pools by {trunk.global_pool!r}; OpenCLIP's ViT pools by a class token with a position"
        )
    image, text = list(trunk.blocks), list(model.text.blocks)
    return {
        "model.embed_dim": model.image_projection.out_features,
        "model.vision.patch_size": model.vision.patch_size,
        "model.vision's norm before its blocks": not isinstance(trunk.norm_pre, nn.Identity),
        **dict(zip(IMAGE_KEYS, _built(trunk.norm, image), strict=True)),
        "model.vision's activation": _activation(image[0]),
        "model.text.context_length": model.context_length,
        **dict(zip(TEXT_KEYS, _built(model.text.norm, text), strict=True)),
        "model.text.activation": _activation(text[0]),
    }


def _described(tower: Mapping[str, Any], *, num_heads: int) -> tuple[int | float, ...]:
    eps = (tower["norm_kwargs"] or {}).get("eps", NORM_EPS)
    return tower["width"], tower["layers"], num_heads, int(tower["width"] * tower["mlp_ratio"]), eps


def _built(norm: nn.LayerNorm, blocks: Sequence[Block]) -> tuple[int | float, ...]:
    attention, mlp_width = blocks[0].attn, blocks[0].mlp.fc1.out_features
    return attention.num_heads * attention.head_dim, len(blocks), attention.num_heads, mlp_width, norm.eps


def _activation(block: Block) -> str:
    kind = type(block.mlp.act)
    return next((word for word, known in ACTIVATIONS.items() if known is kind), kind.__name__)


def _strange(section: str, tower: Mapping[str, Any]) -> list[str]:
    """Keys of a section, with their values, that describe no tower of ours."""
    found = []
    for key, value in tower.items():
        if key in DEFAULTS[section]:
            is_ours = not isinstance(value, list) and (key != "vocab_size" or value == VOCAB_SIZE)
        else:
            is_ours = not value or key in NO_EFFECT or value in NEUTRAL.get(key, ())
        if not is_ours:
            found.append(f"{section}.{key} {value}")
    norms = tower["norm_kwargs"] or {}
    return found + [f"{section}.norm_kwargs.{key} {value}" for key, value in norms.items() if key != "eps"]


def fitting_recipe(configuration: Mapping[str, Any], *, source: str) -> str | None:
    """The recipe's section `model` that has the form of a configuration, as YAML; None if we know no such tower."""
    form = described_form(configuration, source=source)
    image = {name: form[f"model.vision.{name}"] for name in ("patch_size", "width", "depth", "num_heads")}
    text = {
        name: form[f"model.text.{name}"] for name in ("width", "depth", "num_heads", "context_length", "activation")
    }
    mlp_width, quick = form["model.vision's MLP width"], text["activation"] == "quick_gelu"
    norms = form["model.vision's norm before its blocks"], form["model.vision's norm eps"]
    if norms == (False, 1e-6) and not quick and mlp_width == 4 * image["width"]:
        vision = _yaml(image)
    else:
        name = TIMM_TOWERS.get((*image.values(), mlp_width), "") if norms == (True, NORM_EPS) else ""
        name = name.replace("_clip_", "_clip_quickgelu_") if quick else name
        if not timm.is_model(name):
            return None
        vision = _yaml({"timm": name})
    return f"model: {_yaml({'embed_dim': form['model.embed_dim'], 'vision': vision, 'text': _yaml(text)})}"


def _yaml(values: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in values.items()) + "}"
