"""`model.vision.init`: trained weights for the image tower alone, by timm's names."""

from collections.abc import Iterable
from pathlib import Path

import timm

from mlip_cli.errors import UsageError
from mlip_cli.model.clip import CLIP
from mlip_cli.model.open_clip import unwrapped
from mlip_cli.recipe.config import Recipe
from mlip_cli.recipe.load import override
from mlip_cli.runs.initial_weights import InitNotes, regridded
from mlip_cli.runs.weight_files import check_finite, differing, read_weights

TRUNK = "vision.trunk."
NOT_OF_THE_TOWER = ("head.", "head_dist.", "mask_token")
"""Beginnings of timm's names for classifiers, and what DINOv2 puts in place of hidden patches."""


def load_tower(model: CLIP, recipe: Recipe) -> InitNotes:
    """Load the file that `model.vision.init` names into the image tower; all other parts keep their random values.

    Positions are resampled to the grid of the recipe's image size.

    Raises:
        UsageError: a damaged file, or weights of another tower; the message names the first tensors that differ.
    """
    assert recipe.model.vision.init is not None
    file = Path(recipe.model.vision.init)
    given = unwrapped(read_weights(file), source=str(file))
    unused = [name for name in given if name.startswith(NOT_OF_THE_TOWER)]
    weights = {TRUNK + name: tensor for name, tensor in given.items() if name not in unused}
    facts = [f"model.vision.init: the image tower has the weights of {file}; all other parts start from random values"]
    if unused:
        facts.append(f"model.vision.init: {', '.join(unused)}: not used, the tower has no such parts")
    facts += [f"model.vision.init: {name} {note}" for name, note, _ in regridded(weights, model)]
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(TRUNK)}
    wrong = differing(own, weights)
    if wrong:
        raise UsageError(f"model.vision.init: {file} does not fit the image tower: {_in_words(wrong)}")
    check_finite(weights, source=f"model.vision.init: {file}")
    model.load_state_dict(weights, strict=False)
    return InitNotes(tuple(facts), tuple(pixel_cautions(recipe)))


def _in_words(wrong: list[str]) -> str:
    """The first tensors that differ, by timm's names, with the cure."""
    shown = "; ".join(one.removeprefix(TRUNK) for one in wrong[:3])
    return (
        f"{shown}; {len(wrong)} differ; name the tower that the file belongs to as model.vision.timm; a file of a "
        "whole CLIP is for model.init"
    )


def pixel_cautions(recipe: Recipe) -> Iterable[str]:
    """A line about pixels that are not those of timm's usual weights of the tower; a file does not say its own."""
    usual = timm.get_pretrained_cfg(recipe.model.vision.timm) if recipe.model.vision.timm else None
    if usual is None:
        return
    theirs = {"pixel_mean": tuple(usual.mean), "pixel_std": tuple(usual.std)}
    wrong = [
        override(f"data.{key}", list(value)) for key, value in theirs.items() if getattr(recipe.data, key) != value
    ]
    if wrong:
        yield (
            f"timm's usual weights of {recipe.model.vision.timm} read other pixels than this recipe gives them; if "
            f"model.vision.init holds these, set {' '.join(wrong)}"
        )
