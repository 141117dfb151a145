"""`mlip eval-zeroshot --task pointing` from run folders to tables, and damaged weights in either task."""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from models_for_tests import make_run, small_model, small_recipe
from PIL import Image, ImageColor
from shards_for_tests import make_dataset

from mlip_cli import cli
from mlip_cli.commands.eval_zeroshot import eval_zeroshot
from mlip_cli.commands.pointing_tables import compared_pointing
from mlip_cli.errors import RunError, UsageError
from mlip_cli.evaluate.mosaics import compose, quadrants
from mlip_cli.evaluate.pointing import right_shares
from mlip_cli.model.pointing import pointing_queries, similarity_maps
from mlip_cli.report.write import rebuild
from mlip_cli.runs.checkpoint import save_checkpoint
from mlip_cli.runs.folder import Run
from mlip_cli.runs.loading import at_rate, load_run

COLORS = ("red", "lime", "blue", "yellow", "cyan", "magenta")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pointing")
    make_run(folder / "runs" / "clip", small_recipe(mlip=False))
    make_run(folder / "runs" / "mlip", small_recipe())
    make_dataset(folder / "shards", n=26)
    for i, name in enumerate(COLORS):
        (folder / "classes" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (20, 20 + i), name).save(folder / "classes" / name / f"{number}.png")
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs and data to write into, as the current folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLIP_DATA", raising=False)
    return tmp_path


def point(
    *runs: str, datasets: Sequence[str], rates: Sequence[float] = (), as_json: bool = True, **changes: Any
) -> None:
    options: dict[str, Any] = {"task": "pointing", "data_root": None, "batch_size": 16, "device": "cpu"} | changes
    eval_zeroshot(runs, datasets=datasets, merge_rates=rates, as_json=as_json, **options)


def test_runs_and_rates_side_by_side(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    point("runs/clip", "runs/mlip", datasets=["folder:classes", "shards:shards"], rates=(0.0, 0.5))
    results = json.loads(capsys.readouterr().out)["results"]
    assert [(r["dataset"], r["run"], r["merge_rate"]) for r in results[:4]] == [
        ("folder:classes", "clip", 0),
        ("folder:classes", "clip", 0.5),
        ("folder:classes", "mlip", 0),
        ("folder:classes", "mlip", 0.5),
    ]
    heads = {"tokens", "frequency_tokens"}
    for result in results:
        is_folder = result["dataset"] == "folder:classes"
        assert result["kind"] == "pointing"
        assert (result["n"], result["num_names"]) == ((12, 6) if is_folder else (26, 24))
        assert result["pointing"].keys() - {"feature"} == (heads if result["run"] == "mlip" else set())
        assert 0 <= result["pointing"]["feature"]["accuracy"] <= 1
        assert not {"right", "mosaic"} & result.keys()
    assert results[3]["compared_to_first"].keys() == {"first", "feature"}
    frequency = [r["pointing"]["frequency_tokens"] for r in results if r["run"] == "mlip"]
    assert frequency[0] == frequency[1]  # they never merge
    assert sorted(path.name.split("-step")[0] for path in Path("runs/mlip/evals").iterdir()) == [
        "pointing-folder_classes",
        "pointing-folder_classes",
        "pointing-shards_shards",
        "pointing-shards_shards",
    ]


def test_names_are_captions_and_scores_those_of_a_plain_computation(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    point("runs/mlip", datasets=["folder:classes"], rates=(0.5,), batch_size=1)
    [result] = json.loads(capsys.readouterr().out)["results"]
    run = load_run("runs/mlip", device="cpu")
    names = sorted(COLORS)
    labels = [i // 2 for i in range(12)]
    mosaics = compose(labels, dataset="classes")
    right = 0.0
    for row, is_asked in zip(mosaics.pictures.tolist(), mosaics.is_asked.tolist(), strict=True):
        image = torch.empty(1, 3, 32, 32, dtype=torch.uint8)
        for tile, picture in enumerate(row):
            y, x = 16 * (tile // 2), 16 * (tile % 2)
            color = torch.tensor(ImageColor.getrgb(names[labels[picture]]), dtype=torch.uint8)
            image[0, :, y : y + 16, x : x + 16] = color[:, None, None]
        ids = run.tokenizer.encode([names[labels[picture]] for picture in row])
        with torch.no_grad():
            queries = {name: vectors[None] for name, vectors in pointing_queries(run.model, ids).items()}
            maps = similarity_maps(run.model, image, queries, at_rate(run.model, 0.5).plan)
        shares = right_shares(maps["tokens"], quadrants((4, 4)))[0]
        right += sum(share for share, asked in zip(shares.tolist(), is_asked, strict=True) if asked)
    assert result["pointing"]["tokens"]["accuracy"] == pytest.approx(right / 12, abs=1e-6)


def test_only_readings_of_both_are_compared() -> None:
    first = {"run": "a", "merge_rate": None, "mosaic": "0 0 1", "right": {"feature": "1 0 0"}}
    other = {**first, "run": "b", "right": {"feature": "1 0.5 1", "tokens": "1 1 1"}}
    [_, found] = compared_pointing([first, other])
    assert found["compared_to_first"].keys() == {"first", "feature"}
    assert found["compared_to_first"]["feature"]["difference"] == pytest.approx(0.5)


def test_what_is_measured_is_read_and_shown(
    place: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    point("runs/clip", "runs/mlip", datasets=["folder:classes"], as_json=False)
    first = capsys.readouterr().out
    caplog.clear()
    with caplog.at_level("INFO", logger="mlip_cli"):
        point("runs/clip", "runs/mlip", datasets=["folder:classes"], as_json=False)
    assert caplog.messages == ["measured already, in evals/ of the runs: 2 rows; to measure: 0"]
    assert capsys.readouterr().out == first
    lines = [" ".join(line.split()) for line in first.splitlines()]
    assert max(map(len, first.splitlines()[:6])) <= 80
    assert lines[0] == "folder:classes: 12 pictures in 3 mosaics of 2 x 2"
    assert lines[1] == "run true rate patches by pointing % against the first"
    assert [line.split("%")[0].split()[:3] for line in lines[2:6]] == [
        ["1", "0.000", "feature"],
        ["2", "0.500", "feature"],
        ["2", "0.500", "tokens"],
        ["2", "0.500", "frequency"],
    ]
    assert lines[6] == (
        "pointing: names whose most similar patch lies in their own picture; chance 25.0 %; 6 names; in brackets: 95 % "
        "intervals, by drawing mosaics again"
    )
    page = Path("runs/mlip/report.html").read_text()
    assert "<h3>folder:classes: pointing</h3>" in page
    assert "Not measured yet" in page  # classification is
    point("runs/mlip", datasets=["folder:classes"], task="classification")
    rebuild(Run(Path("runs/mlip")))
    page = Path("runs/mlip/report.html").read_text()
    assert page.index("<h3>folder:classes</h3>") < page.index("<h3>folder:classes: pointing</h3>")


def test_blank_pictures_tell_nothing_and_break_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in COLORS:
        Image.new("RGB", (20, 20), "white").save(f"classes/{name}/0.png")
        Image.new("RGB", (20, 20), "white").save(f"classes/{name}/1.png")
    point("runs/mlip", datasets=["folder:classes"])
    [result] = json.loads(capsys.readouterr().out)["results"]
    for reading in ("feature", "tokens", "frequency_tokens"):
        low, high = result["pointing"][reading]["accuracy_interval"]
        assert 0 <= low <= result["pointing"][reading]["accuracy"] <= high <= 1


def test_too_few_names_are_wrong_usage(place: Path) -> None:
    for name in COLORS[:3]:
        shutil.rmtree(f"classes/{name}")
    with pytest.raises(UsageError) as error:
        point("runs/mlip", datasets=["folder:classes"])
    assert str(error.value) == (
        "folder:classes: 3 different names, and pointing needs 4; add pictures of other names, or name another data set"
    )


def test_the_command_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["mlip", "eval-zeroshot", "runs/clip", "--dataset", "folder:classes", "--json", "--task"]
    with patch.object(sys, "argv", [*words, "point"]), pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "error: mlip eval-zeroshot: --task: 'point' is not one of 'classification', 'pointing'; "
        "try mlip eval-zeroshot --help\n"
    )
    with patch.object(sys, "argv", [*words, "pointing"]), pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert [r["kind"] for r in json.loads(capsys.readouterr().out)["results"]] == ["pointing"]


@pytest.mark.parametrize(
    ("task", "tower", "n"), [("classification", "image", 12), ("classification", "text", 6), ("pointing", "image", 12)]
)
def test_damaged_weights_are_one_line(place: Path, task: str, tower: str, n: int) -> None:
    weights = small_model(small_recipe(mlip=False), dtype=torch.float32).state_dict()
    weights[f"{tower}_projection.weight"][0, 0] = float("nan")
    save_checkpoint(Path("runs/clip/checkpoints"), step=8, weights=weights, state={"step": 8})
    with pytest.raises(RunError) as error:
        point("runs/clip", datasets=["folder:classes"], task=task)
    assert str(error.value) == (
        f"folder:classes: clip: {n} of {n} {tower} features are not finite; the weights of this checkpoint are "
        "damaged; name an earlier one"
    )
    assert not Path("runs/clip/evals").exists()
