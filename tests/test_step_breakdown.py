"""The parts of a training step: seconds land where the work is, they add up, and nothing stays behind."""

from typing import Any

import pytest
import torch
from models_for_tests import small_batch, small_model, small_recipe
from torch import nn

from mlip_cli.losses import objective
from mlip_cli.model import merge_pass
from mlip_cli.profiling.breakdown import break_down, limit
from mlip_cli.profiling.result import LoaderFacts
from mlip_cli.profiling.step import (
    FREQUENCY_BRANCH,
    OTHER_FORWARD,
    SHARED_BY_LOSSES,
    TEXT_TOWER,
    TOKEN_HEADS,
    TOKEN_MERGING,
    ClockedSeconds,
    ClockedStep,
    RepeatedStep,
    stage_names,
    step_parts,
)
from mlip_cli.recipe.config import Recipe
from mlip_cli.train.ahead import COPY
from mlip_cli.train.gradients import BACKWARD, FORWARD_WITHOUT_GRAPH
from mlip_cli.train.step import OPTIMIZER

STAGES = ["image tower, block 1", "image tower, block 2", "image tower, blocks 3-4"]
CPU = torch.device("cpu")


def make_step(recipe: Recipe | None = None) -> RepeatedStep:
    recipe = recipe or small_recipe()
    return RepeatedStep(small_model(recipe).train(), recipe, small_batch(), CPU)


def by_micro_batches(recipe: Recipe, micro_batch_size: int | None) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"micro_batch_size": micro_batch_size})})


class Workshop:
    """A machine whose clock moves only where a function was given its seconds."""

    def __init__(self, step: RepeatedStep, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.monkeypatch = 0.0, monkeypatch
        self.clocked = ClockedStep(step)
        self.clocked.clock.now = lambda: self.now

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
        self.clocked()
        return {part: seconds for part, seconds in self.clocked.seconds[-1].parts.items() if seconds}


@pytest.fixture
def workshop(monkeypatch: pytest.MonkeyPatch) -> Workshop:
    return Workshop(make_step(), monkeypatch)


@pytest.mark.slow
def test_seconds_land_in_the_part_that_does_the_work(workshop: Workshop) -> None:
    step = workshop.clocked.step
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
    workshop.slow(objective, "gather", 17)  # once for both global losses
    workshop.slow(torch.Tensor, "backward", 13)
    workshop.slow(step.stepper.training.optimizer, "step", 15)
    workshop.slow(torch.nn.utils, "get_total_norm", 16)
    assert workshop.parts() == {
        STAGES[0]: 1 + 2 + 4,
        STAGES[1]: 8,
        STAGES[2]: 16 + 32 + 64 + 128,
        TOKEN_MERGING: 1000 + 2 * 10 + 2 * 100,
        TEXT_TOWER: 3 + 4,
        FREQUENCY_BRANCH: 5 + 6,
        TOKEN_HEADS: 7,
        "spatial_global": 9,
        "frequency_global": 9,
        "spatial_token": 11,
        "frequency_token": 11,
        SHARED_BY_LOSSES: 17,
        BACKWARD: 13,
        OPTIMIZER: 15 + 16,
    }
    assert sum(workshop.parts().values()) == workshop.now / 2  # the same again, and nothing is lost


@pytest.mark.slow
def test_micro_batches_have_a_first_pass_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    workshop = Workshop(make_step(by_micro_batches(small_recipe(), 4)), monkeypatch)  # two of them
    model = workshop.clocked.step.model
    workshop.slow(model.vision.trunk.blocks[0], "forward", 1)
    workshop.slow(merge_pass, "match", 10)  # the second pass replays the merges of the first
    workshop.slow(merge_pass, "merge_tokens", 100)
    workshop.slow(objective, "info_nce", 5)
    workshop.slow(objective, "sparc_sum", 3)
    workshop.slow(torch.autograd, "grad", 1000)
    workshop.slow(torch.Tensor, "backward", 2000)
    assert workshop.parts() == {
        FORWARD_WITHOUT_GRAPH: 2 * 1 + 4 * 10 + 4 * 100,
        STAGES[0]: 2 * 1,
        TOKEN_MERGING: 4 * 100,
        "spatial_global": 5,
        "frequency_global": 5,
        "spatial_token": 2 * 3,
        "frequency_token": 2 * 3,
        BACKWARD: 1000 + 2 * 2000,
    }
    assert step_parts(workshop.clocked.step)[FORWARD_WITHOUT_GRAPH] == "forward"


OTHER_LOSSES = {"spatial_global": {"kind": "sigmoid"}, "spatial_token": {"kind": "filip"}}


@pytest.mark.parametrize("micro_batch_size", [None, 3])
@pytest.mark.parametrize(
    ("base", "merges"),
    [(small_recipe(), True), (small_recipe(mlip=False), False), (small_recipe(losses=OTHER_LOSSES), True)],
    ids=["mlip", "clip", "other losses"],
)
def test_every_part_of_the_list_is_met_and_no_other(base: Recipe, merges: bool, micro_batch_size: int | None) -> None:
    clocked = ClockedStep(make_step(by_micro_batches(base, micro_batch_size)))
    clocked()
    parts = step_parts(clocked.step)
    assert clocked.seconds[0].parts.keys() == parts.keys()
    assert (TOKEN_MERGING in parts) is merges
    assert 0 < sum(clocked.seconds[0].parts.values()) < clocked.seconds[0].whole_s


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_what_is_computed_again_for_the_gradient_is_backward(micro_batch_size: int | None) -> None:
    step = make_step(by_micro_batches(small_recipe(), micro_batch_size))
    step.model.set_grad_checkpointing()
    clocked = ClockedStep(step)
    clocked()
    assert clocked.seconds[0].parts.keys() == step_parts(step).keys()


def test_the_parts_of_a_plain_clip() -> None:
    assert step_parts(make_step(small_recipe(mlip=False))) == {
        COPY: "data",
        "image tower, blocks 1-4": "forward",
        TEXT_TOWER: "forward",
        OTHER_FORWARD: "forward",
        "spatial_global": "losses",
        SHARED_BY_LOSSES: "losses",
        BACKWARD: "backward",
        OPTIMIZER: "optimizer",
    }
    assert stage_names(small_model()) == [*STAGES, STAGES[2]]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_clock_changes_nothing_and_leaves_no_hook() -> None:
    step = make_step()
    weights = {name: value.clone() for name, value in step.model.state_dict().items()}
    gradients: list[torch.Tensor] = []
    for parameter in step.model.parameters():
        parameter.register_hook(lambda gradient: gradients.append(gradient.clone()))
    clocked = ClockedStep(step)
    step()
    plain = gradients.copy()
    gradients.clear()
    clocked()
    assert len(plain) == len(gradients) > 50
    assert all(map(torch.equal, plain, gradients))
    assert hooks(step.model) == 0
    assert all(torch.equal(weights[name], value) for name, value in step.model.state_dict().items())
    assert all(parameter.grad is None for parameter in step.model.parameters())


def test_pieces_of_the_step_leave_weights_alone_and_no_gradient_to_the_next() -> None:
    step = make_step()
    weights = {name: value.clone() for name, value in step.model.state_dict().items()}
    for piece in step.pieces(step.batch).values():
        piece()
        assert all(parameter.grad is None for parameter in step.model.parameters())
    assert all(torch.equal(weights[name], value) for name, value in step.model.state_dict().items())


STEPS = [
    ClockedSeconds(10.0, {"a": 3.0, BACKWARD: 6.0}),
    ClockedSeconds(20.0, {"a": 8.0, BACKWARD: 10.0}),
    ClockedSeconds(8.0, {"a": 1.6, BACKWARD: 4.0}),
]
GROUPS = {COPY: "data", "a": "forward", BACKWARD: "backward"}


def loader(processes: int, images_per_s: float = 1, ranks: int = 1) -> LoaderFacts:
    """A loader whose process takes 1 s a sample for reading and 4 s for decoding."""
    return LoaderFacts(
        num_samples=1,
        bad_samples=0,
        sample_seconds={"read": 1.0, "decode": 4.0},
        loader_processes=processes,
        loader_images_per_s=images_per_s,
        ranks=ranks,
    )


@pytest.mark.parametrize("processes", [1, 0])
def test_parts_and_what_is_unaccounted_are_the_whole(processes: int) -> None:
    found = break_down(STEPS, GROUPS, loader=loader(processes), batch_size=1)
    assert found.whole_s == (10.0 if processes else 15.0)
    inside = [line for line in found.parts if line.in_step]
    assert [line.part for line in inside] == [*([] if processes else ["read", "decode"]), COPY, "a", BACKWARD]
    left = found.unaccounted
    assert (left.seconds, left.share, left.outside_s) == pytest.approx((2.0, 2.0 / found.whole_s, 1.0))
    assert sum(line.seconds for line in inside) + 2.0 == pytest.approx(found.whole_s)
    assert [line.seconds for line in inside[-2:]] == pytest.approx([3.0, 5.0])
    assert all(line.share == line.seconds / found.whole_s for line in found.parts)


@pytest.mark.parametrize(
    ("facts", "part", "why"),
    [
        (None, BACKWARD, "50% of the step; there is no data to compare with"),
        (loader(1, 900), BACKWARD, "50% of the step; 1 loader process makes 900 images/s, the step takes 100"),
        (loader(3, 90), "data", "3 loader processes make 90 images/s, the step takes 100; decode is 80% of their time"),
        (
            loader(3, 90, ranks=8),
            "data",
            "3 loader processes of one of 8 ranks make 90 images/s, the step takes 100; decode is 80% of their time",
        ),
        (
            loader(0, 50),
            "data",
            "the training process itself makes 50 images/s, the step takes 100; decode is 80% of its time",
        ),
    ],
)
def test_the_limit_is_data_or_the_largest_part(facts: LoaderFacts | None, part: str, why: str) -> None:
    parts = break_down(STEPS, GROUPS, loader=loader(1), batch_size=1).parts
    found = limit(parts, facts, step_per_s=100)
    assert (found.part, found.why) == (part, why)
