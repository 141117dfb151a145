"""Training whose parameters are spread over the ranks (FSDP2), in real processes."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_for_tests import Forked, pretrain, wait_until
from test_training import assert_alike, lines_in, metrics, recipe, run, whole

from mlip_cli.runs.checkpoint import load_state, load_weights

pytestmark = pytest.mark.slow

__all__ = ["recipe", "whole"]
SHARDED = ("train.parallel=fsdp", "train.checkpoint_every.steps=6")


@pytest.fixture(scope="module")
def sharded(recipe: Path) -> Path:
    """A run on two ranks that was never stopped."""
    folder = recipe.parent / "sharded"
    done = run(recipe, "--out", str(folder), *SHARDED, ranks=2)
    assert done.returncode == 0, done.stderr
    return folder


def stopped_after_6(run: Path, folder: Path) -> Path:
    """A copy of a run as it was after step 6."""
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("recipe.yaml", "metrics.jsonl"):
        (folder / name).write_bytes((run / name).read_bytes())
    (folder / "run.json").write_text(json.dumps(json.loads((run / "run.json").read_text()) | {"end_reason": None}))
    os.symlink(run / "checkpoints" / "step_0000006", folder / "checkpoints" / "step_0000006")
    return folder


def test_sharded_ranks_train_as_one_process_and_save_whole_checkpoints(whole: Path, sharded: Path) -> None:
    assert_alike(metrics(sharded), metrics(whole))
    ours, theirs = (folder / "checkpoints" / "step_0000012" for folder in (sharded, whole))
    shapes = [{n: t.shape for n, t in load_weights(checkpoint).items()} for checkpoint in (ours, theirs)]
    assert shapes[0] == shapes[1]
    states = [load_state(checkpoint)["optimizer"]["state"] for checkpoint in (ours, theirs)]
    assert states[0].keys() == states[1].keys()
    for number, moments in states[1].items():
        assert {n: t.shape for n, t in states[0][number].items()} == {n: t.shape for n, t in moments.items()}


def test_a_sharded_run_continues_to_the_bit_and_on_one_rank(recipe: Path, sharded: Path, tmp_path: Path) -> None:
    again = stopped_after_6(sharded, tmp_path / "again")
    resumed = run(recipe, "--out", str(again), *SHARDED, "--resume", ranks=2)
    assert resumed.returncode == 0, resumed.stderr
    assert metrics(again) == metrics(sharded)
    ours, theirs = (load_weights(f / "checkpoints" / "step_0000012") for f in (again, sharded))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    alone = stopped_after_6(sharded, tmp_path / "alone")
    resumed = run(recipe, "--out", str(alone), "--resume", "train.checkpoint_every.steps=6")
    assert resumed.returncode == 0, resumed.stderr
    assert "ranks 2 -> 1, parallel fsdp -> none" in resumed.stderr
    assert metrics(alone)[-2]["loss"] == pytest.approx(metrics(sharded)[-2]["loss"], rel=2e-3)


def signalled(arguments: Sequence[str], environment: dict[str, str], words: str) -> None:
    """Body of a forked process: `mlip pretrain`, and SIGTERM to rank 0 in the evaluation after step 4."""
    os.environ.update(environment)
    from mlip_cli.commands import training

    measure = training.measure

    def measured(*given: Any, **named: Any) -> dict[str, float] | None:
        if given[3] == 4 and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(*given, **named)

    training.measure = measured
    pretrain(arguments, environment, words)


def test_an_interrupted_evaluation_is_made_up_before_the_first_step(
    recipe: Path, sharded: Path, tmp_path: Path
) -> None:
    folder, words = tmp_path / "run", tmp_path / "words"
    arguments = [str(recipe), "--out", str(folder), *SHARDED]
    with Forked(arguments, words, ranks=2, body=signalled) as training:
        assert training.join() == [143, 143], training.said()
    assert "the evaluation was stopped before its end" in training.said()
    with Forked([*arguments, "--resume"], words, ranks=2) as training:
        assert training.join() == [0, 0], training.said()
    assert metrics(folder) == metrics(sharded)


def test_step_0_is_measured_before_the_first_gathered_block(recipe: Path, sharded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = [str(recipe), "--out", str(folder), *SHARDED, "evaluate.at_start=true"]
    with Forked(arguments, tmp_path / "words", ranks=2) as training:
        assert training.join() == [0, 0], training.said()
    first, *others = metrics(folder)
    assert first["step"] == 0
    assert others == metrics(sharded)


def test_a_signal_to_one_rank_stops_all_after_the_same_step(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    long = ["train.parallel=fsdp", "train.steps=2000", "evaluate.every_steps=null"]
    with Forked([str(recipe), "--out", str(folder), *long], tmp_path / "words", ranks=2) as training:
        wait_until(lambda: lines_in(folder) >= 2, what=training.said())
        os.kill(training.processes[1].pid, signal.SIGTERM)
        assert training.join() == [143, 143], training.said()
        step = metrics(folder)[-1]["step"]
        assert f"stopped after step {step} of 2000, saved in {folder}" in training.said()
    assert [p.name for p in (folder / "checkpoints").iterdir()] == [f"step_{step:07d}"]
