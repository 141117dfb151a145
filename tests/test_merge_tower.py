"""Merging inside whole image towers: timm's variants, memory and compilation, and inputs that are odd or damaged."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from models_for_tests import small_batch, small_model, small_recipe
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch._dynamo.utils import counters

from mlip_cli.config import Vision
from mlip_cli.errors import UsageError
from mlip_cli.merge_plan import GUIDANCE, METHODS, MergePlan
from mlip_cli.model import merge_pass, vision
from mlip_cli.model.clip import CLIP
from mlip_cli.model.merge_pass import MergePass, Patches
from mlip_cli.model.merging import grid_parity
from mlip_cli.model.vision import ImageTower, ObservedBlock

TINY = {"depth": 3, "embed_dim": 48, "num_heads": 3}
VARIANTS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "class token": ("vit_tiny_patch16_224", {}, True),
    "distilled": ("deit_tiny_distilled_patch16_224", {}, True),
    "DeiT-3": ("deit3_small_patch16_224", {}, True),
    "q/k-norm and LayerScale": ("vit_tiny_patch16_224", {"qk_norm": True, "init_values": 0.1}, True),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", {}, True),
    "CLIP with norm_pre": ("vit_base_patch32_clip_224", {}, True),
    "registers and mean": ("vit_base_patch16_reg4_gap_256", {}, True),
    "mean without class token": ("vit_base_patch16_gap_224", {}, True),
    "mean over prefix too": ("vit_tiny_patch16_224", {"global_pool": "avg", "pool_include_prefix": True}, True),
    "mean and maximum": ("vit_tiny_patch16_224", {"global_pool": "avgmax"}, True),
    "maximum": ("vit_tiny_patch16_224", {"global_pool": "max"}, True),
    "SigLIP": ("vit_base_patch16_siglip_224", {}, True),
    "attention pool with registers": ("vit_so150m_patch16_reg4_map_256", {"mlp_ratio": 4.0}, True),
    "parallel blocks": ("vit_small_patch16_18x2_224", {}, False),
    "attention beside MLP": ("vit_tiny_patch16_224", {"block_fn": ParallelScalingBlock}, False),
    "norms behind": ("vit_tiny_patch16_224", {"block_fn": ResPostBlock}, False),
    "differential attention": ("vit_dlittle_patch16_reg1_gap_256", {}, False),
    "norm inside attention": ("vit_tiny_patch16_224", {"scale_attn_norm": True}, False),
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[ImageTower, VisionTransformer]]:
    """From a variant's name, our tower of 4 x 4 patches and timm's model with the same weights; 3 narrow blocks."""
    create = timm.create_model

    def build(variant: str) -> tuple[ImageTower, VisionTransformer]:
        name, changes, _ = VARIANTS[variant]

        def small(name: str, **settings: Any) -> VisionTransformer:
            return create(name, **(TINY | changes | settings))

        monkeypatch.setattr(vision.timm, "create_model", small)
        torch.manual_seed(0)
        size = 4 * timm.create_model(name, num_classes=0).patch_embed.patch_size[0]
        tower = ImageTower(Vision(timm=name), image_size=size)
        for parameter in tower.parameters():  # some are zeros or near them
            nn.init.normal_(parameter, std=0.2)
        plain = small(name, num_classes=0, img_size=size)
        plain.load_state_dict(tower.trunk.state_dict())
        return tower.double().eval(), plain.double().eval()

    return build


def plan_of(tower: ImageTower, rate: float, **changes: Any) -> MergePlan:
    settings = {"at": (2,), "method": "tome", "multiple_of": 1} | changes
    return MergePlan.resolve(
        depth=tower.depth, num_patches=tower.num_patches, num_prefix=tower.num_prefix, rate=rate, **settings
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_at_rate_0_a_tower_is_timms_bit_for_bit(variant: str, tiny: Callable[[str], Any]) -> None:
    tower, plain = tiny(variant)
    assert all(isinstance(block, ObservedBlock) for block in tower.trunk.blocks) == VARIANTS[variant][2]
    images = torch.randn(2, 3, *tower.trunk.patch_embed.img_size, dtype=torch.float64)
    for training in (False, True):
        tower.train(training), plain.train(training)
        ours = tower(images, tower.embed(images), plan_of(tower, 0.0))
        theirs = plain.forward_features(images)
        assert torch.equal(ours.tokens, theirs[:, plain.num_prefix_tokens :])
        assert torch.equal(ours.pooled, plain.forward_head(theirs, pre_logits=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_merging_duplicates_changes_nothing(variant: str, tiny: Callable[[str], Any]) -> None:
    """A tower of which patches are copies of each other gives the same with one token for each set of copies."""
    tower, _ = tiny(variant)
    source = torch.tensor([0, 1, 2, 0, 3, 4, 5, 6, 6, 7, 8, 6, 0, 2, 9, 6])
    embedded = torch.randn(2, tower.num_prefix + 16, tower.width, dtype=torch.float64)
    patches = embedded[:, tower.num_prefix :]
    embedded = torch.cat([embedded[:, : tower.num_prefix], patches[:, source]], 1)
    images = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    plan = plan_of(tower, 0.375)
    assert plan.tokens == (16, 10, 10)
    whole = tower(images, embedded, plan_of(tower, 0.0))
    merged = tower(images, embedded, plan, assign=(source.expand(2, -1),))
    assert merged.sizes.tolist() == [[3, 1, 2, 1, 1, 1, 4, 1, 1, 1]] * 2
    torch.testing.assert_close(merged.tokens[:, source], whole.tokens, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(merged.pooled, whole.pooled, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tower_merges_by_every_method(variant: str, tiny: Callable[[str], Any]) -> None:
    tower, _ = tiny(variant)
    images = torch.randn(2, 3, *tower.trunk.patch_embed.img_size, dtype=torch.float64)
    for method in METHODS:
        found = tower(images, tower.embed(images), plan_of(tower, 0.5, method=method, at=(2, 3)))
        assert found.tokens.shape == (2, 8, 48)
        assert found.sizes.sum(1).tolist() == [8 if method == "random_drop" else 16] * 2
        assert found.pooled.isfinite().all()


def test_a_pool_that_cannot_weigh_tokens_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    prr = {**TINY, "global_pool": "prr"}
    monkeypatch.setattr(vision.timm, "create_model", lambda name, **s: create(name, **(prr | s)))
    changes = {"data": {"image_size": 64}, "model": {"vision": {"timm": "vit_tiny_patch16_224"}}}
    model = small_model(small_recipe(mlip=False, **changes), dtype=torch.float32)
    assert model.encode_image(torch.randn(1, 3, 64, 64)).isfinite().all()
    for method in ("guided", "tome"):
        with pytest.raises(UsageError) as caught:
            model.merge_plan(0.5, method)
        assert str(caught.value) == ("model.merging: towers that pool by 'prr' cannot merge; set model.merging to null")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("eva02_tiny_patch14_224", "Eva"),
        ("vit_small_patch16_dinov3", "Eva"),
        ("vit_base_patch16_rope_224", "Eva"),
        ("beit_base_patch16_224", "Beit"),
        ("vit_relpos_small_patch16_224", "VisionTransformerRelPos"),
        ("samvit_base_patch16", "VisionTransformerSAM"),
        ("naflexvit_base_patch16_gap", "NaFlexVit"),
        ("cait_xxs24_224", "Cait"),
    ],
)
def test_other_towers_are_refused_by_name(name: str, kind: str) -> None:
    with pytest.raises(UsageError, match=rf"^model\.vision\.timm: {name} is a {kind}; only VisionTransformer and "):
        ImageTower(Vision(timm=name), image_size=224)


def test_prefix_tokens_and_the_sum_of_all_patches_stay(tiny: Callable[[str], Any]) -> None:
    tower, _ = tiny("DINOv2 with registers")
    x = torch.randn(3, 5 + 16, 48, dtype=torch.float64)
    for method in METHODS:
        plan = plan_of(tower, 0.6, method=method, at=(2, 3))
        patches = Patches(tower.grid, tower.patch_size, 5, has_class_token=True)
        state = MergePass(torch.randn(3, 3, 56, 56, dtype=torch.float64), plan, patches=patches)
        y, parts = x, x[:, 5:]
        for count in plan.merges.values():
            y = state.merge(y, count)
            assert torch.equal(y[:, :5], x[:, :5])
            assert y.shape[1] == 5 + count
            if method != "random_drop":
                torch.testing.assert_close((y[:, 5:] * state.sizes[..., None]).sum(1), parts.sum(1))
                assert torch.equal(state.sizes.sum(1), torch.full((3,), 16.0, dtype=torch.float64))


@pytest.mark.parametrize(("h", "w"), [(3, 5), (5, 5), (2, 7)])
@pytest.mark.parametrize("method", METHODS)
def test_odd_and_oblong_grids(h: int, w: int, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = VisionTransformer(
        img_size=(8 * h, 8 * w), patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=0, block_fn=ObservedBlock
    )
    monkeypatch.setattr(vision, "build_trunk", lambda config, image_size: trunk)
    tower = ImageTower(Vision(), image_size=8 * h)
    assert tower.grid == (h, w)
    images = torch.randn(2, 3, 8 * h, 8 * w)
    plan = plan_of(tower, 0.45, method=method, at=(2, 3))
    found = tower(images, tower.embed(images), plan)
    assert found.tokens.shape[1] == plan.tokens[-1]
    assert found.sizes.sum(1).tolist() == [plan.tokens[-1] if method == "random_drop" else h * w] * 2


def test_pictures_of_another_size_are_refused() -> None:
    with pytest.raises(UsageError, match=r"^images: 24 x 32 pixels, but the model reads 32 x 32$"):
        small_model().encode_image(torch.zeros(1, 3, 24, 32, dtype=torch.uint8))


def test_577_tokens_under_bf16_autocast_keep_their_sizes() -> None:
    recipe = small_recipe(mlip=False, data={"image_size": 96}, model={"vision": {
        "patch_size": 4, "width": 16, "depth": 4, "num_heads": 1}, "merging": {"rate": 0.6, "at": [2, 3]}})  # fmt: skip
    model = small_model(recipe, dtype=torch.float32)
    images = torch.zeros(1, 3, 96, 96, dtype=torch.uint8)
    images[..., 48:, :] = 255
    with torch.autocast("cpu", torch.bfloat16):
        encoded = model.vision(model.normalize(images), model.vision.embed(model.normalize(images)), model.plan)
    assert encoded.sizes.dtype == torch.float32
    assert encoded.sizes.sum() == 576
    counts = encoded.assign[-1][0].bincount()
    assert torch.equal(counts, encoded.sizes[0].long())


def guided(model: CLIP, guidance: str, **changes: Any) -> MergePlan:
    tower = model.vision
    return plan_of(tower, 0.5, method="guided", guidance=guidance, at=(2, 3), **changes)


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


@pytest.mark.parametrize("method", [*GUIDANCE, "tome"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_pixel_that_is_no_number_spoils_its_picture_alone(method: str, value: float) -> None:
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


def test_guidance_is_what_the_plan_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[tuple[Tensor | None, float]] = []
    match = merge_pass.match

    def spy(metric: Tensor, guidance: Tensor | None, parity: Tensor, num_groups: int, *, strength: float) -> Tensor:
        received.append((guidance, strength))
        return match(metric, guidance, parity, num_groups, strength=strength)

    monkeypatch.setattr(merge_pass, "match", spy)
    model, images = small_model().eval(), small_batch().images
    first = {g: model.merge_stages(images, guided(model, g, strength=0.5 + i))[0] for i, g in enumerate(GUIDANCE)}
    for (used, strength), (i, stage) in zip(received[::2], enumerate(first.values()), strict=True):
        assert used is not None
        assert strength == 0.5 + i
        assert torch.equal(used, stage.mixed)
    mixed = first["mixed"]
    assert torch.equal(first["spatial"].mixed, mixed.spatial)
    assert torch.equal(first["frequency"].mixed, mixed.frequency)
    assert torch.equal(first["inverse"].mixed, 1 - mixed.mixed)
    assert [s.spatial is None for s in first.values()] == [False, False, True, False]
    assert [s.frequency is None for s in first.values()] == [False, True, False, False]
    assert len({str(s.groups.tolist()) for s in first.values()}) == 4


def test_what_nobody_asks_for_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
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
        model.encode_image(batch.images)
        assert runs == [1]


@pytest.mark.parametrize("method", ["guided", "random_drop"])  # those with the most of their own to trace
def test_a_merged_model_compiles_to_one_graph(method: str) -> None:
    model, images = small_model(dtype=torch.float32), small_batch().images
    wanted = model.merge_plan(0.5, method)
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


def test_matching_alone_breaks_no_graph() -> None:
    """Full graphs bear shapes that depend on data; without that demand they break there."""
    metric, guidance = torch.randn(2, 15, 4), torch.rand(2, 15)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(merge_pass.match, backend="eager")
    found = compiled(metric, guidance, grid_parity(3, 5), 9, strength=0.25)
    assert torch.equal(found, merge_pass.match(metric, guidance, grid_parity(3, 5), 9, strength=0.25))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
