"""`mlip merge-sweep` on a small real run: every setting beside the unmerged model, on the same pictures."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from models_for_tests import make_run, small_recipe
from shards_for_tests import make_dataset

from mlip_cli import cli
from mlip_cli.commands import merge_sweep
from mlip_cli.commands.costs import image_gflops
from mlip_cli.commands.loading import load_run
from mlip_cli.errors import UsageError


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a CLIP run, an MLIP run and a data set."""
    make_dataset(tmp_path / "data" / "colors", n=24)
    make_run(tmp_path / "runs" / "mlip", small_recipe(evaluate={"zeroshot": ["shards:data/colors"]}))
    make_run(tmp_path / "runs" / "clip", small_recipe(mlip=False))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sweep(run: str | None, *, as_json: bool = True, **changes: Any) -> None:
    settings: dict[str, Any] = {"rates": [0.5], "methods": [], "datasets": [], "data_root": None}
    merge_sweep.merge_sweep(run, **(settings | changes), batch_size=4, rounds=3, device="cpu", as_json=as_json)


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    out = capsys.readouterr().out
    return json.loads(out, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def test_every_setting_stands_beside_the_unmerged_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep("runs/mlip", rates=[0.5, 0.25, 0.0, 0.5], methods=["tome", "guided"])
    result = printed(capsys)
    settings = [(None, 0.0), ("tome", 0.25), ("tome", 0.5), ("guided", 0.25), ("guided", 0.5)]
    assert [(p["method"], p["rate"]) for p in result["points"]] == settings
    [dataset] = result["datasets"]
    assert [(p["method"], p["rate"]) for p in dataset["points"]] == settings

    model = load_run("runs/mlip", device="cpu").model
    for point in result["points"]:
        plan = model.merge_plan(point["rate"], point["method"])
        assert point["tokens_per_block"] == list(plan.tokens)
        assert point["true_rate"] == plan.rate
        assert point["gflops"] == pytest.approx(sum(image_gflops(model, plan).values()))
        assert point["measured_over_expected"] == pytest.approx(point["speedup"] / point["expected_speedup"])
        assert len(point["seconds"]) == 3
    first = result["points"][0]
    assert first["tokens_per_block"] == [16, 16, 16, 16]
    assert (first["speedup"], first["expected_speedup"]) == (1, 1)
    assert dataset["n"] == 24
    unmerged = dataset["points"][0]
    assert unmerged["agreement"] == 1
    assert unmerged["paired"]["acc1"] == {"difference": 0, "won": 0, "lost": 0, "p": 1}
    for point in dataset["points"]:
        test = point["paired"]["acc1"]
        assert point["acc1"] - unmerged["acc1"] == pytest.approx(test["difference"])
        assert test["won"] + test["lost"] <= 24 * (1 - point["agreement"]) + 1e-9


def test_the_result_stays_in_the_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep("runs/mlip/checkpoints/step_0000008")
    assert json.loads((place / "runs/mlip/evals/merge_sweep_step_0000008.json").read_text()) == printed(capsys)


def test_a_plain_clip_is_swept_at_the_default_places(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep("runs/clip")
    result = printed(capsys)
    assert result["datasets"] == []
    assert [p["method"] for p in result["points"]] == [None, "guided"]
    assert result["points"][1]["tokens_per_block"][-1] == 8


def test_tables(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep("runs/mlip", as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "method"
    assert lines[1].startswith("none       0      0.000       16 16 16 16")
    assert lines[2].startswith("guided   0.5      0.500         16 11 8 8")
    assert "shards:data/colors: 24 pictures, chance 12.5 %; in brackets: 95 % intervals" in lines
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["tomme"]}, "--methods tomme: no such method; there are guided, tome"),
        ({"rates": [0.3, 0.9]}, "merge rate 0.9: the merge before block 2 would take 16 tokens to 5"),
        ({"datasets": ["digit"]}, "unknown data set 'digit'; did you mean digits?"),
        ({"datasets": ["openmoji"]}, "openmoji: no prepared data in data/openmoji/test"),
    ],
)
def test_mistakes_show_before_anything_is_measured(
    place: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(merge_sweep, "speeds", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(UsageError) as error:
        sweep("runs/mlip", **changes)
    assert str(error.value).startswith(message)
    assert not (place / "runs/mlip/evals").exists()


def test_from_the_command_line_with_its_default_rates(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["mlip", "merge-sweep", "runs/clip", "--rounds", "3", "--batch-size", "2", "--json"]
    )
    assert cli._exit_code() == 0
    assert [p["rate"] for p in printed(capsys)["points"]] == [0, 0.3, 0.5]


def test_agreement_is_of_whole_class_numbers() -> None:
    assert merge_sweep.agreement("3 11 0 2", "3 1 0 2") == 0.75


def test_methods_are_those_of_the_recipe() -> None:
    assert merge_sweep.METHODS == ("guided", "tome")
