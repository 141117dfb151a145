"""Placement `stem`: spectral blocks in the place of a tower's first attention blocks, from recipe to commands."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import make_run, small_batch, small_model, small_recipe
from reference_for_tests import convolve_by_fft, patches_of
from shards_for_tests import make_dataset
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from mlip_cli.commands import merge_sweep
from mlip_cli.commands.profile import profile
from mlip_cli.errors import UsageError
from mlip_cli.model import merge_pass
from mlip_cli.model.frequency import StemBlock, place_stem
from mlip_cli.model.vision import ImageTower
from mlip_cli.recipe.checks import check
from mlip_cli.recipe.config import Frequency, Recipe, Vision
from mlip_cli.recipe.merge_plan import MergePlan, default_places, wrong_places
from mlip_cli.train.optim import is_decayed


def stem_recipe(depth: int = 1, *, merging: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    """Of 4 blocks; merges before the last two."""
    model = {
        "frequency": {"placement": "stem", "width": 32, "depth": depth},
        "merging": merging or {"rate": 0.5, "at": [3, 4]},
    }
    return small_recipe(model=model | changes)


def test_a_stem_replaces_the_first_attention_blocks() -> None:
    model, images = small_model(stem_recipe(2, merging={"rate": 0.0})), small_batch().images
    pixels, trunk = model.normalize(images), model.vision.trunk
    first, second, third, fourth = trunk.blocks
    assert (type(first), type(second)) == (StemBlock, StemBlock)
    assert isinstance(third, Block)
    assert model.vision.depth == len(model.merge_plan(0.0).tokens) == 4

    x = model.vision.embed(pixels)
    for block in (first, second):
        grid = x[:, 1:].unflatten(1, (4, 4))
        grid = grid + convolve_by_fft(block.norm1(grid), block.filter.kernel)
        grid = grid + block.mlp(block.norm2(grid))
        x = torch.cat([x[:, :1], grid.flatten(1, 2)], dim=1)
    features = model.image_features(images, model.merge_plan(0.0))
    spatial = trunk.norm(fourth(third(x)))[:, 0]
    torch.testing.assert_close(features.spatial, model.image_projection(spatial), rtol=1e-10, atol=1e-10)
    mean = nn.functional.layer_norm(x[:, 1:], (32,)).mean(1)
    torch.testing.assert_close(features.frequency, model.frequency_projection(mean), rtol=1e-10, atol=1e-10)
    assert torch.equal(model.encode_image(images, model.merge_plan(0.0)), features.spatial)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "vit_tiny_r_s16_p8_224"])
def test_a_named_tower_takes_a_stem(name: str) -> None:
    torch.manual_seed(0)
    stem = Frequency(placement="stem", width=192, depth=3)
    tower = ImageTower(Vision(timm=name), image_size=64, frequency=stem).eval()
    assert [isinstance(block, StemBlock) for block in tower.trunk.blocks] == [True] * 3 + [False] * 9
    prefix = tower.num_prefix
    plan = MergePlan.resolve(depth=12, num_patches=tower.num_patches, rate=0.5, at=None, method="guided", stem=3)
    assert plan.at[0] == 4  # right behind the stem
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found = tower(images, plan)
        assert torch.equal(tower.trunk.blocks[0](found.embedded)[:, :prefix], found.embedded[:, :prefix])
    assert found.stem_tokens is not None
    assert found.stem_tokens.shape == (2, tower.num_patches, 192)
    assert (found.sizes.sum(1) == tower.num_patches).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 24}, "model.frequency.width: 24, but the blocks of a stem are as wide as the tower; use 32"),
        ({"depth": 3}, "model.frequency.depth: 3 leaves no attention block in a tower of 3 blocks; use less"),
    ],
)
def test_a_stem_that_does_not_fit_its_tower_is_refused(changes: dict[str, int], message: str) -> None:
    stem = Frequency(**({"placement": "stem", "width": 32, "depth": 2} | changes))  # type: ignore[arg-type]
    trunk = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=0)
    with pytest.raises(UsageError) as caught:
        place_stem(trunk, stem)
    assert str(caught.value) == message


def test_every_parameter_of_a_stem_trains_and_its_kernels_do_not_decay() -> None:
    model = small_model(stem_recipe())
    encoded = model(small_batch(), model.training_plan)
    assert (encoded.token_sizes.sum(1) == 16).all()
    assert encoded.frequency_tokens is not None
    assert encoded.frequency_tokens.shape == (8, 16, 12)
    outputs = [v for v in vars(encoded).values() if torch.is_tensor(v) and v.requires_grad]
    (sum(v.sum() for v in outputs) + sum(v.sum() for v in encoded.scales.values())).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    kernels = [n for n, p in model.named_parameters() if n.endswith("kernel") and not is_decayed(n, p)]
    assert kernels == ["vision.trunk.blocks.0.filter.kernel"]
    assert model.blocks_above()[kernels[0]] == 3


def test_stages_of_merges_behind_a_stem_keep_the_numbers_of_blocks() -> None:
    model = small_model(stem_recipe(2, merging={"rate": 0.25}))
    stages = model.merge_stages(small_batch().images, model.plan)
    assert [stage.block for stage in stages] == [3, 4]
    for stage in stages:
        assert (stage.groups.max(1).values == model.plan.tokens[stage.block - 1] - 1).all()
        assert stage.spatial is not None


def test_default_places_begin_right_behind_a_stem() -> None:
    for stem, first, last in ((1, 2, 5), (2, 3, 6), (6, 7, 10), (10, 11, 12)):
        assert default_places(12, stem=stem) == tuple(range(first, last + 1))
    assert default_places(4, stem=2) == (3, 4)
    assert default_places(12, "random_drop", stem=2) == (3,)


@pytest.mark.parametrize("method", ["guided", "tome"])
def test_right_behind_a_stem_the_tokens_that_the_next_block_reads_serve_as_keys(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: list[torch.Tensor] = []
    rule = {"guided": "ward_cost", "tome": "cosine_cost"}[method]
    cost = getattr(merge_pass, rule)

    def spy(keys: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
        received.append(keys)
        return cost(keys, *others, **options)

    monkeypatch.setattr(merge_pass, rule, spy)
    model, images = small_model(stem_recipe(2, merging={"rate": 0.5})).eval(), small_batch().images
    pixels, (first, second, third, _) = model.normalize(images), model.vision.trunk.blocks
    model.encode_image(images, model.merge_plan(0.5, method))
    behind = second(first(model.vision.embed(pixels)))
    assert torch.equal(third.norm1.bias, torch.zeros(32))
    assert torch.equal(received[0], third.norm1(behind)[:, 1:])
    assert received[1].shape == (8, 11, 16)  # the keys of an attention block, averaged over its heads


def test_large_activations_behind_a_stem_do_not_decide_alone() -> None:
    """Scaling a token, which the next block's norm undoes, changes no group."""
    plan = MergePlan.resolve(depth=4, num_patches=16, rate=0.5, at=(3,), method="guided", stem=2)
    patches = patches_of((4, 4), 8, 0, has_class_token=False)
    tokens, images = torch.randn(2, 16, 32, dtype=torch.float64), small_model().normalize(small_batch().images[:2])
    found = []
    for scale in (torch.ones(16, 1), torch.logspace(0, 3, 16)[:, None]):
        state = merge_pass.MergePass(images, plan, patches=patches)
        state.merge(tokens * scale, 8)
        found.append(state.assigns[0])
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("places", "depth", "method", "message"),
    [
        ((2, 5), 12, "tome", "[2, 5] starts too early; the first place for tome is 3"),
        ((1,), None, "guided", "[1] starts too early; the first place for guided is 3"),
        ((2,), 12, "random_drop", "[2] starts too early; the first place for random_drop is 3"),
        ((4,), 3, "guided", "[4] goes beyond the tower's depth 3; the last block is 3"),
        ((3,), 12, "guided", None),
        ((3,), 12, "random_drop", None),
    ],
)  # fmt: skip
def test_places_inside_a_stem_are_refused(
    places: tuple[int, ...], depth: int | None, method: str, message: str | None
) -> None:
    assert wrong_places(places, depth=depth, method=method, stem=2) == message
    if message is not None and depth is not None:
        with pytest.raises(UsageError) as caught:
            MergePlan.resolve(depth=depth, num_patches=64, rate=0.25, at=places, method=method, stem=2)
        assert str(caught.value) == f"model.merging.at: {message}"


def test_a_recipe_says_where_merges_behind_its_stem_start() -> None:
    too_early = "[1, 3] starts too early; the first place for guided is 2"
    assert check(stem_recipe(merging={"at": [1, 3]})) == [("model.merging.at", too_early)]
    assert check(stem_recipe(merging={"rate": 0.25})) == []
    [(place, _)] = check(stem_recipe(4))
    assert place == "model.frequency.depth"


def test_drops_behind_a_stem_keep_all_stem_tokens() -> None:
    model = small_model(stem_recipe(2, merging={"rate": 0.5, "method": "random_drop"}))
    encoded = model.train()(small_batch(), model.training_plan)
    assert encoded.token_sizes.shape[1] == model.training_plan.tokens[-1] < 16
    assert encoded.frequency_tokens is not None
    assert encoded.frequency_tokens.shape[1] == 16


@pytest.mark.slow
def test_commands_measure_and_draw_a_run_with_a_stem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_dataset(tmp_path / "data" / "colors", n=12)
    recipe = stem_recipe(merging={"rate": 0.4, "at": [3]})
    make_run(tmp_path / "runs" / "stem", recipe)
    profile("runs/stem", batch_size=2, rounds=1, device="cpu", as_json=True)
    result = json.loads(capsys.readouterr().out)
    assert list(result["gflops"]["image_tower_by_part"])[:3] == ["patch embedding", "global filters", "attention"]
    parts = {line["part"]: line["seconds"] for line in result["breakdown"]}
    assert min(parts[name] for name in ("image tower, blocks 1-2", "image tower, blocks 3-4", "frequency branch")) > 0

    merge_sweep.merge_sweep(
        "runs/stem", rates=[0.25], methods=["guided"], datasets=["shards:data/colors"], data_root=None,
        num_pictures=2, batch_size=4, rounds=1, device="cpu", as_json=True,
    )  # fmt: skip
    assert [point["rate"] for point in json.loads(capsys.readouterr().out)["points"]] == [0, 0.25]
    [account] = (tmp_path / "runs" / "stem" / "evals").glob("merge_pictures_*.json")
    assert [point["stages"][0]["block"] for point in json.loads(account.read_text())["points"]] == [3]


@pytest.mark.parametrize("pool", [None, "mean"])
def test_tokens_of_a_tower_lie_in_order_in_memory(pool: str | None) -> None:
    """Without a class token nothing else would bring them into order behind the convolution."""
    recipe = small_recipe()
    vision = recipe.model.vision.model_copy(update={"pool": pool})
    model = small_model(recipe.model_copy(update={"model": recipe.model.model_copy(update={"vision": vision})}))
    assert model.vision.embed(model.normalize(small_batch().images)).is_contiguous()
