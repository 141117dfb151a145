"""The models that others' configurations describe, as sections of a recipe: those of OpenCLIP and of transformers."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlip_cli.errors import UsageError
from mlip_cli.recipe.config import VOCAB_SIZE, Activation, Clean, Data, Model, Projection, Text, Vision

READ = (
    "mlip reads ViTs with a class token, a mean or an attention pooling, and text transformers that are causal or "
    "attend both ways"
)
SIGLIP_PIXEL = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class WantedTokenizer:
    """A tokenizer that is not CLIP's."""

    name: str
    """Where it is published."""
    clean: Clean = "whitespace"
    zeroes_separator: bool = False


@dataclass(frozen=True)
class Architecture:
    """A model that somebody else describes."""

    model: Model
    """Without the tokenizer, whose file the configuration does not know."""
    data: Data
    """Image size, and how pictures become pixels."""
    is_sigmoid: bool = False
    """Whether its loss is SigLIP's, so that the weights have a bias."""
    tokenizer: WantedTokenizer | None = None
    notes: tuple[str, ...] = ()
    """What of its preprocessing mlip does otherwise."""


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
WITH_QUICKGELU = ("base_patch32_clip", "base_patch16_clip", "large_patch14", "huge_patch14", "gigantic_patch14")
"""Those that timm also has with QuickGELU."""

VISION = {
    "layers": 12,
    "width": 768,
    "head_width": 64,
    "mlp_ratio": 4.0,
    "patch_size": 16,
    "image_size": 224,
    "ls_init_value": None,
    "no_ln_pre": False,
    "pool_type": "tok",
    "final_ln_after_pool": False,
    "act_kwargs": None,
    "norm_kwargs": None,
}
TIMM_VISION = {
    "timm_model_name": None,
    "timm_model_pretrained": False,
    "timm_pool": "avg",
    "timm_proj": "linear",
    "timm_proj_bias": False,
    "timm_drop": 0.0,
    "timm_drop_path": None,
    "image_size": 224,
}
TEXT = {
    "context_length": 77,
    "vocab_size": VOCAB_SIZE,
    "hf_tokenizer_name": None,
    "tokenizer_kwargs": None,
    "width": 512,
    "heads": 8,
    "layers": 12,
    "mlp_ratio": 4.0,
    "eos_id": 2,
    "no_causal_mask": False,
    "pool_type": "argmax",
    "proj_bias": False,
    "proj_type": "linear",
    "act_kwargs": None,
    "norm_kwargs": None,
}
"""Keys of OpenCLIP's configurations that are read, with OpenCLIP's defaults."""
TOP = ("embed_dim", "quick_gelu", "init_logit_scale", "init_logit_bias", "custom_text", "vision_cfg", "text_cfg")
NOT_HERE: dict[str, object] = {"ls_init_value": None, "final_ln_after_pool": False, "pad_id": 0}
"""Keys that change nothing at these values."""
KWARGS: dict[str, dict[str, Collection[str] | None]] = {
    "act_kwargs": {"approximate": ("tanh", "none")},
    "norm_kwargs": {"eps": None},
}


def of_open_clip(configuration: Mapping[str, Any], *, source: str) -> Architecture:
    """The model that a configuration of OpenCLIP (`model_cfg`) describes. `source` begins the message of an error.

    Raises:
        UsageError: it has parts that our towers do not have.
    """
    vision, text = dict(configuration.get("vision_cfg", {})), dict(configuration.get("text_cfg", {}))
    is_timm = bool(vision.get("timm_model_name"))
    vision_defaults: dict[str, Any] = TIMM_VISION if is_timm else VISION
    strange = [
        *(f"{key} {value}" for key, value in configuration.items() if key not in TOP),
        *_strange(vision, vision_defaults, "vision_cfg"),
        *_strange(text, TEXT, "text_cfg"),
    ]
    vision, text = vision_defaults | vision, TEXT | text
    if is_timm and vision["timm_proj"] not in ("linear", "none", "", None):
        strange.append(f"vision_cfg.timm_proj {vision['timm_proj']}")
    if text["pool_type"] not in ("argmax", "eos", "last"):
        strange.append(f"text_cfg.pool_type {text['pool_type']}")
    if not is_timm and (vision["pool_type"], vision["final_ln_after_pool"]) not in (("tok", False), ("avg", True)):
        strange.append(f"vision_cfg.pool_type {vision['pool_type']}")
    if strange:
        raise UsageError(f"{source}: {', '.join(strange)}: no such part here; {READ}")
    is_quick = bool(configuration.get("quick_gelu"))
    siglip = configuration.get("init_logit_bias") is not None
    tower = _timm_vision(vision) if is_timm else _open_clip_vision(vision, is_quick)
    pixels: dict[str, Any] = {"pixel_mean": SIGLIP_PIXEL, "pixel_std": SIGLIP_PIXEL, "resize": "squash"}
    return Architecture(
        Model(embed_dim=configuration["embed_dim"], vision=tower, text=_open_clip_text(text, is_quick)),
        Data(train=(), image_size=_side(vision["image_size"], source), **(pixels if siglip else {})),
        is_sigmoid=siglip,
        tokenizer=_open_clip_tokenizer(text),
    )


def _strange(given: Mapping[str, Any], known: Mapping[str, Any], section: str) -> Iterator[str]:
    for key, value in given.items():
        is_list = isinstance(value, list) and key != "image_size"  # a ResNet has a list of layers
        is_known = key in known or (key in NOT_HERE and NOT_HERE[key] == value)
        if is_list or not is_known or (key in KWARGS and not _all_known(KWARGS[key], value or {})):
            yield f"{section}.{key} {value}"


def _all_known(known: Mapping[str, Collection[str] | None], given: Mapping[str, Any]) -> bool:
    """Whether each value is one that is known for its key; None: any number is."""
    return all(
        key in known and (isinstance(value, int | float) if (values := known[key]) is None else value in values)
        for key, value in given.items()
    )


def _side(size: object, source: str) -> int:
    sides = size if isinstance(size, list | tuple) else [size]
    if len(set(sides)) != 1 or not isinstance(sides[0], int):
        raise UsageError(f"{source}: vision_cfg.image_size {size}: mlip reads square pictures only")
    return sides[0]


def _activation(section: Mapping[str, Any], is_quick: bool) -> Activation:
    if is_quick:
        return "quick_gelu"
    return "gelu_tanh" if (section["act_kwargs"] or {}).get("approximate") == "tanh" else "gelu"


def _open_clip_vision(vision: Mapping[str, Any], is_quick: bool) -> Vision:
    width, heads = vision["width"], vision["width"] // vision["head_width"]
    eps = (vision["norm_kwargs"] or {}).get("eps", 1e-5)
    activation, pools_mean = _activation(vision, is_quick), vision["pool_type"] == "avg"
    form = vision["patch_size"], width, vision["layers"], heads, int(width * vision["mlp_ratio"])
    name = TIMM_TOWERS.get(form)
    is_published = (eps, vision["no_ln_pre"], vision["ls_init_value"], pools_mean) == (1e-5, False, None, False)
    if name is not None and is_published and activation == "gelu":
        return Vision(timm=name)
    if name is not None and is_published and is_quick and any(own in name for own in WITH_QUICKGELU):
        return Vision(timm=name.replace("_clip_", "_clip_quickgelu_"))
    return Vision(
        patch_size=vision["patch_size"],
        width=width,
        depth=vision["layers"],
        num_heads=heads,
        mlp_ratio=float(vision["mlp_ratio"]),
        activation=activation,
        norm_eps=float(eps),
        pre_norm=not vision["no_ln_pre"],
        layer_scale=vision["ls_init_value"],
        pool="mean_then_norm" if pools_mean else None,
    )


def _timm_vision(vision: Mapping[str, Any]) -> Vision:
    """OpenCLIP's wrapper of timm: without a `timm_proj` the trunk's own classifier, which has a bias, projects."""
    projection: Projection = "none" if vision["timm_proj"] == "none" else "with_bias"
    if vision["timm_proj"] == "linear" and not vision["timm_proj_bias"]:
        projection = "linear"
    return Vision(timm=vision["timm_model_name"], projection=projection)


def _open_clip_text(text: Mapping[str, Any], is_quick: bool) -> Text:
    projection: Projection = "with_bias" if text["proj_bias"] else "linear"
    return Text(
        width=text["width"],
        depth=text["layers"],
        num_heads=text["heads"],
        context_length=text["context_length"],
        vocab_size=text["vocab_size"],
        mlp_ratio=float(text["mlp_ratio"]),
        activation=_activation(text, is_quick),
        norm_eps=float((text["norm_kwargs"] or {}).get("eps", 1e-5)),
        causal=not text["no_causal_mask"],
        pool="last" if text["pool_type"] == "last" else "eos",
        eos_id=text["eos_id"] if text["pool_type"] == "eos" else None,
        projection="none" if text["proj_type"] == "none" else projection,
    )


def _open_clip_tokenizer(text: Mapping[str, Any]) -> WantedTokenizer | None:
    name, options = text["hf_tokenizer_name"], text["tokenizer_kwargs"] or {}
    if name is None:
        return None
    return WantedTokenizer(name, options.get("clean", "whitespace"), bool(options.get("strip_sep_token")))


ACTIVATIONS_OF_TRANSFORMERS: dict[str, Activation] = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
OF_CLIP: dict[str, dict[str, Any]] = {
    "vision_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "text_config": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
}
OF_SIGLIP: dict[str, dict[str, Any]] = {
    "vision_config": OF_CLIP["vision_config"]
    | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    "text_config": OF_CLIP["text_config"]
    | {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "vocab_size": 32_000,
        "max_position_embeddings": 64,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
}
"""Keys of transformers' CLIPConfig and SiglipConfig, with their defaults."""
TRANSFORMERS = {"clip": OF_CLIP, "siglip": OF_SIGLIP}


def of_transformers(configuration: Mapping[str, Any], preprocessor: Mapping[str, Any], *, source: str) -> Architecture:
    """The model of a config.json of CLIPModel or SiglipModel, with the preprocessor_config.json beside it.

    Raises:
        UsageError: another kind of model, or an activation that our towers do not have.
    """
    kind = str(configuration.get("model_type"))
    if kind not in TRANSFORMERS:
        raise UsageError(f"{source}: model_type {kind}: mlip reads {' and '.join(TRANSFORMERS)} of transformers")
    vision, text = (
        defaults | dict(configuration.get(section) or {}) for section, defaults in TRANSFORMERS[kind].items()
    )
    for section, own in (("vision_config", vision), ("text_config", text)):
        if own["hidden_act"] not in ACTIVATIONS_OF_TRANSFORMERS:
            raise UsageError(f"{source}: {section}.hidden_act {own['hidden_act']}: no such activation here")
    is_siglip = kind == "siglip"
    embed_dim = vision["hidden_size"] if is_siglip else configuration.get("projection_dim", 512)
    shared = "vision", "text"
    towers = {
        name: {
            "width": own["hidden_size"],
            "depth": own["num_hidden_layers"],
            "num_heads": own["num_attention_heads"],
            "mlp_ratio": own["intermediate_size"] / own["hidden_size"],
            "activation": ACTIVATIONS_OF_TRANSFORMERS[own["hidden_act"]],
            "norm_eps": float(own["layer_norm_eps"]),
        }
        for name, own in zip(shared, (vision, text), strict=True)
    }
    return Architecture(
        Model(
            embed_dim=embed_dim,
            vision=Vision(
                patch_size=vision["patch_size"],
                pre_norm=not is_siglip,
                pool="map" if is_siglip else None,
                projection="none" if is_siglip else "linear",
                **towers["vision"],
            ),
            text=Text(
                context_length=text["max_position_embeddings"],
                vocab_size=text["vocab_size"],
                causal=not is_siglip,
                pool="last" if is_siglip else "eos",
                projection="with_bias" if is_siglip else "linear",
                **towers["text"],
            ),
        ),
        _pixels(Data(train=(), image_size=vision["image_size"]), preprocessor, is_siglip),
        is_sigmoid=is_siglip,
        tokenizer=WantedTokenizer("its repository", "canonicalize") if is_siglip else None,
    )


def _pixels(data: Data, preprocessor: Mapping[str, Any], is_siglip: bool) -> Data:
    own: dict[str, Any] = {"pixel_mean": SIGLIP_PIXEL, "pixel_std": SIGLIP_PIXEL} if is_siglip else {}
    for key, theirs in (("pixel_mean", "image_mean"), ("pixel_std", "image_std")):
        if theirs in preprocessor:
            own[key] = tuple(map(float, preprocessor[theirs]))
    size = preprocessor.get("size")
    has_both_sides = is_siglip if size is None else isinstance(size, Mapping) and "height" in size
    crops = preprocessor.get("do_center_crop", not is_siglip)
    return _with_pixels(data, own | {"resize": "squash" if has_both_sides and not crops else "crop"})


def _with_pixels(data: Data, own: Mapping[str, Any]) -> Data:
    """Validated as a recipe's section is."""
    return Data.model_validate(data.model_dump() | dict(own))


def with_preprocessing(architecture: Architecture, preprocess: Mapping[str, Any]) -> Architecture:
    """With the pixels of OpenCLIP's `preprocess_cfg`, or of an entry of its table of published weights."""
    own: dict[str, Any] = {}
    for key, theirs in (("pixel_mean", "mean"), ("pixel_std", "std")):
        if preprocess.get(theirs) is not None:
            own[key] = tuple(map(float, preprocess[theirs]))
    notes = []
    filter, resize = preprocess.get("interpolation") or "bicubic", preprocess.get("resize_mode") or "shortest"
    if filter not in ("bicubic", "random"):
        notes.append(f"its pictures were resized by the filter {filter}; mlip resizes by bicubic")
    if resize == "squash":
        own["resize"] = "squash"
    elif resize == "shortest":
        own["resize"] = "crop"
    else:
        notes.append(f"its pictures were resized by resize_mode {resize}; mlip resizes the short side and crops")
    data = _with_pixels(architecture.data, own)
    return replace(architecture, data=data, notes=(*architecture.notes, *notes))
