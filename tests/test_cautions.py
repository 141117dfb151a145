"""What a recipe may hold and probably does not mean: lines before the first step and of `--dry-run`."""

from typing import Any

import pytest
import torch
from models_for_tests import small_model, small_recipe

from mlip_cli.commands.dry_run import plan
from mlip_cli.recipe.config import Recipe
from mlip_cli.train.facts import cautions, facts

NOTHING_MERGES = "changes nothing while model.merging.rate is 0; give a rate, or leave it out"
NO_STEP = "model.merging.active [0, 0.01] contains none of the 8 steps of the run: nothing merges in training; widen it"
SLOW = (
    "optim.layer_decay 0.75 is for trained weights, and model.init is null: it slows the lower blocks of random "
    "weights; set it to 1"
)


def recipe_with(*, layer_decay: float = 1.0, **merging: Any) -> Recipe:
    return small_recipe(model={"merging": {"rate": 0.3} | merging}, optim={"layer_decay": layer_decay})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "total_steps", "expected"),
    [
        ({}, 8, []),
        ({"at": [2, 3], "active": [0.5, 1.0]}, 8, []),
        ({"rate": 0.0}, 8, []),
        ({"rate": 0.0, "at": [2, 3]}, 8, [f"model.merging.at {NOTHING_MERGES}"]),
        ({"rate": 0.0, "active": [0.0, 0.01]}, 8, [f"model.merging.active {NOTHING_MERGES}"]),
        ({"active": [0.0, 0.01]}, 8, [NO_STEP]),
        ({"active": [0.0, 0.01]}, 800, []),
        ({"active": [0.0, 0.01]}, None, []),
        ({"layer_decay": 0.75}, 8, [SLOW]),
        ({"layer_decay": 0.75, "rate": 0.0, "at": [2]}, 8, [f"model.merging.at {NOTHING_MERGES}", SLOW]),
    ],
)  # fmt: skip
def test_keys_without_effect_are_named(changes: dict[str, Any], total_steps: int | None, expected: list[str]) -> None:
    recipe = recipe_with(**changes)
    with torch.device("meta"):
        merges = small_model(recipe).training_plan
    assert cautions(recipe, merges, total_steps) == expected


def test_layer_decay_without_trained_weights_is_named() -> None:
    recipe = recipe_with(layer_decay=0.75)
    recipe = tuned(recipe, lr=1e-5)
    assert cautions(recipe, small_model(recipe).training_plan, 8) == []


def tuned(recipe: Recipe, *, lr: float, **model: Any) -> Recipe:
    """The recipe as one that starts from trained weights."""
    optim = recipe.optim.model_copy(update={"lr": lr})
    return recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"init": "runs/a", **model}), "optim": optim}
    )


@pytest.mark.parametrize(
    ("changes", "is_named"),
    [
        ({"lr": 5e-4}, True),
        ({"lr": 1e-4}, False),
        ({"lr": 1e-5}, False),
        ({"lr": 5e-4, "freeze": "image"}, False),
        ({"lr": 5e-4, "freeze": "text"}, True),
        ({"lr": 5e-4, "init": None}, False),
    ],
)
def test_a_rate_that_overwrites_trained_weights_is_named(changes: dict[str, Any], is_named: bool) -> None:
    recipe = tuned(small_recipe(mlip=False), **changes)
    told = (
        "optim.lr 0.0005 fits a training from random weights, and model.init gives trained ones: it overwrites what "
        "they have learned; CLIP is fine-tuned with 1e-6 to 3e-5; set optim.lr=1e-5"
    )
    assert cautions(recipe, small_model(small_recipe(mlip=False)).training_plan, 8) == [told] * is_named


def test_a_start_without_anything_to_measure_is_named() -> None:
    told = "evaluate.at_start has nothing to measure; name evaluate.zeroshot or data.validation"
    for more, expected in (({}, [told]), ({"data": {"validation": "unused"}}, [])):
        recipe = small_recipe(mlip=False, evaluate={"at_start": True}, **more)
        assert cautions(recipe, small_model(recipe).training_plan, 8) == expected


def test_alignment_of_a_crop_with_itself_is_named() -> None:
    recipe = small_recipe(losses={"align": {}}, data={"augment": {"crop_scale": None}})
    same = "data.augment.crop_scale null gives losses.align the same crop twice; give a range"
    assert cautions(recipe, small_model(recipe).training_plan, 8) == [same]


def test_a_dry_run_tells_them_too() -> None:
    assert plan(recipe_with(layer_decay=0.75), resumes=False).cautions == [SLOW]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["the frequency branch teaches the text tower alone; losses.align makes it teach the image tower"]),
        ({"losses": {"align": {}}}, []),
        ({"model": {"frequency": {"placement": "stem", "depth": 1}, "merging": None}}, []),
    ],
)
def test_what_a_branch_can_teach_is_told(changes: dict[str, Any], expected: list[str]) -> None:
    recipe = small_recipe(**changes)
    told = [line for line in facts(recipe, small_model(recipe), 8) if "branch" in line]
    assert told == expected
