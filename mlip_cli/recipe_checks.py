"""Mistakes that take more than one key to see. Each check is a function recipe -> [(dotted key, what is wrong)]."""

from collections.abc import Callable, Iterator

from mlip_cli.config import LOSS_NAMES, Recipe

Found = Iterator[tuple[str, str]]

SIZES = ("patch_size", "width", "depth", "num_heads")


def _length(recipe: Recipe) -> Found:
    if recipe.train.steps is None and recipe.train.epochs is None:
        yield "train.steps", "not given, nor is train.epochs; give one of them"
    if recipe.train.steps is not None and recipe.train.epochs is not None:
        yield "train.epochs", f"{recipe.train.epochs} excludes train.steps {recipe.train.steps}; set one to null"


def _batch(recipe: Recipe) -> Found:
    micro, whole = recipe.train.micro_batch_size, recipe.train.global_batch_size
    if micro is not None and micro > whole:
        yield "train.micro_batch_size", f"{micro} is more than train.global_batch_size {whole}"


def _precision(recipe: Recipe) -> Found:
    if recipe.train.precision == "fp16" and recipe.train.device not in ("cuda", "auto"):
        yield "train.precision", f"fp16 needs train.device cuda, not {recipe.train.device}; use bf16 or fp32"


def _sources(recipe: Recipe) -> Found:
    weighted = [source.weight is not None for source in recipe.data.train]
    if any(weighted) and not all(weighted):
        bare = recipe.data.train[weighted.index(False)].path
        yield "data.train", f"{bare} has no weight but others have; weigh all folders or none"
    if any(weighted) and recipe.train.epochs is not None:
        yield "data.train", "weighted folders have no common epoch; give train.steps in place of train.epochs"
    if any(source.weight is not None for source in recipe.data.validation or ()):
        yield "data.validation", "weights are for training only; list the folders alone"
    for name, sources in (("data.train", recipe.data.train), ("data.validation", recipe.data.validation or ())):
        folders = [source.path for source in sources]
        for folder in sorted({f for f in folders if folders.count(f) > 1}):
            yield name, f"{folder} is listed twice"


def _crop(recipe: Recipe) -> Found:
    scale = recipe.data.augment.crop_scale
    if scale is not None and scale[0] > scale[1]:
        yield "data.augment.crop_scale", f"[{scale[0]:g}, {scale[1]:g}] does not ascend"


def _vision(recipe: Recipe) -> Found:
    vision = recipe.model.vision
    given = [name for name in SIZES if getattr(vision, name) is not None]
    missing = [name for name in SIZES if name not in given]
    if vision.timm is not None and given:
        yield "model.vision.timm", f"{vision.timm} excludes {', '.join(given)}; set one side to null"
    elif vision.timm is None and not given:
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
        yield "data.image_size", f"{size} is no multiple of model.vision.patch_size {patch}; use {nearby}"


def _merging(recipe: Recipe) -> Found:
    merging, depth = recipe.model.merging, recipe.model.vision.depth
    if merging is None:
        return
    at = merging.at
    if at is not None:
        shown = "[" + ", ".join(map(str, at)) + "]"
        if not at:
            yield "model.merging.at", "no block given; name some, or set model.merging to null"
        elif list(at) != sorted(set(at)):
            yield "model.merging.at", f"{shown} does not ascend"
        elif at[0] < 2:
            yield (
                "model.merging.at",
                f"{shown} starts at block 1, which no attention precedes to guide a merge; start at 2",
            )
        elif depth and at[-1] > depth:
            yield "model.merging.at", f"{shown} goes beyond model.vision.depth {depth}"
        else:
            yield from _reach(recipe, len(at), merging.rate)
    elif depth and depth < 2:
        yield "model.merging", f"model.vision.depth {depth} has no place to merge; set it to null"
    elif depth:
        yield from _reach(recipe, 2 if max(2, depth // 4) + max(2, depth // 6) <= depth else 1, merging.rate)


def _reach(recipe: Recipe, num_merges: int, rate: float) -> Found:
    """One merge takes at most half of the tokens. The exact plan, made with the model, rounds by less than 0.02."""
    patch = recipe.model.vision.patch_size
    if not patch or recipe.data.image_size % patch:
        return
    patches = left = (recipe.data.image_size // patch) ** 2
    for _ in range(num_merges):
        left -= left // 2
    largest = 1 - left / patches
    if rate > largest + 0.02:
        merges = "1 merge" if num_merges == 1 else f"{num_merges} merges"
        yield (
            "model.merging.rate",
            f"{rate:g} is out of reach: {merges} of at most half leave {left} of {patches} patch tokens, "
            f"a rate of {largest:.2f}; lower it or add blocks to model.merging.at",
        )


def _losses(recipe: Recipe) -> Found:
    on = [name for name in LOSS_NAMES if getattr(recipe.losses, name) is not None]
    frequency = [name for name in on if name.startswith("frequency_")]
    if not on:
        yield "losses", "all are null; training needs at least one"
    if recipe.model.frequency is None:
        for name in frequency:
            yield f"losses.{name}", "needs model.frequency, which is null"
    elif not frequency:
        yield (
            "model.frequency",
            "nothing would train it; give losses.frequency_global or losses.frequency_token, or set it to null",
        )


CHECKS: tuple[Callable[[Recipe], Found], ...] = (
    _sources,
    _crop,
    _patches,
    _vision,
    _heads,
    _merging,
    _losses,
    _length,
    _batch,
    _precision,
)


def check(recipe: Recipe) -> list[tuple[str, str]]:
    """All mistakes between keys: [(dotted key, what is wrong and what to do)]."""
    return [found for function in CHECKS for found in function(recipe)]
