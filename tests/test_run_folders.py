"""Run folders as killed processes, other disks and other people leave them: a run goes on, or the message says how."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_for_tests import mlip
from models_for_tests import make_run, small_model, small_recipe, small_training
from shards_for_tests import make_dataset

from mlip_cli import __version__
from mlip_cli.errors import UsageError
from mlip_cli.files import write_json
from mlip_cli.paths import check_can_be_made
from mlip_cli.recipe.config import Keep, Recipe
from mlip_cli.recipe.load import absolute_paths, recipe_yaml
from mlip_cli.runs.folder import Run, holds_nothing, sweep
from mlip_cli.runs.moved_data import changed_data
from mlip_cli.runs.start import choose_start
from mlip_cli.train import resume
from mlip_cli.train.facts import resume_facts

DEAD = 2**22 + 1
"""No process has this number: Linux ends below."""


def put(folder: Path, name: str) -> None:
    """A file; a name that ends in / is a folder, and NAME->TARGET is a link."""
    path, arrow, target = name.partition("->")
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    if arrow:
        (folder / path).symlink_to(target)
    elif path.endswith("/"):
        (folder / path).mkdir()
    else:
        (folder / path).write_text("x")


@pytest.mark.parametrize(
    ("names", "is_free"),
    [
        ([], True),
        ([f".recipe.yaml.{DEAD}.tmp"], True),
        ([".recipe.yaml.1.tmp", ".run.json.22.tmp"], True),
        ([".recipe.yaml.1.tmp", "mine"], False),
        ([".recipe.yaml.tmp"], False),
        (["recipe.yaml.1.tmp"], False),
        (["checkpoints/"], False),
    ],
)
@pytest.mark.parametrize("resumes", [True, False])
def test_a_folder_of_our_own_temporary_files_is_an_empty_one(
    tmp_path: Path, names: list[str], is_free: bool, resumes: bool
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in names:
        put(folder, name)
    assert holds_nothing(folder) == is_free
    if is_free:
        assert not choose_start(small_recipe(), "x", out=folder, resume=resumes).resumes
    else:
        with pytest.raises(UsageError, match="not a run folder" if resumes else "exists already"):
            choose_start(small_recipe(), "x", out=folder, resume=resumes)


def test_a_run_folder_may_be_a_link_to_a_folder_and_no_link_to_nothing(tmp_path: Path) -> None:
    put(tmp_path, "run->elsewhere")
    with pytest.raises(UsageError) as error:
        check_can_be_made(tmp_path / "run", option="--out")
    assert str(error.value) == (
        f"--out {tmp_path}/run: {tmp_path}/run is a link to nothing; make the folder that it names, or remove the link"
    )
    (tmp_path / "elsewhere").mkdir()
    assert not choose_start(small_recipe(), "x", out=tmp_path / "run", resume=True).resumes


def test_temporary_files_of_killed_processes_are_swept_and_no_others(tmp_path: Path) -> None:
    parent = os.getppid()  # it lives
    for name in (
        f".run.json.{DEAD}.tmp",
        f".report.html.{os.getpid()}.tmp",  # the number was given again
        f"evals/.a.json.{DEAD}.tmp",
        f"pictures/gallery/.a.webp.{DEAD}.tmp",
        f".link.{DEAD}.tmp->mine",
        f"evals/.b.json.{parent}.tmp",
        f"elsewhere/.c.{DEAD}.tmp",
        "run.tmp",
        ".tmp",
        "mine",
    ):
        put(tmp_path / "other" if name.startswith("elsewhere") else tmp_path / "run", name)
    put(tmp_path / "run", "away->../other/elsewhere")
    sweep(Run(tmp_path / "run"))
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if not path.is_dir()}
    assert left == {"run/mine", "run/run.tmp", "run/.tmp", f"run/evals/.b.json.{parent}.tmp"} | {
        f"other/elsewhere/.c.{DEAD}.tmp"
    }


# data that moved ------------------------------------------------------------------------------------------------------


def recipe_on(*train: Path, format: str = "shards", validation: Path | None = None) -> Recipe:
    data: dict[str, Any] = {
        "train": [{"path": str(path), "format": format} for path in train],
        "validation": validation and str(validation),
        "cache": {"folder": str(train[0].parent / "cache")},
    }
    return small_recipe(data=data)


def begun(folder: Path, recipe: Recipe) -> Run:
    """A run on this data with one checkpoint."""
    from mlip_cli.data.open import open_sources
    from mlip_cli.runs.recording import data_cards

    make_run(folder, absolute_paths(recipe))
    opened = [open_sources(own or (), cache=recipe.data.cache) for own in (recipe.data.train, recipe.data.validation)]
    write_json(folder / "data.json", data_cards(*opened))
    return Run(folder)


@pytest.mark.parametrize("format", ["shards", "webdataset"])
def test_the_fingerprint_decides_whether_data_that_lies_elsewhere_is_the_same(tmp_path: Path, format: str) -> None:
    first, second = (make_dataset(tmp_path / name, n=8, seed=seed) for name, seed in (("a", 0), ("b", 1)))
    run = begun(tmp_path / "run", recipe_on(first, second, format=format, validation=second))
    moved = [shutil.copytree(path, tmp_path / f"job2-{path.name}") for path in (first, second)]
    again = recipe_on(*moved, format=format, validation=moved[1])
    start = choose_start(again, "x", out=run.folder, resume=True)
    assert start.resumes
    assert resume_facts(start, 8)[-2:] == [
        f"data.train: the same data lies elsewhere now: {first} -> {moved[0]}, {second} -> {moved[1]}",
        f"data.validation: the same data lies elsewhere now: {second} -> {moved[1]}",
    ]
    for other, key in (
        (recipe_on(*moved[::-1], format=format, validation=second), "training"),
        (recipe_on(first, second, format=format, validation=moved[0]), "validation"),
    ):
        with pytest.raises(UsageError) as error:
            choose_start(other, "x", out=run.folder, resume=True)
        old, new = (second, moved[0]) if key == "validation" else (first, moved[1])
        said = str(error.value)
        assert said.startswith(
            f"--resume {run.folder}: this is not the data that the run began with: {old} (fingerprint "
        )
        assert f" is now {new} (fingerprint " in said
        assert said.endswith("; name that data, or start a new run with another --out")


def test_more_or_less_data_and_another_format_are_another_recipe(tmp_path: Path) -> None:
    first, second = (make_dataset(tmp_path / name, n=8, seed=seed) for name, seed in (("a", 0), ("b", 1)))
    run = begun(tmp_path / "run", recipe_on(first, validation=second))
    for other in (
        recipe_on(first, second, validation=second),
        recipe_on(first, format="webdataset", validation=second),
        recipe_on(first),
    ):
        with pytest.raises(UsageError, match="the recipe differs from the one this run began with"):
            choose_start(other, "x", out=run.folder, resume=True)


def test_the_newest_run_of_other_data_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = (make_dataset(tmp_path / name, n=8, seed=seed) for name, seed in (("a", 0), ("b", 1)))
    run = begun(tmp_path / "runs" / "x", recipe_on(first))
    assert not choose_start(recipe_on(second), "x", out=None, resume=True).resumes
    moved = shutil.move(first, tmp_path / "moved")
    assert choose_start(recipe_on(Path(moved)), "x", out=None, resume=True).run.folder.resolve() == run.folder


def test_words_for_data_that_changed() -> None:
    a, b = ("/a", "1" * 20), ("/b", "2" * 20)
    assert changed_data([a], [("/elsewhere", "1" * 20)]) == ""
    assert changed_data([a, b], [a, ("/b", "3" * 20)]) == (
        "/b (fingerprint 2222222222222222) is now /b (fingerprint 3333333333333333)"
    )
    assert changed_data([a], [a, b]) == "no data set is now /b (fingerprint 2222222222222222)"


def test_one_folder_by_two_names_is_one_data_set(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "a", n=8)
    put(tmp_path, "link->a")
    (tmp_path / "r.yaml").write_text(recipe_yaml(small_recipe()))
    for one, other, message in (
        ("a", "./a/", "error: command line: data.train=[a, ./a/]: ./a/ is listed twice, also as a"),
        ("a", str(data), f"error: command line: data.train=[a, {data}]: {data} is listed twice, also as a"),
        ("a", "link", "error: command line: data.train=[a, link]: link is listed twice, also as a"),
    ):
        done = mlip("pretrain", "r.yaml", f"data.train=[{one}, {other}]", "--out", "run", folder=tmp_path)
        assert (done.returncode, done.stderr.splitlines()[-1]) == (2, message)


# room -----------------------------------------------------------------------------------------------------------------


def test_room_for_checkpoints_is_looked_at_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    training = small_training(small_model(dtype=torch.float32))
    config = small_recipe().train.model_copy(update={"keep": Keep(last=2)})
    for parameter in training.plain.parameters():
        parameter.grad = torch.zeros_like(parameter)
    training.optimizer.step()  # without one it has no moments
    resume.Saver(tmp_path / "c", config, training, data={}, best_metric=None).save(resume.Progress(step=1))
    [checkpoint] = (tmp_path / "c").iterdir()
    written = sum(path.stat().st_size for path in checkpoint.iterdir())
    size = resume.checkpoint_bytes(training)
    assert size == pytest.approx(written, rel=0.1)

    def checked(free: float, folder: str) -> str:
        caplog.clear()
        disk = shutil.disk_usage(tmp_path)._replace(free=int(free * size))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
        try:
            resume.check_room(tmp_path / folder, training, config, steps=100)
        except UsageError as error:
            return str(error)
        return "".join(caplog.messages)

    assert checked(3.1, "new/checkpoints") == ""
    assert checked(2.1, "c") == ""
    assert "the checkpoints that train.keep asks for take about" in checked(2.9, "new/checkpoints")
    assert checked(0.9, "new/checkpoints").endswith("free on this disk; make room, or name another --out")
    assert checked(0.9, "c").endswith("free on this disk; make room and go on with --resume")


# damage ---------------------------------------------------------------------------------------------------------------

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "half": lambda whole: whole[: len(whole) // 2],
    "zeros": lambda whole: bytes(len(whole)),
    "a list": lambda whole: b"[]",
    "null": lambda whole: b"null",
    "no text": lambda whole: b"\xff\xfe{",
    "deep": lambda whole: b"[" * 100_000,
    "wrong types": lambda whole: json.dumps({key: [[]] for key in json.loads(whole)}).encode(),
    "wrong values": lambda whole: json.dumps(dict.fromkeys(json.loads(whole), "\x1b[31m")).encode(),
}
CURES = {"run.json": "remove it: ", "data.json": "remove it: ", "evals/sweep.json": "remove it, or measure again"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with all files of JSON, and its recipe beside it."""
    folder = tmp_path_factory.mktemp("damaged")
    data = make_dataset(folder / "train", n=8)
    recipe = small_recipe(train=str(data), evaluate={"zeroshot": []}, data={"num_workers": 0})
    (folder / "r.yaml").write_text(recipe_yaml(recipe))
    run = begun(folder / "run", recipe)
    session = {"command": "mlip", "started": "", "from_step": 0, "device": "cpu", "ranks": 1, "threads": 1}
    write_json(run.stamp, {"mlip_version": __version__, "end_reason": "finished", "data": {}, "sessions": [session]})
    run.metrics.write_text('{"step": 8, "loss": 1.5}\n')
    from results_for_tests import sweep_result

    sweep_result({None: (1.0, 1.0)}).write(run.evals / "sweep.json")
    return folder


def damaged(made: Path, tmp_path: Path, name: str, damage: str) -> Path:
    shutil.copytree(made / "run", tmp_path / "run")
    path = tmp_path / "run" / name
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    return path


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", CURES)
def test_a_damaged_file_of_a_run_is_named_with_its_cure(
    made: Path, tmp_path: Path, name: str, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pages_for_tests import without_curves

    without_curves(monkeypatch)
    path = damaged(made, tmp_path, name, damage)
    shown = mlip("report", str(tmp_path / "run"))
    assert shown.returncode == 0, shown.stderr
    line = next(line for line in shown.stderr.splitlines() if f"warning: {path}: cannot be read (" in line)
    assert f"); left out of the report; {CURES[name]}" in line
    assert "\x1b" not in shown.stderr
    resumed = mlip("pretrain", str(made / "r.yaml"), "--out", str(tmp_path / "run"), "--resume")
    if name == "run.json":
        assert resumed.returncode == 2, resumed.stderr
        assert resumed.stderr.startswith(f"error: {path}: damaged (")
        assert CURES[name] in resumed.stderr
        path.unlink()
    else:
        assert (resumed.returncode, resumed.stdout) == (0, f"{tmp_path / 'run'}\n")


@pytest.mark.parametrize("damage", [name for name in DAMAGES if not name.startswith(("wrong", "deep"))])
def test_a_damaged_recipe_of_a_run_is_named_by_every_command(made: Path, tmp_path: Path, damage: str) -> None:
    path = damaged(made, tmp_path, "recipe.yaml", damage)
    run = str(tmp_path / "run")
    dataset = ["--dataset", f"shards:{made / 'train'}"]
    for command in (
        ["eval-zeroshot", run, "--device", "cpu"],
        ["merge-sweep", run, *dataset, "--device", "cpu"],
        ["profile", run, "--device", "cpu"],
        ["pretrain", str(made / "r.yaml"), "--out", run, "--resume"],
    ):
        done = mlip(*command)
        assert done.returncode == 2, done.stderr
        assert done.stderr.splitlines()[-1] == (
            f"error: {path}: damaged; restore it from a copy: it says what the weights of this run are"
        )
        assert re.search(rf"error: {re.escape(str(path))}:\d+: ", done.stderr)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_lines_of_metrics_are_named(made: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(made / "run", tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + DAMAGES[damage](whole.strip()) + b"\n" + whole)
    done = mlip("pretrain", str(made / "r.yaml"), "--out", str(tmp_path / "run"), "--resume", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"] == {"step": 8, "loss": 1.5}
    assert f"warning: {path}:2: not a line of metrics; delete the line\n" in done.stderr
    path.write_bytes(DAMAGES[damage](whole.strip()) + b"\n")
    done = mlip("pretrain", str(made / "r.yaml"), "--out", str(tmp_path / "run"), "--resume", "--json")
    assert (done.returncode, "no line of metrics is left" in done.stderr) == (1, True)
