"""`model.init`: the weights that a new run starts from, those of another run or of another program."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from timm.layers import resample_abs_pos_embed
from torch import Tensor

from mlip_cli.errors import UsageError
from mlip_cli.model.clip import CLIP
from mlip_cli.model.frequency import regrid_kernel
from mlip_cli.model.open_clip import ONLY_OURS
from mlip_cli.recipe.config import LOSS_NAMES, Recipe
from mlip_cli.recipe.load import differences
from mlip_cli.recipe.merge_plan import stem_depth
from mlip_cli.runs.checkpoint import load_weights
from mlip_cli.runs.find import find_checkpoint
from mlip_cli.runs.loading import load_into
from mlip_cli.runs.start import recipe_of_init
from mlip_cli.terminal.output import warn

NO_FORM = (
    *("model.text.dropout", "model.vision.drop_path", "model.vision.init"),
    "model.text.tokenizer.file",
)
"""Keys that a run may change although it starts from the weights of another."""

PIXELS = ("data.pixel_mean", "data.pixel_std", "data.resize")
"""Keys of the pixels that weights were trained with."""

POSITIONS = "vision.trunk.pos_embed"


@dataclass(frozen=True)
class InitNotes:
    """What a user is told of a start from weights."""

    facts: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()


def check_initial(recipe: Recipe) -> None:
    """Check that the weights that `model.init` names are of a model of the recipe's form. Reads no weights.

    Raises:
        UsageError: no such weights, or those of another architecture; the message names the keys that differ.
    """
    assert recipe.model.init is not None
    other = recipe_of_init(recipe.model.init)
    decide = ["model.embed_dim", "model.vision", "model.text"]
    stages = recipe.model.frequency, other.model.frequency
    if all(stages) or any(stem_depth(stage) for stage in stages):
        decide.append("model.frequency")
    wrong = [
        f"{key} {json.dumps(mine)} (there {json.dumps(theirs)})"
        for key, theirs, mine in differences(other, recipe)
        if key not in NO_FORM and any(key == own or key.startswith(f"{own}.") for own in decide)
    ]
    if wrong:
        raise UsageError(
            f"model.init: {recipe.model.init} does not fit the recipe: {'; '.join(wrong)}; take these values, or leave "
            "model.vision out of the recipe, and mlip takes the whole model from the weights"
        )
    own, its = recipe.model.text.tokenizer, other.model.text.tokenizer
    if own is not None and its is not None and Path(own.file).read_bytes() != Path(its.file).read_bytes():
        raise UsageError(
            f"model.text.tokenizer.file: {own.file} is another tokenizer than {its.file} of model.init; name that one"
        )
    for key, theirs, mine in differences(other, recipe):
        if key in PIXELS:
            warn(f"{key}: {json.dumps(mine)}, but the weights of model.init were trained with {json.dumps(theirs)}")


def load_initial(model: CLIP, recipe: Recipe) -> InitNotes:
    """Load the weights that `model.init` names into `model`, and say what they leave open.

    Parts that the weights lack (frequency branch, heads and scales of losses) keep their random values, and parts that
    the model lacks are ignored. Positions and global filters are brought to the grid of the recipe's image size.

    Raises:
        UsageError: no such weights, damaged ones, or those of another architecture.
    """
    check_initial(recipe)
    path = find_checkpoint(recipe.model.init)[1]
    own, weights = model.state_dict(), load_weights(path)
    facts = [f"model.init: weights of {path}"]
    cautions: list[str] = []
    for name, note, is_lossy in regridded(weights, model):
        (cautions if is_lossy else facts).append(f"model.init: {name} {note}")
    anew = _without_other_kinds(own, weights)
    facts += [f"model.init: losses.{name} is another kind of loss there, so its scale starts anew" for name in anew]
    missing, ignored = _other_parts(own, weights)
    random = [part for part in missing if part.rpartition(".")[2] not in anew]
    if random:
        facts.append(f"model.init: the weights have no {', '.join(random)}; these parts start from random values")
    if ignored:
        cautions.append(f"model.init: these weights are ignored, as the recipe has no such parts: {', '.join(ignored)}")
    matched = {name: tensor for name, tensor in weights.items() if _part(name) not in ignored}
    load_into(model, {name: own[name] for name in own if _part(name) in missing} | matched, path)
    return InitNotes(tuple(facts), tuple(cautions))


def regridded(weights: dict[str, Tensor], model: CLIP) -> Iterator[tuple[str, str, bool]]:
    """Bring positions and global filters in `weights` to the model's grid: (name, what was done, is it lossy)."""
    grid, own = model.vision.grid, model.state_dict()
    for name, stored in weights.items():
        tensor = stored.float()  # resampling in half precision would lose digits
        if name not in own or own[name].shape == tensor.shape or own[name].ndim != tensor.ndim:
            continue
        if own[name].shape[-1] != tensor.shape[-1]:
            continue
        if name == POSITIONS:
            num_prefix = own[name].shape[1] - model.vision.num_patches
            side = math.isqrt(tensor.shape[1] - num_prefix)
            if side**2 + num_prefix != tensor.shape[1]:
                continue  # a tower with other prefix tokens, which load_into refuses
            weights[name] = resample_abs_pos_embed(tensor, list(grid), [side, side], num_prefix)
            yield name, f"resampled from {side} x {side} to {grid[0]} x {grid[1]} patches", False
        elif name.endswith(".kernel"):
            weights[name], lost = regrid_kernel(tensor, grid)
            size = f"from {tensor.shape[0]} x {tensor.shape[1]} to {grid[0]} x {grid[1]} patches"
            yield name, f"{size}, {lost:.1%} of its energy lost", lost > 0


def _without_other_kinds(own: dict[str, Tensor], weights: dict[str, Tensor]) -> list[str]:
    """Remove scale and bias of losses of another kind than in `own` from `weights`; return the names of these losses.

    Only a sigmoid loss has a bias, and the scales of the two kinds differ in size.
    """
    scaled = [name for name in LOSS_NAMES if f"log_scales.{name}" in own.keys() & weights.keys()]
    anew = [name for name in scaled if (f"logit_biases.{name}" in own) != (f"logit_biases.{name}" in weights)]
    for name in anew:
        weights.pop(f"log_scales.{name}")
        weights.pop(f"logit_biases.{name}", None)
    return anew


def _other_parts(own: dict[str, Tensor], weights: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Parts that the weights lack and parts that the model lacks, among those that OpenCLIP does not have."""
    ours, theirs = ({_part(name): None for name in names if name.startswith(ONLY_OURS)} for names in (own, weights))
    return [part for part in ours if part not in theirs], [part for part in theirs if part not in ours]


def _part(name: str) -> str:
    """frequency.blocks.0.norm1.weight -> frequency, token_projections.text.weight -> token_projections.text"""
    words = name.split(".")
    return ".".join(words[:2]) if words[0] in ("token_projections", "log_scales", "logit_biases") else words[0]
