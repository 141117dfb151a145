"""What merging saw, and how it is drawn."""

import pytest
import torch
from models_for_tests import small_batch, small_model
from torch import Tensor

from mlip_cli.model.merging import frequency_guidance, match, mid_ranks
from mlip_cli.types import MergeStage


def stages_of(rate: float, method: str) -> tuple[Tensor, tuple[MergeStage, ...]]:
    model, images = small_model().eval(), small_batch().images
    return images, model.merge_stages(images, model.merge_plan(rate, method))


@pytest.mark.parametrize("method", ["guided", "tome"])
def test_stages_are_those_of_the_pass_that_encodes(method: str) -> None:
    model, batch = small_model().eval(), small_batch()
    plan = model.merge_plan(0.5, method)
    stages = model.merge_stages(batch.images, plan)
    assert [stage.block for stage in stages] == [2, 3] == list(plan.at)
    for stage, groups, count in zip(stages, model(batch, plan).assign, (11, 8), strict=True):
        assert torch.equal(stage.groups, groups)
        assert all(sorted(set(row)) == list(range(count)) for row in stage.groups.tolist())
    assert model.merge_stages(batch.images, model.merge_plan(0.0)) == ()


def test_groups_grow_from_stage_to_stage() -> None:
    _, (first, second) = stages_of(0.5, "guided")
    together = [stage.groups[:, :, None] == stage.groups[:, None] for stage in (first, second)]
    assert (together[1] | ~together[0]).all()
    assert together[1].sum() > together[0].sum()


def test_maps_are_what_the_matching_received(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[Tensor] = []

    def spy(metric: Tensor, guidance: Tensor, parity: Tensor, num_groups: int) -> Tensor:
        received.append(guidance)
        return match(metric, guidance, parity, num_groups)

    monkeypatch.setattr("mlip_cli.model.vision.match", spy)
    images, (first, second) = stages_of(0.5, "guided")
    for stage in (first, second):
        assert stage.spatial is not None
        assert stage.frequency is not None
        assert stage.mixed is not None
        assert torch.equal(stage.mixed, 0.5 * stage.spatial + 0.5 * stage.frequency)
        for values in (stage.spatial, stage.frequency, stage.mixed):
            assert values.shape == (8, 16)
            assert 0 <= values.min() < values.max() <= 1
    model = small_model()
    assert torch.equal(first.mixed, received[0])
    assert torch.equal(second.mixed, received[1].gather(1, first.groups))
    assert torch.equal(first.spatial, mid_ranks(first.spatial))
    assert torch.equal(first.frequency, frequency_guidance(model.normalize(images), 8))


def test_tome_has_no_maps() -> None:
    _, stages = stages_of(0.5, "tome")
    assert [(stage.spatial, stage.frequency, stage.mixed) for stage in stages] == [(None, None, None)] * 2
