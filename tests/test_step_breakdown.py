"""The parts of a training step: seconds land where the work is, they add up, and nothing stays behind."""

from typing import Any

import pytest
import torch
from models_for_tests import small_batch, small_model, small_recipe
from torch import nn

from mlip_cli.losses import objective
from mlip_cli.losses.features import features_of
from mlip_cli.model import merge_pass
from mlip_cli.profiling.step import (
    BACKWARD,
    FIRST_PASS,
    FREQUENCY,
    HEADS,
    MERGING,
    REST,
    TEXT,
    RepeatedStep,
    StepRecorder,
    TimedObjective,
    TimedStep,
    breakdown,
    limit,
    stage_names,
    step_parts,
)
from mlip_cli.recipe.config import LOSS_NAMES, Recipe
from mlip_cli.train.step import COPY, OPTIMIZER

STAGES = ["image tower, block 1", "image tower, block 2", "image tower, blocks 3-4"]
CPU = torch.device("cpu")


def make_step(recipe: Recipe | None = None) -> RepeatedStep:
    recipe = recipe or small_recipe()
    return RepeatedStep(small_model(recipe).train(), recipe, small_batch(), CPU)


def recipe_of(*, mlip: bool = True, micro_batch_size: int | None) -> Recipe:
    recipe = small_recipe(mlip=mlip)
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"micro_batch_size": micro_batch_size})})


class Workshop:
    """A machine whose clock moves only where a function was given its seconds."""

    def __init__(self, step: RepeatedStep, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.monkeypatch = 0.0, monkeypatch
        self.recorder = StepRecorder(step)
        self.recorder.clock.now = lambda: self.now

    def slow(self, owner: Any, name: str, seconds: float) -> None:
        function = owner[name] if isinstance(owner, dict) else getattr(owner, name)

        def slower(*arguments: Any, **named: Any) -> Any:
            self.now += seconds
            return function(*arguments, **named)

        if isinstance(owner, dict):
            self.monkeypatch.setitem(owner, name, slower)
        else:
            self.monkeypatch.setattr(owner, name, slower)

    def parts(self) -> dict[str, float]:
        self.recorder()
        return {part: seconds for part, seconds in self.recorder.steps[-1].parts.items() if seconds}


@pytest.fixture
def workshop(monkeypatch: pytest.MonkeyPatch) -> Workshop:
    return Workshop(make_step(), monkeypatch)


def test_seconds_land_in_the_part_that_does_the_work(workshop: Workshop) -> None:
    step = workshop.recorder.step
    model = step.model
    workshop.slow(model, "normalize", 1)
    workshop.slow(model.vision, "embed", 2)
    for block, seconds in zip(model.vision.trunk.blocks, (4, 8, 16, 32), strict=True):
        workshop.slow(block, "forward", seconds)
    workshop.slow(model.vision.trunk.norm, "forward", 64)
    workshop.slow(model.image_projection, "forward", 128)
    workshop.slow(merge_pass, "frequency_guidance", 1000)
    workshop.slow(merge_pass, "match", 10)  # twice
    workshop.slow(merge_pass, "merge_tokens", 100)  # twice
    workshop.slow(model.text.blocks[0], "forward", 3)
    workshop.slow(model.text_projection, "forward", 4)
    workshop.slow(model.frequency, "forward", 5)
    workshop.slow(model.frequency_projection, "forward", 6)
    workshop.slow(model.token_projections["text"], "forward", 7)
    workshop.slow(objective, "info_nce", 9)
    workshop.slow(objective, "sparc_sum", 11)
    workshop.slow(torch.autograd, "backward", 13)
    workshop.slow(step.stepper.training.optimizer, "step", 15)
    workshop.slow(torch.nn.utils, "clip_grad_norm_", 16)
    assert workshop.parts() == {
        STAGES[0]: 1 + 2 + 4,
        STAGES[1]: 8,
        STAGES[2]: 16 + 32 + 64 + 128,
        MERGING: 1000 + 2 * 10 + 2 * 100,
        TEXT: 3 + 4,
        FREQUENCY: 5 + 6,
        HEADS: 7,
        "spatial_global": 9,
        "frequency_global": 9,
        "spatial_token": 11,
        "frequency_token": 11,
        BACKWARD: 13,
        OPTIMIZER: 15 + 16,
    }
    assert sum(workshop.parts().values()) == workshop.now / 2  # the same again, and nothing is lost


def test_micro_batches_have_a_first_pass_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    workshop = Workshop(make_step(recipe_of(micro_batch_size=4)), monkeypatch)  # two of them
    model = workshop.recorder.step.model
    workshop.slow(model.vision.trunk.blocks[0], "forward", 1)
    workshop.slow(merge_pass, "match", 10)  # the second pass replays the merges of the first
    workshop.slow(merge_pass, "merge_tokens", 100)
    workshop.slow(objective, "info_nce", 5)
    workshop.slow(objective, "sparc_sum", 3)
    workshop.slow(torch.autograd, "grad", 1000)
    workshop.slow(torch.autograd, "backward", 2000)
    assert workshop.parts() == {
        FIRST_PASS: 2 * 1 + 4 * 10 + 4 * 100,
        STAGES[0]: 2 * 1,
        MERGING: 4 * 100,
        "spatial_global": 5,
        "frequency_global": 5,
        "spatial_token": 2 * 3,
        "frequency_token": 2 * 3,
        BACKWARD: 1000 + 2 * 2000,
    }
    assert step_parts(workshop.recorder.step)[FIRST_PASS] == "forward"


@pytest.mark.parametrize("micro_batch_size", [None, 3])
@pytest.mark.parametrize("mlip", [True, False])
def test_every_part_of_the_list_is_met_and_no_other(mlip: bool, micro_batch_size: int | None) -> None:
    step = make_step(recipe_of(mlip=mlip, micro_batch_size=micro_batch_size))
    recorder = StepRecorder(step)
    recorder()
    assert recorder.steps[0].parts.keys() == step_parts(step).keys()
    assert (MERGING in step_parts(step)) is mlip
    assert 0 < sum(recorder.steps[0].parts.values()) < recorder.steps[0].whole_s


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_what_is_computed_again_for_the_gradient_is_backward(micro_batch_size: int | None) -> None:
    step = make_step(recipe_of(mlip=True, micro_batch_size=micro_batch_size))
    step.model.set_grad_checkpointing()
    recorder = StepRecorder(step)
    recorder()
    assert recorder.steps[0].parts.keys() == step_parts(step).keys()


def test_the_parts_of_a_plain_clip() -> None:
    assert step_parts(make_step(small_recipe(mlip=False))) == {
        COPY: "data",
        "image tower, blocks 1-4": "forward",
        TEXT: "forward",
        REST: "forward",
        "spatial_global": "losses",
        BACKWARD: "backward",
        OPTIMIZER: "optimizer",
    }
    assert stage_names(small_model()) == [*STAGES, STAGES[2]]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_nothing_stays_behind_and_nothing_is_changed() -> None:
    step = make_step()
    model, functions = step.model, (torch.autograd.backward, torch.autograd.grad)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = model(step.batch)
    recorder = StepRecorder(step)
    recorder()
    recorder()
    after = model(step.batch)
    assert hooks(model) == 0
    assert not {"normalize", "forward"} & vars(model).keys()
    assert "embed" not in vars(model.vision)
    assert functions == (torch.autograd.backward, torch.autograd.grad)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    for name in ("image_features", "text_features", "frequency_features", "image_tokens", "frequency_tokens"):
        assert torch.equal(getattr(before, name), getattr(after, name))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_losses_one_by_one_are_the_losses_and_have_their_gradient() -> None:
    step = make_step()
    one_by_one = TimedObjective(step, StepRecorder(step).clock)
    encoded = step.model(step.batch)
    num_captions = step.stepper.objective.count_captions(encoded.text_mask)
    terms, gradients = [], []
    for which in (step.stepper.objective, one_by_one):
        own = which.batch_terms(features_of(encoded)) | which.sample_terms(encoded, num_captions)
        terms.append(own)
        gradients.append(torch.autograd.grad(which.total(own), step.model.parameters(), retain_graph=True))
    assert terms[0].keys() == set(LOSS_NAMES)
    assert terms[0] == terms[1]
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole)


def test_pieces_of_the_step_leave_weights_alone_and_no_gradient_to_the_next() -> None:
    step = make_step()
    weights = {name: value.clone() for name, value in step.model.state_dict().items()}
    for piece in step.parts_of_step(step.batch).values():
        piece()
        assert all(parameter.grad is None for parameter in step.model.parameters())
    assert all(torch.equal(weights[name], value) for name, value in step.model.state_dict().items())


STEPS = [
    TimedStep(10.0, {"a": 3.0, BACKWARD: 6.0}),
    TimedStep(20.0, {"a": 8.0, BACKWARD: 10.0}),
    TimedStep(8.0, {"a": 1.6, BACKWARD: 4.0}),
]
GROUPS = {COPY: "data", "a": "forward", BACKWARD: "backward"}


@pytest.mark.parametrize("is_apart", [True, False])
def test_parts_and_what_is_unaccounted_are_the_whole(is_apart: bool) -> None:
    found = breakdown(STEPS, GROUPS, loader_s={"read": 1.0, "decode": 4.0}, loader_is_apart=is_apart)
    assert found["whole_s"] == (10.0 if is_apart else 15.0)
    inside = [row for row in found["breakdown"] if row["in_step"]]
    assert [row["part"] for row in inside] == [*([] if is_apart else ["read", "decode"]), COPY, "a", BACKWARD]
    left = {"seconds": 2.0, "share": 2.0 / found["whole_s"], "outside_s": 1.0}
    assert found["unaccounted"] == pytest.approx(left)
    assert sum(row["seconds"] for row in inside) + 2.0 == pytest.approx(found["whole_s"])
    assert [row["seconds"] for row in inside[-2:]] == pytest.approx([3.0, 5.0])
    assert all(row["share"] == row["seconds"] / found["whole_s"] for row in found["breakdown"])


@pytest.mark.parametrize(
    ("loader_per_s", "workers", "part", "why"),
    [
        (None, 1, BACKWARD, "50% of the step; there is no data to compare with"),
        (900.0, 1, BACKWARD, "50% of the step; 1 loader process makes 900 images/s, the step takes 100"),
        (90.0, 3, "data", "3 loader processes make 90 images/s, the step takes 100; decode is 80% of their time"),
        (
            50.0,
            0,
            "data",
            "the training process itself makes 50 images/s, the step takes 100; decode is 80% of its time",
        ),
    ],
)
def test_the_limit_is_data_or_the_largest_part(loader_per_s: float | None, workers: int, part: str, why: str) -> None:
    loader_s = None if loader_per_s is None else {"read": 1.0, "decode": 4.0}
    rows = breakdown(STEPS, GROUPS, loader_s=loader_s, loader_is_apart=True)["breakdown"]
    found = limit(rows, step_per_s=100, loader_per_s=loader_per_s, num_workers=workers)
    assert found == {"part": part, "why": why}
