"""The running average of the weights, and checkpoints by what they measure."""

from pathlib import Path

import pytest
import torch
from killed_for_tests import Forked
from models_for_tests import small_model
from test_training import lines_in, metrics, recipe, run
from waits_for_tests import wait_until

from mlip_cli.runs.checkpoint import TRAINING_WEIGHTS, WEIGHTS, load_weights
from mlip_cli.train.average import WeightAverage
from mlip_cli.train.state import Progress

__all__ = ["recipe"]


def test_the_average_is_the_mean_up_to_its_horizon_and_forgets_afterwards() -> None:
    model = small_model(dtype=torch.float64)
    weight = model.image_projection.weight
    average = WeightAverage(model, horizon=32)
    values = []
    for step in range(1, 8):
        values.append(torch.randn_like(weight))
        weight.data.copy_(values[-1])
        average.update(samples_seen=8 * step, batch_size=8)
    expected = torch.stack(values[:4]).mean(0)
    for value in values[4:]:
        expected = 0.75 * expected + 0.25 * value
    torch.testing.assert_close(average.weights()["image_projection.weight"], expected, rtol=1e-12, atol=1e-12)


def test_a_horizon_below_one_batch_is_the_newest_weights() -> None:
    model = small_model(dtype=torch.float64)
    average = WeightAverage(model, horizon=2)
    for step in (1, 2, 3):
        for parameter in model.parameters():
            parameter.data.normal_()
        average.update(samples_seen=8 * step, batch_size=8)
    named = dict(model.named_parameters())
    assert all(torch.equal(value, named[name]) for name, value in average.weights().items())


def test_the_model_takes_averaged_weights_and_returns_to_its_own_to_the_bit() -> None:
    model = small_model(dtype=torch.float32)
    model.freeze("text")
    average = WeightAverage(model, horizon=100)
    assert not [name for name in average.weights() if name.startswith("text.")]
    average.update(samples_seen=8, batch_size=8)
    first = {name: value.clone() for name, value in average.weights().items()}
    for parameter in model.parameters():
        parameter.data.normal_()
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    with average.applied():
        applied = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert all(torch.equal(applied[name], first.get(name, own[name])) for name in own)
    assert all(torch.equal(p, own[name]) for name, p in model.named_parameters())


def test_the_best_are_the_largest_and_of_equal_ones_the_earlier() -> None:
    progress = Progress()
    kept = []
    for step, value in enumerate((0.2, 0.5, 0.5, 0.1, 0.7), start=1):
        progress.step = step
        progress.note_best("r5", value, keep=2)
        kept.append(progress.is_best)
    assert kept == [True, True, True, False, True]
    assert progress.best == [(0.7, 5), (0.5, 2)]


def test_measures_of_another_metric_are_forgotten() -> None:
    progress = Progress(step=3, best=[(0.9, 2)], best_metric="gap")
    progress.note_best("r5", 0.1, keep=1)
    assert (progress.best, progress.best_metric) == ([(0.1, 3)], "r5")


@pytest.mark.slow
def test_the_best_is_kept_where_each_evaluation_is_saved_anyway(recipe: Path, tmp_path: Path) -> None:
    asked = ["evaluate.best_metric=validation_modality_gap", "train.keep.best=1", "train.keep.last=1"]
    every = ["evaluate.every_steps=2", "train.checkpoint_every.steps=2", "seed=1"]  # whose gap falls after step 4
    done = run(recipe, "--out", str(tmp_path / "run"), *asked, *every)
    assert done.returncode == 0, done.stderr
    evaluations = [line for line in metrics(tmp_path / "run") if "loss" not in line]
    measured = {line["step"]: line["validation_modality_gap"] for line in evaluations}
    best = max(measured, key=lambda step: (measured[step], -step))
    steps = {int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert steps == {best, 12}
    assert best != 12, "the newest is kept without being the best"


@pytest.mark.slow
def test_a_run_with_an_average_keeps_its_best_and_continues_to_the_bit(recipe: Path, tmp_path: Path) -> None:
    asked = [
        "optim.ema_horizon=24",
        "evaluate.best_metric=validation_image_to_text_r5",
        "train.keep.best=1",
        "train.keep.last=1",
        "train.checkpoint_every.steps=5",
        "evaluate.every_steps=3",
    ]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    done = run(recipe, "--out", str(whole), *asked)
    assert done.returncode == 0, done.stderr
    measured = {line["step"]: line["validation_image_to_text_r5"] for line in metrics(whole) if "loss" not in line}
    best = max(measured, key=lambda step: (measured[step], -step))
    steps = [int(path.name[5:]) for path in sorted((whole / "checkpoints").iterdir())]
    assert steps == sorted({best, 12})
    newest = whole / "checkpoints" / "step_0000012"
    averaged, own = load_weights(newest), load_weights(newest, TRAINING_WEIGHTS)
    assert not torch.equal(averaged["image_projection.weight"], own["image_projection.weight"])

    arguments = ["--out", str(stopped), *asked]
    with Forked([str(recipe), *arguments], tmp_path / "words") as training:
        wait_until(lambda: lines_in(stopped) >= 9, what=training.said())
        training.kill()
    resumed = run(recipe, *arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert metrics(stopped) == metrics(whole)
    assert sorted(p.name for p in (stopped / "checkpoints").iterdir()) == [f"step_{step:07d}" for step in steps]
    for name in (WEIGHTS, TRAINING_WEIGHTS):
        ours, theirs = (load_weights(folder / "checkpoints" / newest.name, name) for folder in (stopped, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_an_unknown_measure_is_refused_before_training(recipe: Path, tmp_path: Path) -> None:
    wrong = run(recipe, "--out", str(tmp_path / "run"), "evaluate.best_metric=accuracy", "train.keep.best=1")
    assert wrong.returncode == 2, wrong.stderr
    expected = "error: evaluate.best_metric: accuracy: this recipe does not measure it; take one of "
    assert f"{expected}validation_image_to_text_r1, " in wrong.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("best", ["train.keep.best=1", "evaluate.best_metric=x"])
def test_half_of_a_best_is_refused(recipe: Path, tmp_path: Path, best: str) -> None:
    refused = run(recipe, "--out", str(tmp_path / "run"), best)
    assert refused.returncode == 2
    assert refused.stderr.count("error") == 1
