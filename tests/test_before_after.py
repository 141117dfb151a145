"""`evaluate.at_start`: step 0 is measured once, changes no bit of the training, and the run says what changed since."""

import json
import os
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks_for_tests import mlip
from killed_for_tests import Forked, metrics
from killed_for_tests import pretrain as run_pretrain
from models_for_tests import small_recipe
from PIL import Image
from shards_for_tests import make_dataset

from mlip_cli.evaluate.before_after import (
    Answers,
    BeforeAfter,
    QuestionSet,
    change_of,
    keep_answers,
    place_of,
    read_changes,
)
from mlip_cli.evaluate.statistics import Interval, paired_interval
from mlip_cli.recipe.load import recipe_yaml
from mlip_cli.report.before_after import changes_sentence
from mlip_cli.report.record import read_run
from mlip_cli.runs.checkpoint import load_state, load_weights
from mlip_cli.runs.folder import Run

QUIET = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small recipe that evaluates step 0 on its validation pairs and on a folder of classes."""
    folder = tmp_path_factory.mktemp("at_start")
    data = make_dataset(folder / "train", n=24)
    for name in ("red", "green", "blue"):
        (folder / "classes" / name).mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (32, 32 + number), name).save(folder / "classes" / name / f"{number}.png")
    made = small_recipe(
        mlip=False,
        train=str(data),
        data={"num_workers": 1, "validation": str(data), "augment": {"color_jitter": 0.2}},
        model={"text": {"width": 32, "depth": 2, "num_heads": 2, "context_length": 16, "dropout": 0.1}},
        log={"every_steps": 1},
        evaluate={"every_steps": 4, "at_start": True, "zeroshot": [f"folder:{folder / 'classes'}"]},
    )
    (folder / "small.yaml").write_text(recipe_yaml(made))
    return folder / "small.yaml"


@pytest.fixture(scope="module")
def whole(recipe: Path) -> tuple[Path, Any]:
    """A run that was never stopped, and what it said."""
    folder = recipe.parent / "whole"
    done = mlip(["pretrain", str(recipe), "--out", str(folder), "--json"], environment=QUIET)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.mark.slow
def test_step_0_is_a_line_of_measures_and_changes_no_bit(recipe: Path, whole: tuple[Path, Any]) -> None:
    folder, _ = whole
    lines = metrics(folder)
    assert lines[0]["step"] == 0
    assert lines[0]["samples_seen"] == 0
    assert "loss" not in lines[0]
    assert lines[0].keys() == lines[-1].keys()
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_0000008"]
    other = recipe.parent / "without"
    done = mlip(["pretrain", str(recipe), "evaluate.at_start=false", "--out", str(other)], environment=QUIET)
    assert done.returncode == 0, done.stderr
    assert metrics(other) == lines[1:]
    own, without = (load_weights(run / "checkpoints" / "step_0000008") for run in (folder, other))
    assert all(torch.equal(own[name], without[name]) for name in own)
    assert not place_of(Run(other)).exists()


@pytest.mark.slow
def test_the_run_says_what_changed(whole: tuple[Path, Any]) -> None:
    folder, done = whole
    kept = read_changes(Run(folder))
    assert kept is not None
    assert kept.step == 8
    sentence = changes_sentence(kept)
    assert sentence is not None
    assert sentence.startswith("From step 0 to step 8 ")
    assert done.stderr.splitlines()[-2] == sentence
    assert "step 8 beside step 0" in done.stderr
    found = json.loads(done.stdout)["before_after"]
    assert found == json.loads(json.dumps(kept.changes_as_json()))
    lines = metrics(folder)
    for change in kept.changes:
        key = {"acc1": f"{'_'.join(change.dataset.replace(':', '/').split('/'))}_acc1"}.get(change.measure)
        if key is None:
            key = f"validation_{change.measure}"
            assert (lines[0][key], lines[-1][key]) == (change.before, change.after)
        assert change.test.difference == pytest.approx(change.after - change.before)
    page = (folder / "report.html").read_text()
    assert page.count(sentence.replace("'", "&#x27;")) == 2  # in the opening, and beside its table
    reported = mlip(["report", str(folder), "--json"], environment=QUIET)
    assert json.loads(reported.stdout)["before_after"] == {str(folder): found}
    assert read_run(folder).damaged == []


def ended_at_start(arguments: Sequence[str], environment: dict[str, str], words: str, *, number: int) -> None:
    """Body of a forked process: a training that gets a signal while it evaluates step 0."""
    from mlip_cli.commands import training

    measure = training.measure

    def measured(*given: Any, **named: Any) -> dict[str, float] | None:
        if given[3] == 0:
            os.kill(os.getpid(), number)
        return measure(*given, **named)

    training.measure = measured  # type: ignore[assignment]
    run_pretrain(arguments, environment, words)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_at_step_0_saves_and_step_0_is_measured_on_resume(
    recipe: Path, whole: tuple[Path, Any], tmp_path: Path, ranks: int
) -> None:
    folder = tmp_path / "run"
    arguments = [str(recipe), "--out", str(folder)]
    body = partial(ended_at_start, number=signal.SIGTERM)
    with Forked(arguments, tmp_path / "words", ranks, body=body) as training:
        assert training.join() == [143] * ranks, training.said()
        said = training.said()
    assert f"stopped after step 0 of 8, saved in {folder}; go on with:" in said
    assert metrics(folder) == []
    assert load_state(folder / "checkpoints" / "step_0000000")["progress"]["measured_step"] == -1
    with Forked([*arguments, "--resume"], tmp_path / "words", ranks) as training:
        assert training.join() == [0] * ranks, training.said()
    lines, expected = metrics(folder), metrics(whole[0])
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    if ranks == 1:
        assert lines == expected
        assert read_changes(Run(folder)) is not None
    assert lines[0] == pytest.approx(expected[0], abs=1e-5)


@pytest.mark.slow
def test_a_run_that_goes_on_later_does_not_measure_step_0_again(
    recipe: Path, whole: tuple[Path, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    early = ["train.checkpoint_every.steps=2", "train.keep.last=1"]
    with Forked([str(recipe), *early, "--out", str(folder)], tmp_path / "words") as training:
        while not any((folder / "checkpoints").glob("step_*2")):
            assert training.is_at_work(), training.said()
        training.kill()
    done = mlip(["pretrain", str(recipe), *early, "--out", str(folder), "--resume"], environment=QUIET)
    assert done.returncode == 0, done.stderr
    assert "step 0: evaluating" not in done.stderr
    assert "step 0: validation" not in done.stderr
    assert metrics(folder) == metrics(whole[0])
    first, second = (read_changes(Run(own)) for own in (folder, whole[0]))
    assert first is not None
    assert second is not None
    assert first.asked == second.asked


def asked(before: str, after: str, **more: Any) -> QuestionSet:
    values = {"dataset": "digits", "fingerprint": "f", "measure": "acc1", "before": before, "after": after}
    return QuestionSet(**values | more)


def test_the_sentence_says_what_is_shown_and_what_is_not() -> None:
    up = asked("0" * 40 + "1" * 60, "1" * 90 + "0" * 10)
    down = asked("1" * 60 + "0" * 40, "0" * 30 + "1" * 30 + "0" * 40, dataset="openmoji")
    same = asked("01" * 50, "10" + "01" * 49, dataset="folder:x")
    assert changes_sentence(BeforeAfter(step=60, asked=[up, down, same])) == (
        "From step 0 to step 60 it got better at digits top-1 +30.0 points (95 %: +16.8 to +42.0) and worse at "
        "openmoji top-1 -30.0 points (95 %: -38.7 to -20.2); a change is not shown at folder:x top-1 +0.0 points "
        "(95 %: -3.8 to +3.8)."
    )
    assert changes_sentence(BeforeAfter(step=1_060, asked=[same])) == (
        "From step 0 to step 1,060 a change is not shown at folder:x top-1 +0.0 points (95 %: -3.8 to +3.8)."
    )
    assert changes_sentence(BeforeAfter(step=0, asked=[])) is None


def test_answers_to_other_questions_are_not_compared(tmp_path: Path) -> None:
    run = Run(tmp_path)
    keep_answers(run, 4, [Answers(dataset="a", fingerprint="f", measure="acc1", right="01")])
    assert read_changes(run) is None
    kept = [
        Answers(dataset=name, fingerprint="f", measure="acc1", right="01", cluster_of=None) for name in ("a", "b", "c")
    ]
    keep_answers(run, 0, kept)
    keep_answers(
        run,
        4,
        [
            Answers(dataset="a", fingerprint="f", measure="acc1", right="11"),
            Answers(dataset="b", fingerprint="changed", measure="acc1", right="11"),
        ],
    )
    found = read_changes(run)
    assert found is not None
    assert [(change.dataset, change.before, change.after) for change in found.changes] == [("a", 0.5, 1.0)]


def test_a_damaged_file_is_named_and_compares_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.evals.mkdir()
    place_of(run).write_text("{")
    assert read_changes(run) is None


def test_the_interval_of_a_difference_covers_the_truth_in_95_percent() -> None:
    random, rounds, covered, truth = np.random.default_rng(0), 1000, 0, 0.05
    for kinds in random.choice([1, -1, 0], p=[0.15, 0.10, 0.75], size=(rounds, 200)):
        first = "".join("1" if kind == -1 else "0" for kind in kinds)
        other = "".join("1" if kind == 1 else "0" for kind in kinds)
        low, high = paired_interval(first, other)
        covered += low <= truth <= high
    assert 0.93 * rounds <= covered <= 0.98 * rounds


def test_the_interval_of_a_difference_by_clusters() -> None:
    first, other = "0" * 60 + "1" * 40, "1" * 20 + "0" * 40 + "1" * 40
    alone = paired_interval(first, other, list(range(100)))
    assert alone == pytest.approx(paired_interval(first, other), abs=0.015)
    low, high = paired_interval(first, other, [number // 10 for number in range(100)])
    assert high - low > 1.5 * (alone.high - alone.low)  # ten clusters say less than a hundred questions
    assert paired_interval("01", "01", [0, 0]) == Interval(*paired_interval("0", "0"))
    assert paired_interval("0101", "1010", [0, 0, 1, 1]) == paired_interval("00", "00")  # each gains what it loses


def test_a_change_is_shown_only_where_interval_and_test_agree() -> None:
    assert not change_of(asked("0" * 10, "11111" + "0" * 5)).is_shown  # p 0.0625
    assert change_of(asked("0" * 10, "1111111" + "0" * 3)).is_shown
