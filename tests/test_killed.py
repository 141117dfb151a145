"""kill -9 at any moment, full disks, weights that are not finite: what is left is whole, and what goes on is exact."""

import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks_for_tests import own_group
from killed_for_tests import (
    FORKS,
    DiskStep,
    Every,
    Forked,
    assert_same_run,
    assert_whole_checkpoint,
    killed_again_and_again,
    last_step,
    leftovers,
    metrics,
    moments,
    pretrain,
    processes_marked,
    torchrun,
    train_on_small_disk,
    trained_whole,
)
from models_for_tests import make_run, small_recipe
from safetensors.torch import save_file
from shards_for_tests import make_dataset
from waits_for_tests import wait_until

from mlip_cli.data.order import Order
from mlip_cli.data.tokenizer import Tokenizer
from mlip_cli.recipe.config import VOCAB_SIZE
from mlip_cli.recipe.load import load_recipe, recipe_yaml
from mlip_cli.runs.checkpoint import load_state, load_weights, remove_leftovers, remove_old_checkpoints, save_checkpoint
from mlip_cli.runs.folder import Run, checkpoint_folders, checkpoint_name, step_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS, EVERY = 20, Every(checkpoint=3, evaluation=4)


def write_recipe(folder: Path, *overrides: str, validation: bool = True, **dataset: Any) -> Path:
    """A small recipe on 40 pictures, 3 steps an epoch, with dropout, whose draws a resumed run goes on with."""
    data = make_dataset(folder / "train", n=40, **dataset)
    path = folder / "small.yaml"
    path.write_text(recipe_yaml(small_recipe(train=str(data))))
    changed = [
        "data.num_workers=0",
        "model.text.dropout=0.1",
        f"train.steps={STEPS}",
        "train.global_batch_size=12",
        f"train.checkpoint_every={{steps: {EVERY.checkpoint}, minutes: null}}",
        "train.keep.last=2",
        "log.every_steps=1",
        *([f"data.validation={data}", f"evaluate.every_steps={EVERY.evaluation}"] if validation else []),
    ]
    path.write_text(recipe_yaml(load_recipe(str(path), [*changed, *overrides]).recipe))
    return path


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("killed"))


Whole = Callable[[int, str], Path]


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Whole:
    """(ranks, precision) -> a run that was never stopped; each is trained once."""
    return lambda ranks, precision: trained_whole(recipe, ranks, precision)


@pytest.mark.parametrize(
    ("ranks", "precision", "num_workers", "during"),
    [
        (1, "bf16", 2, ("evaluation", "step", "checkpoint")),
        (2, "fp32", 1, ("checkpoint", "evaluation")),
    ],
)
def test_a_run_killed_at_any_moment_continues_to_the_bit(
    recipe: Path, whole: Whole, ranks: int, precision: str, num_workers: int, during: Sequence[str], tmp_path: Path
) -> None:
    killed = killed_again_and_again(
        recipe,
        tmp_path / "run",
        [f"train.precision={precision}", f"data.num_workers={num_workers}"],
        ranks=ranks,
        moments=moments(ranks, steps=STEPS, during=during),
        every=EVERY,
    )
    assert set(during) <= {kill.hit for kill in killed} | {"step"}
    assert_same_run(tmp_path / "run", whole(ranks, precision))
    kept = [checkpoint_name(step) for step in (STEPS // EVERY.checkpoint * EVERY.checkpoint, STEPS)]
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == kept


def begin_to_train(arguments: Sequence[str], environment: dict[str, str], words: str) -> None:
    """Body of a forked process: a training that dies by SIGKILL at the call of `os` that the environment numbers.

    Every system call that makes, renames or syncs a file of the run is a moment at which it can be killed.
    """
    count = 0

    def counted(event: str, given: tuple[Any, ...]) -> None:
        nonlocal count
        if event in ("open", "os.mkdir", "os.rename") and arguments[-2] in str(given[0]):
            count += 1
            if count == int(environment["KILL_AT"]):
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(counted)
    pretrain(arguments, {}, words)


def test_the_same_command_works_after_a_kill_in_the_first_moments(recipe: Path, tmp_path: Path) -> None:
    """At each of the first changes of a run folder, and at random times in the first second."""
    folder, words = tmp_path / "run", tmp_path / "words"
    arguments = [str(recipe), "train.steps=2", "evaluate.every_steps=null", "--resume", "--out", str(folder), "--json"]
    found = set()
    for number in range(1, 9):
        if number % 3 == 1:
            shutil.rmtree(folder, ignore_errors=True)
        process = FORKS.Process(target=begin_to_train, args=(arguments, {"KILL_AT": str(number)}, str(words)))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, words.read_text()
        found.add(tuple(sorted(re.sub(r"\d+", "N", path.name) for path in folder.iterdir())) if folder.exists() else ())
    assert (".recipe.yaml.N.tmp",) in found
    draw = random.Random(0)
    for _ in range(3):
        with Forked(arguments, words) as training:
            wait_until(folder.exists, what="it does not begin")
            time.sleep(draw.random())
            training.kill()
    with Forked(arguments, words) as training:
        assert training.join() == [0], training.said()
    assert [line["step"] for line in metrics(folder)] == [1, 2, 2]
    assert leftovers(folder) == []


def save_on_and_on(folder: str) -> None:
    """Body of a forked process: one checkpoint after the other, of which the last one stays."""
    own_group()
    checkpoints = Path(folder)
    steps = [step_of(path) for path in checkpoint_folders(checkpoints)]
    for step in range(max(steps, default=0) + 1, 10_000):
        parts = {"weights": {"a": torch.full((50_000,), float(step))}, "state": {"a": torch.full((50_000,), step)}}
        save_checkpoint(checkpoints, step=step, **parts)
        remove_old_checkpoints(checkpoints, last=1, every_steps=None)


def newest_step(folder: Path) -> int:
    return max((step_of(path) for path in checkpoint_folders(folder)), default=0)


def test_a_kill_at_any_moment_of_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    draw, halves, newest = random.Random(0), 0, 0
    for number in range(8):
        process = FORKS.Process(target=save_on_and_on, args=(str(tmp_path),))
        process.start()
        wait_until(lambda known=newest: newest_step(tmp_path) > known, what="none is saved")
        time.sleep(0.03 * draw.random())
        if number % 2:
            wait_until(lambda: leftovers(tmp_path), what="none is begun")
        process.kill()
        process.join()
        halves += bool(leftovers(tmp_path))
        newest = newest_step(tmp_path)
        assert newest > 0
        checkpoint = tmp_path / checkpoint_name(newest)
        assert load_weights(checkpoint)["a"].unique().tolist() == [newest]
        assert load_state(checkpoint)["a"].unique().tolist() == [newest]
        remove_leftovers(tmp_path)
        assert leftovers(tmp_path) == []
    assert halves >= 2, "hardly any kill came while a checkpoint was half written"


def test_ranks_end_when_one_dies_and_other_numbers_of_ranks_continue(recipe: Path, tmp_path: Path) -> None:
    """The same samples in the same order: what is logged differs by rounding alone, which small steps keep small.

    Dropout is off, since it draws otherwise on each rank, and merging, which turns rounding into other merges.
    """
    off = ["model.text.dropout=0.0", "model.merging=null", "optim.lr=1e-4"]
    arguments = [str(recipe), *off]
    words = tmp_path / "words"
    with Forked([*arguments, "--out", str(tmp_path / "whole")], words) as training:
        assert training.join() == [0], training.said()
    folder = tmp_path / "run"
    arguments += ["--out", str(folder), "--resume"]
    with Forked([*arguments, "data.num_workers=1"], words, ranks=2) as training:
        wait_until(lambda: last_step(folder) >= 5, what=training.said())
        training.kill_rank(1)
        assert training.join() == [1, -signal.SIGKILL], training.said()
        last = training.said().splitlines()[-1]
        assert re.fullmatch(
            r"error: rank 0 of 2 lost another one \([^()]+\); look at what the others printed, .+", last
        )
        assert "Traceback" not in training.said()
        wait_until(training.are_gone, what="loader processes are left")
    assert_whole_checkpoint(folder, EVERY.checkpoint)
    with Forked(arguments, words, ranks=3) as training:
        wait_until(lambda: last_step(folder) >= 11, what=training.said())
        training.kill()
    with Forked(arguments, words) as training:
        assert training.join() == [0], training.said()
    ours, theirs = metrics(folder), metrics(tmp_path / "whole")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for name, value in other.items():
            assert mine[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (name, mine["step"])


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc")
def test_torchrun_ends_all_ranks_when_one_is_killed_and_the_run_continues_to_the_bit(
    recipe: Path, whole: Whole, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    arguments = [str(recipe), "--out", str(folder), "--resume", "data.num_workers=1"]
    first = torchrun(arguments, str(folder))
    try:
        wait_until(lambda: last_step(folder) >= 7 or first.poll() is not None, what="no steps", every_s=0.01)
        assert first.poll() is None, first.communicate()[0]
        (victim,) = (
            found.number
            for found in processes_marked(str(folder))
            if found.parent == first.pid and found.environment.get("RANK") == "1"
        )
        os.kill(victim, signal.SIGKILL)
        assert first.wait(60) == 1
    finally:
        first.kill()
        first.communicate()
    wait_until(lambda: not processes_marked(str(folder)), what="processes are left", every_s=0.1)
    assert_whole_checkpoint(folder, EVERY.checkpoint)
    with Forked(arguments, tmp_path / "words", ranks=2) as training:
        assert training.join() == [0, 0], training.said()
    assert_same_run(folder, whole(2, "fp32"))


def test_a_full_disk_ends_the_run_with_one_line_and_it_continues_when_there_is_room(
    recipe: Path, whole: Whole, tmp_path: Path
) -> None:
    """A real file system: one checkpoint takes 19 MB, so the third one, before the first may go, has no room."""
    disk, report = tmp_path / "disk", tmp_path / "report.json"
    disk.mkdir()
    steps = [DiskStep(50), DiskStep(50, is_filled=True), DiskStep(100)]
    arguments = [str(recipe), "--resume"]
    process = FORKS.Process(target=train_on_small_disk, args=(str(disk), steps, arguments, str(report)))
    process.start()
    process.join()
    assert process.exitcode == 0
    found = json.loads(report.read_text())
    if isinstance(found, str):
        pytest.skip(f"no file system of our own here: {found}")
    cure = "No space left on device; make room and go on with --resume"
    third = f"error: {disk}/run/checkpoints/step_0000009: {cure}"
    assert [step["code"] for step in found] == [1, 1, 0], found
    assert [step["words"].splitlines()[-1] for step in found[:2]] == [third, f"error: {disk}/run: {cure}"]
    assert not any("Traceback" in step["words"] for step in found)
    assert [step["leftovers"] for step in found] == [[]] * 3
    assert [step["checkpoints"] for step in found[:2]] == [["step_0000003", "step_0000006"]] * 2
    assert_same_run(tmp_path / "run", whole(1, "fp32"))


COMMON, RARE = "a photo of a dog", "the only zebra"
RARE_SAMPLE = 7


@pytest.fixture(scope="module")
def recipe_of_words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One sample of 40 has words of its own; nothing is measured, since a measure refuses what is not finite."""
    captions = [RARE if i == RARE_SAMPLE else COMMON for i in range(40)]
    return write_recipe(tmp_path_factory.mktemp("words"), validation=False, captions=captions)


def run_of_damaged_word(folder: Path, recipe: Path, word: str) -> Path:
    """A run whose weights are fine but for the embedding of one word, which is not a number."""
    make_run(folder, load_recipe(str(recipe)).recipe)
    (checkpoint,) = checkpoint_folders(folder / "checkpoints")
    weights = load_weights(checkpoint)
    token = Tokenizer(16).encode([word])[0, 1]
    weights["text.token_embedding.weight"][token] = float("nan")
    save_file(weights, checkpoint / "model.safetensors")
    return folder


def test_steps_whose_batch_is_not_finite_are_skipped_and_counted(recipe_of_words: Path, tmp_path: Path) -> None:
    init = run_of_damaged_word(tmp_path / "init", recipe_of_words, "zebra")
    folder, words = tmp_path / "run", tmp_path / "words"
    arguments = [str(recipe_of_words), f"model.init={init}", "--out", str(folder), "--resume"]
    with Forked(arguments, words) as training:
        wait_until(lambda: last_step(folder) >= 10, what=training.said())
        training.kill()
    with Forked(arguments, words) as training:
        assert training.join() == [0], training.said()
    order = Order([40], None, seed=0, global_batch_size=12)
    batches = order.positions(np.arange(12 * STEPS)).index.reshape(STEPS, 12)
    is_hit = (batches == RARE_SAMPLE).any(axis=1)
    assert 3 <= is_hit.sum() <= 7
    lines = metrics(folder)
    assert [line["loss"] is None for line in lines] == is_hit.tolist()
    assert [line["skipped_steps"] for line in lines] == is_hit.cumsum().tolist()
    weights = load_weights(Run(folder).latest_checkpoint())
    assert weights.pop("text.token_embedding.weight").isfinite().all(dim=1).sum() == VOCAB_SIZE - 1
    assert all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.parametrize(
    ("steps", "problem"),
    [
        (30, "step 20: the gradient was not finite in 20 steps in a row"),
        (3, "the gradient was not finite in any of 3 steps"),
    ],
)
def test_a_run_without_a_finite_batch_ends_with_a_cure(
    recipe_of_words: Path, tmp_path: Path, steps: int, problem: str
) -> None:
    init = run_of_damaged_word(tmp_path / "init", recipe_of_words, "photo")
    folder = tmp_path / "run"
    arguments = [str(recipe_of_words), f"model.init={init}", f"train.steps={steps}", "--out", str(folder)]
    with Forked([*arguments, "train.global_batch_size=40"], tmp_path / "words") as training:
        assert training.join() == [1], training.said()
    assert training.said().splitlines()[-1] == (
        f"error: {problem}; lower optim.lr, set optim.clip_grad_norm, or look at the data"
    )
    assert "Traceback" not in training.said()
    assert [line["skipped_steps"] for line in metrics(folder)] == list(range(1, min(steps + 1, 20)))
