"""Merging in a part of the training only (`model.merging.active`)."""

import json
from pathlib import Path
from typing import Any

import pytest
from models_for_tests import small_recipe
from shards_for_tests import make_dataset

from mlip_cli.commands.pretrain import pretrain
from mlip_cli.merge_plan import merges_in
from mlip_cli.recipe import recipe_yaml

STEPS = 6


def test_shares_of_the_steps() -> None:
    def merging(*active: float, total: int = 10) -> list[int]:
        return [s for s in range(1, total + 1) if merges_in(s, total_steps=total, active=(active[0], active[1]))]

    assert merging(0.0, 1.0) == list(range(1, 11))
    assert merging(0.2, 0.9) == list(range(3, 10))
    assert merging(0.0, 0.95, total=500) == list(range(1, 476))
    assert merging(0.0, 0.3, total=1) == []


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


def test_a_training_is_unmerged_before_and_merged_within_the_phase(data: Path, tmp_path: Path) -> None:
    plain = losses(tmp_path / "plain", data, rate=0.0)
    merged = losses(tmp_path / "merged", data, rate=0.3)
    late = losses(tmp_path / "late", data, rate=0.3, active=[0.5, 1.0])
    early = losses(tmp_path / "early", data, rate=0.3, active=[0.0, 0.5])
    assert late[:3] == plain[:3]
    assert late[3] != plain[3]
    assert early[:3] == merged[:3] != plain[:3]
    assert early[3] != merged[3]
