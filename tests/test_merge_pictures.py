"""What merging saw, and how it is drawn."""

import io

import matplotlib
import pytest
import torch
import torch.nn.functional as F
from models_for_tests import small_batch, small_model
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from mlip_cli.evaluate.merge_pictures import spread_evenly
from mlip_cli.evaluate.panels import (
    MAP_SHARE,
    as_webp,
    draw_groups,
    draw_guidance,
    grey_of,
    group_colors,
    near_another,
    panel_pictures,
    spread,
)
from mlip_cli.evaluate.sweep import numbers_at_random
from mlip_cli.model.merging import frequency_guidance, mid_ranks, patch_dct, ward_cost
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


def test_stages_show_the_guidance_that_the_matching_used(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[Tensor] = []

    def spy(keys: Tensor, sizes: Tensor, guidance: Tensor, *halves: Tensor, strength: float) -> Tensor:
        received.append(guidance)
        return ward_cost(keys, sizes, guidance, *halves, strength=strength)

    monkeypatch.setattr("mlip_cli.model.merge_pass.ward_cost", spy)
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
    assert torch.equal(first.frequency, frequency_guidance(patch_dct(model.normalize(images), model.vision.dct.matrix)))


def test_tome_has_no_maps() -> None:
    _, stages = stages_of(0.5, "tome")
    assert [(stage.spatial, stage.frequency, stage.mixed) for stage in stages] == [(None, None, None)] * 2


def noise(*shape: int) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def interior(drawn: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """The middle pixel of a patch."""
    height, width = drawn.shape[-2:]
    row, column = divmod(patch, grid[1])
    return drawn[:, (2 * row + 1) * height // (2 * grid[0]), (2 * column + 1) * width // (2 * grid[1])]


@pytest.mark.parametrize("size", [(48, 80), (50, 83), (192, 320)])
def test_lone_patches_stay_and_shared_ones_have_their_groups_color(size: tuple[int, int]) -> None:
    grid = (3, 5)
    groups = torch.tensor([[0, 1, 2, 1, 3, 4, 5, 6, 7, 8, 9, 1, 7, 10, 11], [0, 0, *range(1, 14)]])
    pictures = noise(2, 3, *size)
    drawn = draw_groups(pictures, groups, grid)
    colors, grey = group_colors(grid), grey_of(pictures)
    for image, shared in ((0, {1: 1, 3: 1, 11: 1, 8: 8, 12: 8}), (1, {0: 0, 1: 0})):
        for patch in range(15):
            pixels = spread(torch.arange(15), grid, size) == patch
            if patch in shared:
                expected = 0.4 * interior(grey[image], patch, grid) + 0.6 * colors[shared[patch]]
                assert (interior(drawn[image], patch, grid).float() - expected).abs().max() <= 1.5
            else:
                assert torch.equal(drawn[image][:, pixels], pictures[image][:, pixels])


def test_borders_run_between_groups_and_not_inside_them() -> None:
    groups = torch.tensor([[0, 0, 1, 2], [0, 3, 4, 5]])[None].flatten(1)
    white = torch.full((1, 3, 64, 128), 255, dtype=torch.uint8)
    drawn = draw_groups(white, groups, (2, 4))[0]
    tint, line = drawn[:, 10, 10], drawn[:, 10, 63]
    assert line.sum() < tint.sum() < 3 * 255
    assert (drawn[:, 10, :60] == tint[:, None]).all()  # over the border of the patches inside the group
    assert (drawn[:, 10, 60:64] == line[:, None]).all()
    assert (drawn[:, 60:, 0] == tint[:, None]).all()  # none along the edge of the picture
    assert (drawn[:, 10, 64:] == 255).all()
    dark = draw_groups(white // 10, groups, (2, 4))[0]
    assert dark[:, 10, 63].sum() > 1.5 * dark[:, 10, 10].sum()


@pytest.mark.parametrize("size", [(48, 80), (50, 83)])
def test_borders_are_where_a_window_of_pixels_holds_two_numbers(size: tuple[int, int]) -> None:
    numbers = torch.randint(3, (40, 15), generator=torch.Generator().manual_seed(0))
    for distance in (1, 3):
        found = near_another(numbers, (3, 5), size, distance=distance)
        pixels = spread(numbers, (3, 5), size)[:, None].float()
        window = {"kernel_size": 2 * distance + 1, "stride": 1, "padding": distance}
        expected = F.max_pool2d(pixels, **window) != -F.max_pool2d(-pixels, **window)
        assert torch.equal(found, expected[:, 0])


def test_a_group_that_grows_keeps_its_color() -> None:
    grid, images = (4, 4), noise(8, 3, 64, 64)
    _, stages = stages_of(0.5, "guided")
    first, second = (draw_groups(images, stage.groups, grid) for stage in stages)
    for image in range(8):
        before, after = (stage.groups[image].tolist() for stage in stages)
        for patch in range(16):
            grew = before.index(before[patch]) == after.index(after[patch]) and before.count(before[patch]) > 1
            if grew:
                assert torch.equal(interior(first[image], patch, grid), interior(second[image], patch, grid))


@pytest.mark.parametrize("grid", [(7, 7), (8, 8), (14, 14), (16, 16), (12, 24)])
def test_neighbours_differ_in_color(grid: tuple[int, int]) -> None:
    colors = group_colors(grid).view(*grid, 3)
    pairs = [(colors[1:], colors[:-1]), (colors[:, 1:], colors[:, :-1]), (colors[1:, 1:], colors[:-1, :-1])]
    assert min((a - b).norm(dim=-1).min().item() for a, b in pairs) > 60


def test_map_colors_are_viridis() -> None:
    values = torch.linspace(0, 1, 11)[None]
    black = torch.zeros(1, 3, 16, 11, dtype=torch.uint8)
    drawn = draw_guidance(black, values, (1, 11))[0, :, 0].T / MAP_SHARE
    expected = torch.tensor(matplotlib.colormaps["viridis"](values[0].numpy())[:, :3]) * 255
    assert (drawn - expected).abs().max() < 2


def test_guidance_is_drawn_patch_by_patch_over_the_grey_picture() -> None:
    pictures, values = noise(2, 3, 30, 44), torch.rand(2, 15, generator=torch.Generator().manual_seed(1))
    drawn = draw_guidance(pictures, values, (3, 5)).float()
    color = (drawn - (1 - MAP_SHARE) * grey_of(pictures)) / MAP_SHARE
    pixels = spread(torch.arange(15), (3, 5), (30, 44))
    for patch in range(15):
        own = color[:, :, pixels == patch]
        assert (own.amax(-1) - own.amin(-1)).max() <= 1 / MAP_SHARE + 0.1
    assert [int((pixels == patch).sum()) for patch in (0, 1, 4)] == [10 * 9, 10 * 9, 10 * 8]


@pytest.mark.parametrize(
    ("size", "panel"),
    [((64, 64), (192, 192)), ((28, 40), (196, 280)), ((224, 300), (224, 300)), ((384, 768), (256, 512))],
)
def test_small_pictures_are_magnified_by_whole_numbers(size: tuple[int, int], panel: tuple[int, int]) -> None:
    pictures = noise(1, 3, *size)
    drawn = panel_pictures(pictures)
    assert tuple(drawn.shape[-2:]) == panel
    if panel[0] <= 224:
        factor = panel[0] // size[0]
        assert torch.equal(drawn[..., ::factor, ::factor], pictures)


def test_magnified_panels_are_exact_and_photos_small() -> None:
    panel = panel_pictures(noise(1, 3, 32, 32))[0]
    with Image.open(io.BytesIO(as_webp(panel, is_magnified=True))) as image:
        assert torch.equal(pil_to_tensor(image), panel)
    assert len(as_webp(noise(1, 3, 224, 224)[0], is_magnified=False)) < 60_000 < 3 * 224 * 224


def test_pictures_are_drawn_at_random_and_always_the_same() -> None:
    assert numbers_at_random(4, 400) == numbers_at_random(4, 400) == sorted(set(numbers_at_random(4, 400)))
    assert max(numbers_at_random(4, 400)) > 20
    assert numbers_at_random(8, 5) == [0, 1, 2, 3, 4]


def test_of_many_merges_the_first_the_last_and_one_between_are_drawn() -> None:
    merges = [MergeStage(block, torch.zeros(1, 4), None, None, None) for block in range(2, 14)]
    shown = {n: [stage.block for stage in spread_evenly(merges[:n])] for n in (0, 1, 2, 3, 4, 6, 12)}
    assert shown == {0: [], 1: [2], 2: [2, 3], 3: [2, 3, 4], 4: [2, 4, 5], 6: [2, 4, 7], 12: [2, 8, 13]}
