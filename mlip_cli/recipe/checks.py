"""Mistakes between several keys. Each check is a function recipe -> [(dotted key, what is wrong and what to do)]."""

import os
from collections.abc import Callable, Iterator, Sequence

from mlip_cli.errors import UsageError
from mlip_cli.paths import is_elsewhere
from mlip_cli.recipe.config import FREQUENCY_LOSSES, LOSS_NAMES, VOCAB_SIZE, Recipe, Source, Text, Vision
from mlip_cli.recipe.merge_plan import DEFAULT, default_places, plan_of_recipe, stem_depth, wrong_places, wrong_stem

Found = Iterator[tuple[str, str]]

SIZES = ("patch_size", "width", "depth", "num_heads")
OF_SIZES = ("mlp_ratio", "activation", "norm_eps", "pre_norm", "layer_scale")
"""Keys that only a tower given by its sizes has."""


def _length(recipe: Recipe) -> Found:
    if not recipe.data.train:
        return  # nothing to train on; `pretrain` says so
    if recipe.train.steps is None and recipe.train.epochs is None:
        yield "train.steps", "neither train.steps nor train.epochs is given; give one of them"
    if recipe.train.steps is not None and recipe.train.epochs is not None:
        both = f"{recipe.train.epochs} and train.steps {recipe.train.steps} are both given"
        yield "train.epochs", f"{both}; set one of them to null"


def _batch(recipe: Recipe) -> Found:
    micro, whole = recipe.train.given_micro_batch_size, recipe.train.global_batch_size
    if micro is not None and micro > whole:
        yield "train.micro_batch_size", f"{micro} is more than train.global_batch_size {whole}; set it to null"
    if recipe.train.micro_batch_size == "auto" and recipe.train.parallel == "fsdp":
        yield "train.micro_batch_size", "auto does not work with train.parallel fsdp; give a number"


def _precision(recipe: Recipe) -> Found:
    if recipe.train.precision == "fp16" and recipe.train.device not in ("cuda", "auto"):
        yield "train.precision", f"fp16 needs train.device cuda, not {recipe.train.device}; use bf16 or fp32"


def _sources(recipe: Recipe) -> Found:
    weighted = [source.weight is not None for source in recipe.data.train]
    if any(weighted) and not all(weighted):
        bare = recipe.data.train[weighted.index(False)].path
        yield "data.train", f"{bare} has no weight but other folders do; give all of them a weight, or none"
    if any(weighted) and recipe.train.epochs is not None:
        yield "data.train", "weighted folders have no common epoch; replace train.epochs by train.steps"
    if any(source.weight is not None for source in recipe.data.validation or ()):
        yield "data.validation", "weights work in data.train only; list the folders without weights"
    for name, sources in (("data.train", recipe.data.train), ("data.validation", recipe.data.validation or ())):
        for source in sources:
            if source.format != "webdataset" and (source.caption_column or source.image_column):
                yield name, f"{source.path} has a caption_column or image_column, which need format: webdataset"
        yield from ((name, wrong) for source in sources if (wrong := _wrong_place(source)))
        yield from _twice(name, [source.path for source in sources])
    yield from _twice("evaluate.zeroshot", recipe.evaluate.zeroshot)


def _wrong_place(source: Source) -> str | None:
    """Why data of this format cannot lie there, with the cure; None if it can."""
    if not is_elsewhere(source.path):
        return None
    if source.format == "webdataset" or source.path.startswith("pipe:"):
        return (
            f"{source.path}: a stream can only be read from its start, so a run could not shuffle it or resume in its "
            "middle; save it as tars and name these, or prepare them (mlip prepare-data TARS OUT)"
        )
    scheme = source.path.partition(":")[0]
    return None if "://" in source.path else f"{source.path}: a URL begins with {scheme}://"


def _twice(name: str, places: Sequence[str]) -> Found:
    """Places that are listed twice, also where they are spelled in two ways."""
    first: dict[str, str] = {}
    for place in places:
        kind, colon, path = place.partition(":") if place.startswith(("folder:", "shards:")) else ("", "", place)
        one = place.rstrip("/") if is_elsewhere(place) else f"{kind}{colon}{os.path.realpath(path)}"
        if one in first:
            yield name, f"{place} is listed twice" + (f", also as {first[one]}" if first[one] != place else "")
        first.setdefault(one, place)


def _best(recipe: Recipe) -> Found:
    metric, best = recipe.evaluate.best_metric, recipe.train.keep.best
    if best is not None and metric is None:
        yield "train.keep.best", "it needs evaluate.best_metric, which is null; give that, or set this to null"
    if metric is not None and best is None:
        yield "evaluate.best_metric", "it needs train.keep.best, which is null; give that, or set this to null"
    if metric is not None and recipe.data.validation is None and not recipe.evaluate.zeroshot:
        yield "evaluate.best_metric", f"{metric} is never measured; give data.validation or evaluate.zeroshot"


def _crop(recipe: Recipe) -> Found:
    scale = recipe.data.augment.crop_scale
    if scale is not None and scale[0] > scale[1]:
        yield "data.augment.crop_scale", f"[{scale[0]:g}, {scale[1]:g}] is not in ascending order"


def _vision(recipe: Recipe) -> Found:
    vision = recipe.model.vision
    given = [name for name in SIZES if getattr(vision, name) is not None]
    missing = [name for name in SIZES if name not in given]
    if vision.timm is not None and given:
        both = f"{vision.timm} defines the tower, and so does {', '.join(given)}"
        yield "model.vision.timm", f"{both}; set one of the two to null"
    elif vision.timm is not None:
        defaults = Vision()
        for name in OF_SIZES:
            if getattr(vision, name) != getattr(defaults, name):
                cure = "leave it out, or give the sizes of the tower instead"
                yield f"model.vision.{name}", f"{vision.timm} decides it; {cure}"
        if vision.pool not in (None, "mean"):
            yield "model.vision.pool", f"{vision.pool} needs a tower given by its sizes; use mean or null"
    elif not given:
        yield "model.vision", f"give timm, or all of {', '.join(SIZES)}"
    elif vision.timm is None and missing:
        yield "model.vision", f"{', '.join(missing)} missing; give all of {', '.join(SIZES)}, or timm alone"


def _heads(recipe: Recipe) -> Found:
    for name, tower in (("vision", recipe.model.vision), ("text", recipe.model.text)):
        if tower.width and tower.num_heads and tower.width % tower.num_heads:
            yield f"model.{name}.num_heads", f"{tower.num_heads} heads do not divide width {tower.width}"


def _patches(recipe: Recipe) -> Found:
    size, patch = recipe.data.image_size, recipe.model.vision.patch_size
    if patch and size % patch:
        below = size // patch * patch
        nearby = f"{below} or {below + patch}" if below else str(patch)
        yield "data.image_size", f"{size} is not a multiple of model.vision.patch_size {patch}; use {nearby}"


def _merging(recipe: Recipe) -> Found:
    """Checks the places, and the rate if the number of patches is known (for towers of timm only torch knows it)."""
    merging, vision = recipe.model.merging, recipe.model.vision
    if merging is None:
        return
    method, stem = merging.method, stem_depth(recipe.model.frequency)
    if vision.depth and stem >= vision.depth:
        return  # no attention block is left; `_frequency` reports that
    places = default_places(vision.depth, method, stem=stem) if merging.at is None and vision.depth else merging.at
    wrong = wrong_places(places, depth=vision.depth, method=method, stem=stem) if places is not None else None
    if wrong:
        yield "model.merging.at", wrong
        return
    if merging.active[0] >= merging.active[1]:
        yield "model.merging.active", f"[{merging.active[0]:g}, {merging.active[1]:g}] is not in ascending order"
    if not vision.depth or not vision.patch_size or recipe.data.image_size % vision.patch_size:
        return
    try:
        plan_of_recipe(recipe, merging.rate, method)
    except UsageError as error:
        yield "model.merging.rate", str(error)


def _guidance(recipe: Recipe) -> Found:
    """Only for `tome`: a model trained with `random_drop` is evaluated with guided merging."""
    merging = recipe.model.merging
    if merging is None or merging.method != "tome":
        return
    for name, value, default in (
        ("guidance", merging.guidance, DEFAULT.guidance),
        ("strength", merging.strength, DEFAULT.strength),
    ):
        if value != default:
            yield f"model.merging.{name}", f"{value} has no effect with method tome; set it to {default}"


def _frequency(recipe: Recipe) -> Found:
    frequency, vision = recipe.model.frequency, recipe.model.vision
    if frequency is None or frequency.placement != "stem":
        return
    if frequency.input == "dct":
        cure = "set it to tokens, or model.frequency.placement to branch"
        yield "model.frequency.input", f"a stem reads patch tokens and no dct; {cure}"
    for key, wrong in wrong_stem(frequency, width=vision.width, depth=vision.depth):
        yield f"model.frequency.{key}", wrong


def _freeze(recipe: Recipe) -> Found:
    model = recipe.model
    has_tower = model.freeze == "image" and model.vision.init is not None
    if model.freeze is not None and model.init is None and not has_tower:
        cure = "give model.init or model.vision.init" if model.freeze == "image" else "give model.init"
        yield "model.freeze", f"the {model.freeze} tower would keep random weights; {cure}, or set it to null"
    if model.freeze == "text" and model.text.dropout:
        yield "model.text.dropout", f"{model.text.dropout:g} has no effect in a frozen tower; set it to 0"
    if model.freeze == "image" and model.vision.drop_path:
        yield "model.vision.drop_path", f"{model.vision.drop_path:g} has no effect in a frozen tower; set it to 0"


def _tower_weights(recipe: Recipe) -> Found:
    if recipe.model.vision.init is None:
        return
    if recipe.model.init is not None:
        yield "model.vision.init", "model.init gives the image tower its weights already; set one of the two to null"
    if stem_depth(recipe.model.frequency):
        cure = "set model.frequency to null or its placement to branch, or this to null"
        yield "model.vision.init", f"a stem replaces the first blocks of the trained tower; {cure}"


def _smoothing(recipe: Recipe) -> Found:
    for name in ("spatial_global", "frequency_global", "align"):
        term = getattr(recipe.losses, name)
        if term is not None and term.kind == "sigmoid" and term.label_smoothing:
            yield f"losses.{name}.label_smoothing", "it works with kind infonce only; set it to 0"


def _losses(recipe: Recipe) -> Found:
    on = [name for name in LOSS_NAMES if getattr(recipe.losses, name) is not None]
    needs_frequency = [name for name in on if name in FREQUENCY_LOSSES]
    frequency = recipe.model.frequency
    if recipe.losses.spatial_global is None:
        yield "losses.spatial_global", "it alone trains the feature that evaluation uses, but is null; give it a kind"
    if frequency is None:
        for name in needs_frequency:
            yield f"losses.{name}", "it needs model.frequency, which is null; give that, or set this loss to null"
    elif frequency.placement == "branch" and not needs_frequency:
        cure = "give losses.frequency_global or losses.align, or set it to null"
        yield "model.frequency", f"no loss trains it; {cure}"
    elif frequency.placement == "stem" and recipe.losses.read_other_crop:
        cure = "set model.frequency.placement to branch, or this loss to null"
        yield "losses.align", f"it needs a branch beside the tower, and the recipe has a stem; {cure}"


def _captions(recipe: Recipe) -> Found:
    count = recipe.data.captions_per_image
    if count > 1 and recipe.data.captions == "first":
        yield "data.captions_per_image", f"{count}, but data.captions first takes one; set data.captions to sample"


def _text(recipe: Recipe) -> Found:
    text, key = recipe.model.text, "model.text"
    if text.tokenizer is None and text.vocab_size != VOCAB_SIZE:
        yield f"{key}.vocab_size", f"{text.vocab_size}, but CLIP's tokenizer has {VOCAB_SIZE} ids; give {key}.tokenizer"
    if text.tokenizer is None and text.eos_id is not None:
        yield f"{key}.eos_id", f"{text.eos_id}, but CLIP's tokenizer ends captions by its largest id; set it to null"
    if text.tokenizer is not None and text.pool == "eos" and text.eos_id is None:
        yield f"{key}.eos_id", f"{key}.pool eos needs the id that ends a caption of {text.tokenizer.file}"
    if text.tokenizer is not None and text.tokenizer.pad_id >= text.vocab_size:
        yield f"{key}.tokenizer.pad_id", f"{text.tokenizer.pad_id}, but {key}.vocab_size is {text.vocab_size}"
    if not reads_whole_captions(text):
        return
    for name in LOSS_NAMES:
        if getattr(recipe.losses, name) is not None and name.endswith(("_words", "_token")):
            yield (
                f"losses.{name}",
                "it looks at words, which mlip knows only in a causal tower with CLIP's tokenizer; set it to null",
            )


def reads_whole_captions(text: Text) -> bool:
    """Whether the tower must always read `context_length` tokens, because padding changes its result or its ids."""
    return text.tokenizer is not None or not text.causal or text.pool == "last"


def _projections(recipe: Recipe) -> Found:
    model = recipe.model
    for name, tower in (("vision", model.vision), ("text", model.text)):
        if tower.projection == "none" and tower.width not in (None, model.embed_dim):
            yield (
                f"model.{name}.projection",
                f"none, but the tower is {tower.width} wide and model.embed_dim {model.embed_dim}; use linear",
            )


CHECKS: tuple[Callable[[Recipe], Found], ...] = (
    *(_sources, _best, _crop, _patches, _vision, _text, _projections, _heads, _frequency, _merging, _guidance),
    *(_freeze, _tower_weights, _losses, _captions, _smoothing, _length, _batch, _precision),
)


def check(recipe: Recipe) -> list[tuple[str, str]]:
    """All mistakes between keys: [(dotted key, what is wrong and what to do)]."""
    return [found for function in CHECKS for found in function(recipe)]
