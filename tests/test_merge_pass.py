"""Merging in one model: what guides it, what it computes, odd or damaged pictures, memory and compilation."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from models_for_tests import small_batch, small_model, small_recipe
from reference_for_tests import patches_of
from torch import Tensor
from torch._dynamo.utils import counters

from mlip_cli.errors import UsageError
from mlip_cli.model import merge_pass, vision
from mlip_cli.model.clip import CLIP
from mlip_cli.model.merge_pass import MergePass
from mlip_cli.model.merging import grid_halves
from mlip_cli.recipe.merge_plan import GUIDANCE, METHODS, MergePlan


def test_pictures_of_another_size_are_refused() -> None:
    model = small_model()
    with pytest.raises(UsageError, match=r"^images: 24 x 32 pixels, but the model reads 32 x 32$"):
        model.encode_image(torch.zeros(1, 3, 24, 32, dtype=torch.uint8), model.plan)


def test_577_tokens_under_bf16_autocast_keep_their_sizes() -> None:
    recipe = small_recipe(mlip=False, data={"image_size": 96}, model={"vision": {
        "patch_size": 4, "width": 16, "depth": 4, "num_heads": 1}, "merging": {"rate": 0.6, "at": [2, 3]}})  # fmt: skip
    model = small_model(recipe, dtype=torch.float32)
    images = torch.zeros(1, 3, 96, 96, dtype=torch.uint8)
    images[..., 48:, :] = 255
    with torch.autocast("cpu", torch.bfloat16):
        encoded = model.image_tower(images, model.plan)
    assert encoded.sizes.dtype == torch.float32
    assert encoded.sizes.sum() == 576
    counts = encoded.assign[-1][0].bincount()
    assert torch.equal(counts, encoded.sizes[0].long())


def guided(model: CLIP, guidance: str, *, strength: float = 2.0) -> MergePlan:
    return replace(model.merge_plan(0.5, "guided"), guidance=guidance, strength=strength)


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_blank_constant_and_single_images_are_finite(guidance: str) -> None:
    model = small_model()
    for value in (0, 255, 77):
        images = torch.full((1, 3, 32, 32), value, dtype=torch.uint8)
        features = model.encode_image(images, guided(model, guidance))
        assert features.isfinite().all()
    model.vision.trunk.blocks[0].attn.qkv.weight.data.zero_()  # zero keys
    model.vision.trunk.blocks[0].attn.qkv.bias.data.zero_()
    assert model.encode_image(images, guided(model, guidance)).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("method", [*GUIDANCE, "tome"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nan_pixel_spoils_only_its_own_picture(method: str, value: float) -> None:
    model = small_model().eval()
    plan = model.merge_plan(0.5, "tome") if method == "tome" else guided(model, method)
    images = model.normalize(small_batch().images)
    whole = model.encode_image(images, plan)
    images[3, 0, 17, 9] = value
    spoiled = model.encode_image(images, plan)
    assert spoiled[3].isnan().all()
    others = torch.arange(8) != 3
    assert torch.equal(spoiled[others], whole[others])
    for stage, count in zip(model.merge_stages(images, plan), plan.merges.values(), strict=True):
        assert all(set(row) == set(range(count)) for row in stage.groups.tolist())
        for values in (stage.spatial, stage.frequency, stage.mixed):
            assert values is None or ((values >= 0) & (values <= 1)).all()


def test_each_kind_of_guidance_uses_its_own_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[tuple[Tensor, float]] = []
    ward_cost = merge_pass.ward_cost

    def spy(keys: Tensor, sizes: Tensor, guidance: Tensor, *halves: Tensor, strength: float) -> Tensor:
        received.append((guidance, strength))
        return ward_cost(keys, sizes, guidance, *halves, strength=strength)

    monkeypatch.setattr(merge_pass, "ward_cost", spy)
    model, images = small_model().eval(), small_batch().images
    first = {g: model.merge_stages(images, guided(model, g, strength=0.5 + i))[0] for i, g in enumerate(GUIDANCE)}
    for (used, strength), (i, stage) in zip(received[::2], enumerate(first.values()), strict=True):
        assert strength == 0.5 + i
        assert torch.equal(used, stage.mixed)
    mixed = first["mixed"]
    assert torch.equal(first["spatial"].mixed, mixed.spatial)
    assert torch.equal(first["frequency"].mixed, mixed.frequency)
    assert torch.equal(first["inverse"].mixed, 1 - mixed.mixed)
    assert [s.spatial is None for s in first.values()] == [False, False, True, False]
    assert [s.frequency is None for s in first.values()] == [False, True, False, False]
    assert len({str(s.groups.tolist()) for s in first.values()}) == 4


def test_guidance_computes_only_its_own_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    attend, energy = vision.attend, merge_pass.frequency_guidance

    def spy_attend(*arguments: Any, with_row: bool) -> Any:
        done.append("row" if with_row else "keys")
        return attend(*arguments, with_row=with_row)

    def spy_energy(*arguments: Any) -> Tensor:
        done.append("DCT")
        return energy(*arguments)

    monkeypatch.setattr(vision, "attend", spy_attend)
    monkeypatch.setattr(merge_pass, "frequency_guidance", spy_energy)
    model, images = small_model(), small_batch().images

    def parts(plan: MergePlan) -> list[str]:
        done.clear()
        model.encode_image(images, plan)
        return list(done)

    assert parts(guided(model, "mixed")) == parts(guided(model, "inverse")) == ["DCT", "row", "row"]
    assert parts(guided(model, "spatial")) == ["row", "row"]
    assert parts(guided(model, "frequency")) == ["DCT", "keys", "keys"]
    assert parts(model.merge_plan(0.5, "tome")) == ["keys", "keys"]
    assert parts(model.merge_plan(0.5, "random_drop")) == parts(model.merge_plan(0.0)) == []


@pytest.mark.parametrize("method", METHODS)
def test_checkpointed_gradients_are_the_plain_ones(method: str) -> None:
    model, batch = small_model(), small_batch()
    runs = [0]
    model.vision.trunk.blocks[1].register_forward_pre_hook(lambda *_: runs.append(runs.pop() + 1))

    def gradients() -> list[Tensor | None]:
        model.zero_grad()
        runs[0] = 0
        torch.manual_seed(5)
        encoded = model(batch, model.merge_plan(0.5, method))
        (encoded.image_features.square().sum() + encoded.image_tokens.square().sum()).backward()
        return [p.grad for p in model.vision.parameters()]

    plain = gradients()
    assert runs == [1]
    model.vision.trunk.set_grad_checkpointing()
    again = gradients()
    assert runs == [2]
    assert all(g is not None and torch.equal(g, p) for g, p in zip(again, plain, strict=True))
    with torch.no_grad():
        runs[0] = 0
        model.encode_image(batch.images, model.plan)
        assert runs == [1]


@pytest.mark.slow
def test_a_merged_model_compiles_to_one_graph() -> None:
    model, images = small_model(dtype=torch.float32), small_batch().images
    wanted = model.merge_plan(0.5, "guided")
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model.encode_image, fullgraph=True, backend="eager")
    found = []
    for encode in (compiled, model.encode_image, compiled):
        torch.manual_seed(3)
        found.append(encode(images, wanted))
    torch.testing.assert_close(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    found[0].square().sum().backward()


@pytest.mark.slow
def test_matching_and_drops_alone_break_no_graph() -> None:
    """Full graphs bear shapes that depend on data; without that demand they break there."""
    patches = patches_of((3, 5), 8, 1, has_class_token=True)
    drops = MergePlan.resolve(depth=2, num_patches=15, rate=0.4, at=(1,), method="random_drop")

    def matched(tokens: Tensor) -> Tensor:
        even, odd = grid_halves(3, 5)
        guidance = tokens[..., 0].sigmoid()
        cost = merge_pass.ward_cost(tokens, torch.ones(2, 15), guidance, even, odd, strength=2.0)
        return merge_pass.match(cost, even, odd, 9)

    def dropped(tokens: Tensor) -> Tensor:
        return MergePass(tokens, drops, patches=patches).merge(tokens, 9)

    for function, given in ((matched, torch.randn(2, 15, 4)), (dropped, torch.randn(2, 16, 4))):
        torch._dynamo.reset()
        counters.clear()
        found = []
        for run in (torch.compile(function, backend="eager"), function):
            torch.manual_seed(3)
            found.append(run(given))
        assert torch.equal(*found)
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]
