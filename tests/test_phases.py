"""Merging in a part of the training only (`model.merging.active`)."""

import json
from pathlib import Path
from typing import Any

import pytest
from models_for_tests import small_model, small_recipe
from shards_for_tests import make_dataset

from mlip_cli.commands.pretrain import pretrain
from mlip_cli.recipe.load import recipe_yaml
from mlip_cli.recipe.merge_plan import merging_steps
from mlip_cli.train.facts import phase
from mlip_cli.train.setup import plan_by_step

STEPS = 6


def test_shares_of_the_steps() -> None:
    assert list(merging_steps(10, (0.0, 1.0))) == list(range(1, 11))
    assert list(merging_steps(10, (0.2, 0.9))) == list(range(3, 10))
    assert list(merging_steps(500, (0.0, 0.95))) == list(range(1, 476))
    assert list(merging_steps(1, (0.0, 0.3))) == []


@pytest.mark.parametrize(
    ("active", "words"),
    [
        ([0, 1], ""),
        ([0, 0.5], ", in steps 1 to 3"),
        ([0.5, 1], ", in steps 4 to 6"),
        ([0, 0.05], ", in no step: the run has too few"),
    ],
)
def test_the_phase_is_logged(active: list[float], words: str) -> None:
    assert phase(small_recipe(model={"merging": {"rate": 0.3, "active": active}}), STEPS) == words


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("phases") / "train", n=24)


def losses(folder: Path, data: Path, **merging: Any) -> list[float]:
    """Loss of every step."""
    recipe = small_recipe(train=str(data), data={"num_workers": 0}, log={"every_steps": 1}, model={"merging": merging})
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": STEPS})})
    folder.mkdir()
    (folder / "x.yaml").write_text(recipe_yaml(recipe))
    pretrain(str(folder / "x.yaml"), [], out=folder / "run", resume=False, dry_run=False, as_json=False)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize(
    ("active", "merged"), [([0, 1], [1, 2, 3, 4, 5, 6]), ([0, 0.5], [1, 2, 3]), ([0.5, 1], [4, 5, 6]), ([0, 0.05], [])]
)
@pytest.mark.parametrize("method", ["guided", "random_drop"])  # which has another plan in training
def test_the_plan_of_a_step_merges_within_the_phase_alone(active: list[float], merged: list[int], method: str) -> None:
    recipe = small_recipe(model={"merging": {"rate": 0.3, "method": method, "active": active}})
    model = small_model(recipe)
    plan_of = plan_by_step(recipe.model.merging, model, STEPS)
    for step in range(1, STEPS + 1):
        expected = model.merge_plan(0.3, method) if step in merged else model.merge_plan(0.0)
        assert plan_of(step) == expected


@pytest.mark.slow
def test_a_training_merges_from_the_first_step_of_the_phase_on(data: Path, tmp_path: Path) -> None:
    plain = losses(tmp_path / "plain", data, rate=0.0)
    late = losses(tmp_path / "late", data, rate=0.3, active=[0.5, 1.0])
    assert late[:3] == plain[:3]
    assert late[3] != plain[3]
