"""`mlip merge-sweep` on a small real run: every setting beside the unmerged model, on the same pictures."""

import json
import re
import shutil
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models_for_tests import make_run, small_recipe
from PIL import Image
from results_for_tests import sweep_result
from shards_for_tests import COLORS, make_dataset
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from mlip_cli import cli
from mlip_cli.commands import merge_sweep
from mlip_cli.data import loader
from mlip_cli.data.open import open_prepared
from mlip_cli.data.pictures import RejectedPictureError, open_picture
from mlip_cli.data.transforms import decode
from mlip_cli.errors import RunError, Stopped, UsageError
from mlip_cli.evaluate import sweep as sweep_module
from mlip_cli.evaluate.datasets.find import find_benchmark
from mlip_cli.evaluate.datasets.open import open_benchmark
from mlip_cli.evaluate.datasets.pictures import batches
from mlip_cli.evaluate.evaluators import training_evaluators
from mlip_cli.evaluate.panels import draw_groups, draw_guidance, panel_pictures
from mlip_cli.evaluate.sweep import agreement, numbers_at_random, open_datasets
from mlip_cli.evaluate.validation import validation_pairs
from mlip_cli.evaluate.wanted import FAILURES, SWEPT_METHODS, find_wanted
from mlip_cli.profiling.flops import image_gflops
from mlip_cli.recipe import merge_plan
from mlip_cli.recipe.config import Data
from mlip_cli.report.sweeps import print_sweep
from mlip_cli.report.write import rebuild
from mlip_cli.runs.loading import at_rate, load_run
from mlip_cli.terminal.endings import exit_code


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an MLIP run, a CLIP run, a run with validation pairs and a data set."""
    folder = tmp_path_factory.mktemp("sweep")
    make_dataset(folder / "data" / "colors", n=24)
    make_run(folder / "runs" / "mlip", small_recipe(evaluate={"zeroshot": ["shards:data/colors"]}))
    make_run(folder / "runs" / "pairs", small_recipe(data={"validation": ["data/colors"]}))
    make_run(folder / "runs" / "clip", small_recipe(mlip=False))
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to write into, as the current folder; no pages are drawn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(merge_sweep, "rebuild", lambda _: None)
    return shutil.copytree(made, tmp_path, dirs_exist_ok=True)


def sweep(run: str | None, *, as_json: bool = True, **changes: Any) -> None:
    settings: dict[str, Any] = {"rates": [0.5], "methods": [], "datasets": [], "data_root": None, "num_pictures": 0}
    merge_sweep.merge_sweep(run, **(settings | changes), batch_size=4, rounds=3, device="cpu", as_json=as_json)


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    out = capsys.readouterr().out
    return json.loads(out, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


@pytest.mark.slow
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


@pytest.mark.slow
def test_distortion_is_how_far_merging_moves_the_features(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep("runs/mlip", rates=[0.25, 0.5], methods=["tome", "guided"])
    [dataset] = printed(capsys)["datasets"]
    loaded = load_run("runs/mlip", device="cpu")
    pictures = open_benchmark(find_benchmark("shards:data/colors"))
    batch = next(
        iter(batches(pictures, range(1), data=Data(train=(), image_size=32), batch_size=24, read_ahead=False))
    )[0]
    model = loaded.model
    with torch.no_grad():
        unmerged = model.encode_image(batch, model.merge_plan(0.0)).double()
        for found in dataset["distortion"]:
            merged = model.encode_image(batch, model.merge_plan(found["rate"], found["method"])).double()
            distances = [1 - float(a @ b / (a.norm() * b.norm())) for a, b in zip(unmerged, merged, strict=True)]
            assert found["n"] == 24
            assert found["mean"] == pytest.approx(np.mean(distances), abs=1e-6)
            assert found["p95"] == pytest.approx(np.quantile(distances, 0.95), abs=1e-6)
    assert [(d["method"], d["rate"]) for d in dataset["distortion"]] == [
        ("tome", 0.25), ("tome", 0.5), ("guided", 0.25), ("guided", 0.5)]  # fmt: skip


@pytest.mark.slow
def test_the_result_and_a_new_page_stay_in_the_run(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(merge_sweep, "rebuild", rebuild)
    sweep("runs/mlip/checkpoints/step_0000008")
    assert "shards:data/colors" in (place / "runs/mlip/report.html").read_text("utf-8")
    assert json.loads((place / "runs/mlip/evals/merge_sweep_step_0000008.json").read_text()) == printed(capsys)


def test_the_newest_run_is_named(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="mlip_cli"):
        loaded = load_run(None, device="cpu")
        load_run("runs/mlip", device="cpu")
    assert caplog.messages == [f"run {loaded.run.folder}, the newest with a checkpoint"]


def test_ctrl_c_says_that_nothing_was_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep_module, "measure_sweep", interrupted)
    with pytest.raises(Stopped, match=r"^interrupted; nothing was written$") as stop:
        sweep("runs/clip")
    assert stop.value.exit_code == 130
    assert not (place / "runs/clip/evals").exists()


def test_the_result_is_kept_where_nobody_reads_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(merge_sweep, "print_json", leave)
    with pytest.raises(BrokenPipeError):
        sweep("runs/clip")
    assert (place / "runs/clip/evals/merge_sweep_step_0000008.json").is_file()


def test_a_plain_clip_is_swept_at_the_default_places(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep("runs/clip")
    result = printed(capsys)
    assert result["datasets"] == []
    assert [p["method"] for p in result["points"]] == [None, "guided"]
    assert result["points"][1]["tokens_per_block"][-1] == 8


@pytest.mark.slow
def test_tables(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep("runs/mlip", as_json=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("the rounds of ")]
    assert " ".join(lines[0].split()) == "method rate true rate GFLOPs images/s x rate 0 (95 %) by FLOPs peak GiB"
    assert lines[1].startswith("none       0      0.000  ")
    assert lines[2].startswith("guided   0.5      0.500  ")
    assert lines[3].endswith("; median of 3 rounds with all settings in turn")
    assert [" ".join(line.split()) for line in lines[4:9]] == [
        "", "method rate tokens in each block", "none 0 4 x 16", "guided 0.5 16, 11, 2 x 8", "",
    ]  # fmt: skip
    assert "24 pictures, 8 classes: chance 12.5 %; in brackets: 95 % intervals" in lines
    assert any(line.startswith("method  rate  same class %  won  lost") for line in lines)
    assert max(len(line) for line in lines if line.startswith(("method", "none", "guided"))) <= 80


def test_rounds_that_scatter_are_named_below_the_speeds(capsys: pytest.CaptureFixture[str]) -> None:
    print_sweep(sweep_result({None: (1.0, 1.0), "guided": (0.8, 1.21), "tome": (0.9, 1.35)}))
    lines = capsys.readouterr().out.splitlines()
    assert lines[5] == "the rounds of guided 0.5 differ much: the machine had other work; repeat, or raise --rounds"
    assert lines[6] == ""


@pytest.mark.slow
def test_tables_of_retrieval(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep("runs/pairs", as_json=False)
    lines = capsys.readouterr().out.splitlines()
    words = r"24 pictures, 48 captions: chance [\d.]+/[\d.]+/[\d.]+ %; in brackets: 95 % intervals"
    assert sum(bool(re.fullmatch(words, line)) for line in lines) == 2
    assert sum(line.startswith("guided   0.5") for line in lines) == 5  # speed, tokens, distortion, two directions
    assert sum(line.startswith(("image to text  guided", "text to image  guided")) for line in lines) == 2
    assert max(len(line) for line in lines if line.startswith(("method", "none", "guided"))) <= 80


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["guded"]}, "--methods guded: not a method to sweep; use guided or tome"),
        ({"methods": ["tome", "random_drop"]}, "--methods random_drop: not a method to sweep; use guided or tome"),
        ({"rates": [0.3, 0.9]}, "merge rate 0.9: the merge before block 2 would take 16 tokens to 5"),
        ({"datasets": ["digit"]}, "unknown data set 'digit'; did you mean digits?"),
        ({"datasets": ["validation"]}, "validation: the recipe of mlip has no data.validation"),
        ({"datasets": ["openmoji"]}, "openmoji: no prepared data in data/openmoji/test"),
    ],
)
def test_mistakes_show_before_anything_is_measured(
    place: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(sweep_module, "measure_sweep", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(UsageError) as error:
        sweep("runs/mlip", **changes)
    assert str(error.value).startswith(message)
    assert not (place / "runs/mlip/evals").exists()


def merge_pictures(place: Path) -> dict[str, Any]:
    return json.loads((place / "runs/mlip/evals/merge_pictures_step_0000008.json").read_text())


@pytest.mark.slow
def test_merge_pictures_of_every_setting(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep("runs/mlip", methods=["tome", "guided"], rates=[0.5, 0.25], num_pictures=3)
    capsys.readouterr()
    result = merge_pictures(place)
    assert (result["kind"], result["dataset"], result["grid"], result["image_size"]) == (
        "merge_pictures", "shards:data/colors", [4, 4], 32,
    )  # fmt: skip
    model = load_run("runs/mlip", device="cpu").model
    numbers = [picture["number"] for picture in result["points"][0]["pictures"]]
    assert numbers == numbers_at_random(3, 24) == sorted(set(numbers))
    files = set()
    for point in result["points"]:
        plan = model.merge_plan(point["rate"], point["method"])
        assert point["true_rate"] == plan.rate
        assert point["stages"] == [{"block": block, "tokens": tokens} for block, tokens in plan.merges.items()]
        assert [picture["number"] for picture in point["pictures"]] == numbers
        for picture in point["pictures"]:
            assert picture["label"] == COLORS[picture["number"] % len(COLORS)]
            assert len(picture["stages"]) == len(plan.at)
            files.add(picture["image"])
            for stage in picture["stages"]:
                assert (stage["mixed"] is None) == (point["method"] == "tome")
                files |= set(stage.values()) - {None}
    assert [(p["method"], p["rate"]) for p in result["points"]] == [
        ("tome", 0.25), ("tome", 0.5), ("guided", 0.25), ("guided", 0.5),
    ]  # fmt: skip
    assert files == pictures_of(place)
    assert len(files) == 3 + 3 * (2 * 2 * 1 + 2 * 2 * 4)
    with Image.open(place / "runs/mlip" / result["points"][2]["pictures"][0]["stages"][0]["groups"]) as image:
        assert image.size == (192, 192)


def pictures_of(place: Path) -> set[str]:
    """Files in the folder of merge pictures, as paths from the run folder."""
    return {
        path.relative_to(place / "runs/mlip").as_posix() for path in (place / "runs/mlip/pictures").glob("merging_*/*")
    }


@pytest.mark.slow
def test_panels_show_the_groups_of_the_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep("runs/mlip", num_pictures=1)
    capsys.readouterr()
    [point] = merge_pictures(place)["points"]
    [picture] = point["pictures"]
    loaded = load_run("runs/mlip", device="cpu")
    sample = open_prepared(place / "data/colors").read(picture["number"])
    panels = panel_pictures(decode(open_picture(sample.image))[None])
    stages = loaded.model.merge_stages(decode(open_picture(sample.image))[None], loaded.model.merge_plan(0.5))
    for drawn, stage in zip(picture["stages"], stages, strict=True):
        for path, expected in (
            (drawn["groups"], draw_groups(panels, stage.groups, (4, 4))),
            (drawn["mixed"], draw_guidance(panels, stage.mixed, (4, 4))),
        ):
            with Image.open(place / "runs/mlip" / path) as image:
                assert torch.equal(pil_to_tensor(image)[None], expected)


@pytest.mark.slow
def test_a_new_sweep_replaces_the_pictures_of_the_old_one(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep("runs/mlip", methods=["tome"], num_pictures=2)
    before = pictures_of(place)
    sweep("runs/mlip", methods=["guided"], num_pictures=1)
    after = pictures_of(place)
    assert len(after) == 1 + 2 * 4
    assert not after & before
    sweep("runs/mlip", methods=["tome"], rates=[0.0], num_pictures=1)
    assert pictures_of(place) == after
    capsys.readouterr()


@pytest.mark.slow
def test_the_validation_set_is_swept_where_no_other_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep("runs/pairs", num_pictures=2)
    [dataset] = printed(capsys)["datasets"]
    assert (dataset["dataset"], dataset["task"], dataset["n"], dataset["num_texts"]) == (
        "validation",
        "retrieval",
        24,
        48,
    )
    loaded = load_run("runs/pairs", device="cpu")
    evaluator, *_ = training_evaluators(
        loaded.recipe, loaded.tokenizer, validation_pairs(loaded.recipe, loaded.tokenizer, device="cpu")
    )
    for point in dataset["points"]:
        values = evaluator.measure(at_rate(loaded.model, point["rate"]), lambda _: None).values
        for way in ("image_to_text", "text_to_image"):
            for k in (1, 5, 10):
                name = f"r{k}"
                assert point[way][name] == values[f"validation_{way}_{name}"]
                gain = point[way][name] - dataset["points"][0][way][name]
                assert point["paired"][f"{way}_{name}"]["difference"] == pytest.approx(gain)
            low, high = point[way]["r5_interval"]
            assert low <= point[way]["r5"] <= high
    pictures = json.loads((place / "runs/pairs/evals/merge_pictures_step_0000008.json").read_text())
    assert pictures["dataset"] == "validation"
    assert all(" " in picture["label"] for picture in pictures["points"][0]["pictures"])
    assert len(dataset["points"][1]["paired"]) == 6


@pytest.mark.slow
def test_a_data_set_that_fails_is_a_row_and_the_rest_is_kept(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = next((make_dataset(place / "data" / "cut", n=24)).glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:9000])
    with pytest.raises(RunError) as error:
        sweep("runs/mlip", datasets=["shards:data/cut", "openmoji", "shards:data/colors"], num_pictures=1)
    result = printed(capsys)
    assert result == json.loads((place / "runs/mlip/evals/merge_sweep_step_0000008.json").read_text())
    assert [dataset["dataset"] for dataset in result["datasets"]] == ["shards:data/colors"]
    assert [failed["dataset"] for failed in result["failed"]] == ["openmoji", "shards:data/cut"]
    assert result["failed"][0]["error"].startswith("openmoji: no prepared data in data/openmoji/test")
    assert str(error.value).startswith("2 of 3 data sets could not be measured: openmoji: no prepared data")
    assert merge_pictures(place)["dataset"] == "shards:data/colors"


def attributed(folder: Path, text: str) -> None:
    """Add what a licence asks for to the card of a data set."""
    card = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(card | {"provenance": {"attribution": text}}))


@pytest.mark.slow
@pytest.mark.parametrize("names", [["shards:data/colors"], ["validation"]])
def test_merge_pictures_carry_what_the_licence_asks_for(
    place: Path, capsys: pytest.CaptureFixture[str], names: list[str]
) -> None:
    wanted = find_wanted(names, root=None, own="validation")
    [dataset], _ = open_datasets(load_run("runs/pairs", device="cpu"), wanted, batch_size=4)
    assert dataset.attribution == ()
    attributed(place / "data/colors", "All colours designed by us. License: CC BY 4.0")
    sweep("runs/pairs", datasets=names, num_pictures=1)
    result = json.loads((place / "runs/pairs/evals/merge_pictures_step_0000008.json").read_text())
    assert result["attribution"] == ["All colours designed by us. License: CC BY 4.0"]
    assert printed(capsys)["datasets"][0]["fingerprint"]


def test_a_validation_picture_that_cannot_be_decoded_is_a_failure_with_its_place(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = find_wanted(["validation"], root=None, own="validation")
    [dataset], _ = open_datasets(load_run("runs/pairs", device="cpu"), wanted, batch_size=4)

    def broken(_: object, **__: object) -> Tensor:
        raise RejectedPictureError("damaged picture", "cut off")

    monkeypatch.setattr(loader, "decode", broken)
    with pytest.raises(FAILURES, match=r"data/colors/train-00000.\.tar: sample .*: damaged picture: cut off"):
        dataset.choose(1)


@pytest.mark.slow
def test_speeds_are_kept_where_the_recipes_only_data_set_is_gone(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(place / "runs/moved", small_recipe(evaluate={"zeroshot": ["openmoji"]}))
    with pytest.raises(RunError) as error:
        sweep("runs/moved", as_json=False, num_pictures=1)
    assert str(error.value).startswith("1 of 1 data set could not be measured: openmoji: no prepared data")
    out = capsys.readouterr().out
    assert "guided   0.5" in out
    assert out.splitlines()[-1].startswith("openmoji: not evaluated: no prepared data in data/openmoji/test")
    result = json.loads((place / "runs/moved/evals/merge_sweep_step_0000008.json").read_text())
    assert [len(result["points"]), result["datasets"]] == [2, []]
    assert result["kind"] == "merge_sweep"
    assert datetime.fromisoformat(result["measured_at"]).utcoffset() == timedelta(0)


def test_from_the_command_line_with_its_default_rates(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["mlip", "merge-sweep", "runs/clip", "--rounds", "5", "--batch-size", "2", "--json"]
    )
    assert exit_code(cli.app) == 0
    assert [p["rate"] for p in printed(capsys)["points"]] == [0, 0.3, 0.5]


def test_agreement_is_of_whole_class_numbers() -> None:
    assert agreement("3 11 0 2", "3 1 0 2") == 0.75


def test_methods_are_those_of_the_recipe_that_merge() -> None:
    assert set(SWEPT_METHODS) == set(merge_plan.METHODS) - {"random_drop"}


@pytest.mark.slow
def test_a_run_that_dropped_patches_is_swept_as_guided(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merging = {"method": "random_drop", "guidance": "spatial", "strength": 1.0, "at": [1]}
    make_run(place / "runs" / "flip", small_recipe(mlip=False, model={"merging": merging}))
    sweep("runs/flip")
    points = printed(capsys)["points"]
    assert [(p["method"], p["rate"]) for p in points] == [(None, 0.0), ("guided", 0.5)]
    assert points[1]["tokens_per_block"] == [16, 13, 10, 8]
    model = load_run("runs/flip", device="cpu").model
    assert at_rate(model, None).plan == at_rate(model, 0.0).plan
    assert (at_rate(model, 0.5).plan.guidance, at_rate(model, 0.5).plan.strength) == ("spatial", 1.0)
