"""Write a model in the layout of transformers: `CLIPModel.from_pretrained(FOLDER)` or `SiglipModel` loads it."""

from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mlip_cli.data.packages import open_clip_module
from mlip_cli.export.open_clip import activation_of, not_held, plain_tower, refused, without_stem
from mlip_cli.export.tokenizer import write_tokenizer
from mlip_cli.files import write_json
from mlip_cli.model.clip import CLIP
from mlip_cli.model.open_clip import to_transformers
from mlip_cli.recipe.architecture import ACTIVATIONS_OF_TRANSFORMERS
from mlip_cli.recipe.config import Recipe
from mlip_cli.runs.loading import LoadedRun

FORMAT = "huggingface"
THEIR_ACTIVATIONS: dict[str, str] = {ours: theirs for theirs, ours in ACTIVATIONS_OF_TRANSFORMERS.items()}
BICUBIC = 3
"""Pillow's number of the filter."""


def write_transformers(loaded: LoadedRun, folder: Path) -> list[str]:
    """Write configuration, weights, tokenizer and preprocessing into `folder`; return what the format does not hold.

    Raises:
        UsageError: neither CLIPModel nor SiglipModel has this form.
    """
    model = _empty(loaded)
    model.load_state_dict(to_transformers(loaded.model.state_dict()), strict=True)
    model.save_pretrained(folder)
    _write_tokenizer(loaded.recipe, folder)
    _write_preprocessing(loaded.recipe, folder)
    return not_held(loaded.recipe, loaded.model)


def loaded_by_transformers(folder: Path) -> tuple[Any, Any]:
    """The model and the tokenizer that transformers makes of a folder."""
    transformers = _transformers()
    return transformers.AutoModel.from_pretrained(folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)


def _transformers() -> Any:
    """The package, without its bars of progress."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


def _is_siglip(trunk: VisionTransformer) -> bool:
    return trunk.global_pool == "map"


def _empty(loaded: LoadedRun) -> Any:
    """A CLIPModel or SiglipModel of the form of a model, with random weights."""
    transformers = _transformers()
    recipe, model = loaded.recipe, loaded.model
    text_tower: Any = model.text
    without_stem(model, FORMAT)
    is_siglip = _is_siglip(model.vision.trunk)
    text = {
        **(_siglip_text(recipe) if is_siglip else _clip_text(recipe)),
        "hidden_size": model.text.width,
        "intermediate_size": text_tower.blocks[0].mlp.fc1.out_features,
        "num_hidden_layers": len(model.text.blocks),
        "num_attention_heads": recipe.model.text.num_heads,
        "vocab_size": recipe.model.text.vocab_size,
        "max_position_embeddings": recipe.model.text.context_length,
        "hidden_act": THEIR_ACTIVATIONS[recipe.model.text.activation],
        "layer_norm_eps": recipe.model.text.norm_eps,
    }
    (_check_siglip_vision if is_siglip else _check_clip_vision)(recipe, model)
    trunk = model.vision.trunk
    first = trunk.blocks[0]
    vision = {
        "hidden_size": trunk.embed_dim,
        "intermediate_size": first.mlp.fc1.out_features,
        "num_hidden_layers": len(trunk.blocks),
        "num_attention_heads": first.attn.num_heads,
        "image_size": recipe.data.image_size,
        "patch_size": model.vision.patch_size,
        "hidden_act": THEIR_ACTIVATIONS[activation_of(first.mlp.act)],
        "layer_norm_eps": first.norm1.eps,
    }
    kind = (
        (transformers.SiglipConfig, transformers.SiglipModel)
        if is_siglip
        else (transformers.CLIPConfig, transformers.CLIPModel)
    )
    own = {} if is_siglip else {"projection_dim": recipe.model.embed_dim}
    return kind[1](kind[0](text_config=text, vision_config=vision, **own))


def _clip_text(recipe: Recipe) -> dict[str, Any]:
    text = recipe.model.text
    if not text.causal or text.pool != "eos" or text.projection != "linear":
        raise refused(FORMAT, "the text tower is not CLIPModel's: causal, pooled at the end, projected without a bias")
    end = text.vocab_size - 1 if text.eos_id is None else text.eos_id
    return {"eos_token_id": end, "bos_token_id": text.vocab_size - 2, "pad_token_id": end}


def _siglip_text(recipe: Recipe) -> dict[str, Any]:
    text = recipe.model.text
    if text.causal or text.pool != "last" or text.projection != "with_bias":
        raise refused(FORMAT, "the text tower is not SiglipModel's: attending both ways, pooled at the last token")
    if recipe.losses.spatial_global is None or recipe.losses.spatial_global.kind != "sigmoid":
        raise refused(FORMAT, "SiglipModel has the bias of a sigmoid loss, which this model has not")
    pad = text.tokenizer.pad_id if text.tokenizer is not None else 0
    return {"projection_size": recipe.model.embed_dim, "pad_token_id": pad, "bos_token_id": None, "eos_token_id": None}


def _check_clip_vision(recipe: Recipe, model: CLIP) -> None:
    plain = plain_tower(model.vision.trunk)
    projection = recipe.model.vision.projection
    if plain is None or not plain.has_pre_norm or plain.norms_mean or plain.has_layer_scale or projection != "linear":
        raise refused(FORMAT, "the image tower is not CLIPModel's: a norm before the blocks, a class token, no bias")


def _check_siglip_vision(recipe: Recipe, model: CLIP) -> None:
    trunk = model.vision.trunk
    is_plain = (
        trunk.num_prefix_tokens == 0
        and not hasattr(trunk.blocks[0].ls1, "gamma")
        and isinstance(trunk.norm_pre, nn.Identity)
        and recipe.model.vision.projection == "none"
    )
    if not is_plain:
        raise refused(FORMAT, "the image tower is not SiglipModel's: no class token, a pooling by attention")


def _write_tokenizer(recipe: Recipe, folder: Path) -> None:
    """CLIP's own vocabulary by transformers' names, or the run's tokenizer.json."""
    text = recipe.model.text
    if text.tokenizer is not None:
        write_tokenizer(text, folder, with_cleaning=True)
        return
    transformers = _transformers()
    bpe = open_clip_module("tokenizer").SimpleTokenizer()
    marks = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocab = {marks.get(token, token): number for token, number in bpe.encoder.items()}
    merges = [pair for pair, _ in sorted(bpe.bpe_ranks.items(), key=lambda item: item[1])]
    own = transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=text.context_length)
    own.save_pretrained(folder)


def _write_preprocessing(recipe: Recipe, folder: Path) -> None:
    data, size = recipe.data, recipe.data.image_size
    square = {"height": size, "width": size}
    squash = data.resize == "squash"
    settings: dict[str, Any] = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": square if squash else {"shortest_edge": size},
        "resample": BICUBIC,
        "do_center_crop": not squash,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(data.pixel_mean),
        "image_std": list(data.pixel_std),
        "do_convert_rgb": True,
    }
    write_json(folder / "preprocessor_config.json", settings)
