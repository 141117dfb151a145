"""`model.init`: the weights that a new run starts from, those of a run or those that OpenCLIP names."""

import difflib
import importlib.util
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from mlip_cli.commands.loading import load_into
from mlip_cli.commands.weight_files import read_weights
from mlip_cli.config import LOSS_NAMES, Recipe
from mlip_cli.errors import RunError, UsageError
from mlip_cli.init_source import OpenClipFile, find_init
from mlip_cli.model import architecture
from mlip_cli.model.clip import CLIP, build_model
from mlip_cli.model.frequency import regrid_kernel
from mlip_cli.model.open_clip_weights import ONLY_OURS, PATCH_BIAS, from_open_clip
from mlip_cli.recipe import load_recipe
from mlip_cli.run_folder import Run
from mlip_cli.train.checkpoint import load_weights

POSITIONS = "vision.trunk.pos_embed"


@dataclass(frozen=True)
class InitNotes:
    """What is said of a start from weights."""

    facts: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()


def check_initial(model: CLIP, recipe: Recipe) -> OpenClipFile | Path:
    """Where `model.init` leads, after a look whether that model computes as this one, without reading weights.

    Raises:
        UsageError: there is none, or another architecture; with the section of a recipe that fits.
    """
    assert recipe.model.init is not None
    source = find_init(recipe.model.init)
    if isinstance(source, OpenClipFile):
        _check_architecture(model, source)
    else:
        _check_run(model, source)
    return source


def load_initial(model: CLIP, recipe: Recipe) -> InitNotes:
    """Load the weights that `model.init` names into `model`, and say what they do not bring.

    Parts that only one side has (frequency branch, token heads, scales of losses) stay random or are left out;
    positions and global filters are brought to the grid of the recipe's image size.

    Raises:
        UsageError: there are none, damaged ones, or those of another architecture.
    """
    source = check_initial(model, recipe)
    path = Path(source.file) if isinstance(source, OpenClipFile) else source
    try:
        weights = from_open_clip(read_weights(path)) if isinstance(source, OpenClipFile) else load_weights(path)
    except UsageError as error:
        if str(error).startswith(str(path)):
            raise
        raise UsageError(f"{path}: {error}") from None
    own = model.state_dict()
    if isinstance(source, OpenClipFile) and PATCH_BIAS in own:
        weights[PATCH_BIAS] = torch.zeros_like(own[PATCH_BIAS])
    facts = [f"model.init: weights of {source}"]
    cautions: list[str] = []
    for name, note, is_lossy in _regridded(weights, model):
        (cautions if is_lossy else facts).append(f"model.init: {name} {note}")
    random, left_out = _other_parts(own, weights)
    if random:
        facts.append(f"model.init: not in it, so as in a run without: {', '.join(random)}")
    if left_out:
        cautions.append(f"model.init: in it, and left out as the recipe has no such part: {', '.join(left_out)}")
    matched = {name: tensor for name, tensor in weights.items() if _part(name) not in left_out}
    load_into(model, {name: own[name] for name in own if _part(name) in random} | matched, path)
    return InitNotes(tuple(facts), tuple(cautions))


def open_clip_configuration(name: str) -> dict[str, Any]:
    """A configuration of the installed OpenCLIP, read without importing it, which takes seconds.

    Raises:
        UsageError: it has none of this name.
    """
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise RunError("open_clip is not installed; pip install open_clip_torch")
    files = {path.stem: path for path in (Path(package.origin).parent / "model_configs").glob("*.json")}
    if name not in files:
        close = difflib.get_close_matches(name, files, 3)
        hint = f"did you mean {', '.join(close)}?" if close else "names look like ViT-B-32-quickgelu"
        raise UsageError(f"model.init: OpenCLIP has no architecture {name!r}; {hint}")
    return json.loads(files[name].read_text())


def _check_architecture(model: CLIP, source: OpenClipFile) -> None:
    place = f"model.init: open_clip:{source.architecture}"
    try:
        theirs = architecture.of_open_clip(open_clip_configuration(source.architecture))
    except UsageError as error:
        raise UsageError(str(error) if str(error).startswith("model.init") else f"{place}: {error}") from None
    wrong = _misfits(model, theirs)
    if wrong:
        fit = architecture.fitting_recipe(theirs)
        size = theirs.image_size
        fitting = f"use {fit} (its own data.image_size is {size}; for others the positions are resampled)"
        cure = fitting if fit else "no tower of ours has its form; take another architecture"
        raise UsageError(f"{place} does not fit the recipe: {'; '.join(wrong)}; {cure}")


def _misfits(model: CLIP, theirs: architecture.Architecture) -> list[str]:
    try:
        ours = architecture.of_model(model)
    except UsageError as error:
        return [str(error)]
    return [f"{key} {mine} (there {other})" for key, mine, other in architecture.differences(ours, theirs)]


def _check_run(model: CLIP, checkpoint: Path) -> None:
    """Compare what shapes do not show: heads, activations, epsilons, pooling."""
    run = Run(checkpoint.parent.parent)
    with torch.device("meta"):
        theirs = build_model(load_recipe(str(run.recipe)).recipe)
    for place, mine, other in (("vision", model.vision, theirs.vision), ("text", model.text, theirs.text)):
        if _computation(mine) != _computation(other) and _shapes(mine) == _shapes(other):
            raise UsageError(
                f"model.init: {checkpoint}: its model.{place} has the same sizes and computes otherwise (heads, "
                f"activation or norms); take model.{place} from {run.recipe}"
            )


def _computation(tower: nn.Module) -> list[tuple[Any, ...]]:
    """Kinds of all modules with the numbers that their weights do not show."""
    numbers = ("num_heads", "eps", "approximate", "global_pool")
    return [(type(module).__name__, *(getattr(module, name, None) for name in numbers)) for module in tower.modules()]


def _shapes(tower: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of all weights whose shape does not follow from the image size."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tower.state_dict().items()}
    return {name: shape for name, shape in shapes.items() if not name.endswith(("pos_embed", "kernel"))}


def _regridded(weights: dict[str, Tensor], model: CLIP) -> Iterator[tuple[str, str, bool]]:
    """Bring positions and global filters in `weights` to the model's grid: (name, what was done, is something lost)."""
    grid, own = model.vision.grid, model.state_dict()
    for name, stored in weights.items():
        tensor = stored.float()  # files in half precision are not to be resampled in it
        if name not in own or own[name].shape == tensor.shape or own[name].shape[-1] != tensor.shape[-1]:
            continue
        if name == POSITIONS:
            num_prefix = own[name].shape[1] - model.vision.num_patches
            side = math.isqrt(tensor.shape[1] - num_prefix)
            if side**2 + num_prefix != tensor.shape[1]:
                continue  # a tower with other prefix tokens, which is no start
            weights[name] = resample_abs_pos_embed(tensor, list(grid), [side, side], num_prefix)
            yield name, f"resampled from {side} x {side} to {grid[0]} x {grid[1]} patches", False
        elif name.endswith(".kernel"):
            weights[name], lost = regrid_kernel(tensor, grid)
            size = f"from {tensor.shape[0]} x {tensor.shape[1]} to {grid[0]} x {grid[1]} patches"
            yield name, f"{size}, {lost:.1%} of its energy lost", lost > 0


def _other_parts(own: dict[str, Tensor], weights: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Parts that the weights lack and parts that the model lacks, of those that either may lack.

    Scale and bias of a loss come together or not at all: they are those of one kind of loss.
    """
    for name in LOSS_NAMES:
        scale, bias = f"log_scales.{name}", f"logit_biases.{name}"
        if scale in own and (bias in own) != (bias in weights):
            weights.pop(scale, None)
            weights.pop(bias, None)
    ours, theirs = ({_part(name): None for name in names if name.startswith(ONLY_OURS)} for names in (own, weights))
    return [part for part in ours if part not in theirs], [part for part in theirs if part not in ours]


def _part(name: str) -> str:
    """frequency.blocks.0.norm1.weight -> frequency, token_projections.text.weight -> token_projections.text"""
    words = name.split(".")
    return ".".join(words[:2]) if words[0] in ("token_projections", "log_scales", "logit_biases") else words[0]
