"""Merging inside whole image towers: timm's variants, their prefix tokens, grids of any form, and what is refused."""

from typing import Any
from unittest.mock import patch

import pytest
import timm
import torch
from models_for_tests import small_model, small_recipe
from reference_for_tests import patches_of
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer
from torch import nn

from mlip_cli.errors import UsageError
from mlip_cli.model import vision
from mlip_cli.model.merge_pass import MergePass
from mlip_cli.model.vision import ImageTower, ObservedBlock
from mlip_cli.recipe.config import Vision
from mlip_cli.recipe.merge_plan import METHODS, MergePlan

Towers = tuple[ImageTower, VisionTransformer]
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


@pytest.fixture(scope="module", params=VARIANTS)
def towers(request: pytest.FixtureRequest) -> Towers:
    """Our tower of 4 x 4 patches and timm's model with the same weights; 3 narrow blocks."""
    name, changes, _ = VARIANTS[request.param]
    create = timm.create_model

    def small(name: str, **settings: Any) -> VisionTransformer:
        return create(name, **(TINY | changes | settings))

    with torch.device("meta"):
        size = 4 * small(name, num_classes=0).patch_embed.patch_size[0]
    torch.manual_seed(0)
    with patch.object(vision.timm, "create_model", small):
        tower = ImageTower(Vision(timm=name), image_size=size)
    for parameter in tower.parameters():  # some are zeros or near them
        nn.init.normal_(parameter, std=0.2)
    plain = small(name, num_classes=0, img_size=size)
    plain.load_state_dict(tower.trunk.state_dict())
    return tower.double().eval(), plain.double().eval()


def plan_of(tower: ImageTower, rate: float, **changes: Any) -> MergePlan:
    settings = {"at": (2,), "method": "tome"} | changes
    return MergePlan.resolve(depth=tower.depth, num_patches=tower.num_patches, rate=rate, **settings)


@pytest.mark.slow
def test_at_rate_0_a_tower_is_timms_bit_for_bit(towers: Towers, request: pytest.FixtureRequest) -> None:
    tower, plain = towers
    assert (
        all(isinstance(block, ObservedBlock) for block in tower.trunk.blocks)
        == VARIANTS[request.node.callspec.params["towers"]][2]
    )
    images = torch.randn(2, 3, *tower.trunk.patch_embed.img_size, dtype=torch.float64)
    for training in (True, False):
        tower.train(training), plain.train(training)
        ours = tower(images, plan_of(tower, 0.0))
        theirs = plain.forward_features(images)
        assert torch.equal(ours.tokens, theirs[:, plain.num_prefix_tokens :])
        assert torch.equal(ours.pooled, plain.forward_head(theirs, pre_logits=True))


def test_class_attention_guides_only_where_the_class_token_is_the_feature(
    towers: Towers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the class token, if there is one, is pooled away, and nothing says that it looks at what matters."""
    tower, plain = towers
    asked: list[bool] = []
    attend = vision.attend

    def spy(*arguments: Any, with_row: bool) -> Any:
        asked.append(with_row)
        return attend(*arguments, with_row=with_row)

    monkeypatch.setattr(vision, "attend", spy)
    images = torch.randn(2, 3, *tower.trunk.patch_embed.img_size, dtype=torch.float64)
    tower(images, plan_of(tower, 0.5, method="guided"))
    if all(isinstance(block, ObservedBlock) for block in tower.trunk.blocks):
        assert asked == [plain.cls_token is not None and plain.global_pool == "token"]


def test_merging_duplicates_changes_nothing(towers: Towers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tower of which patches are copies of each other gives the same with one token for each set of copies."""
    tower, _ = towers
    source = torch.tensor([0, 1, 2, 0, 3, 4, 5, 6, 6, 7, 8, 6, 0, 2, 9, 6])
    embedded = torch.randn(2, tower.num_prefix + 16, tower.width, dtype=torch.float64)
    patches = embedded[:, tower.num_prefix :]
    embedded = torch.cat([embedded[:, : tower.num_prefix], patches[:, source]], 1)
    monkeypatch.setattr(tower, "embed", lambda images: embedded)
    images = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    plan = plan_of(tower, 0.375)
    assert plan.tokens == (16, 10, 10)
    whole = tower(images, plan_of(tower, 0.0))
    merged = tower(images, plan, assign=(source.expand(2, -1),))
    assert merged.sizes.tolist() == [[3, 1, 2, 1, 1, 1, 4, 1, 1, 1]] * 2
    torch.testing.assert_close(merged.tokens[:, source], whole.tokens, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(merged.pooled, whole.pooled, rtol=1e-9, atol=1e-9)


def test_every_tower_merges_by_every_method(towers: Towers) -> None:
    tower, _ = towers
    images = torch.randn(2, 3, *tower.trunk.patch_embed.img_size, dtype=torch.float64)
    for method in METHODS:
        found = tower(images, plan_of(tower, 0.5, method=method, at=(2, 3)))
        assert found.tokens.shape == (2, 8, 48)
        assert found.sizes.sum(1).tolist() == [8 if method == "random_drop" else 16] * 2
        assert found.pooled.isfinite().all()


@pytest.mark.parametrize("towers", ["DINOv2 with registers"], indirect=True)
def test_prefix_tokens_and_the_sum_of_all_patches_stay(towers: Towers) -> None:
    tower, _ = towers
    x = torch.randn(3, 5 + 16, 48, dtype=torch.float64)
    for method in METHODS:
        plan = plan_of(tower, 0.6, method=method, at=(2, 3))
        patches = patches_of(tower.grid, tower.patch_size, 5, has_class_token=True)
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
    found = tower(images, plan)
    assert found.tokens.shape[1] == plan.tokens[-1]
    assert found.sizes.sum(1).tolist() == [plan.tokens[-1] if method == "random_drop" else h * w] * 2


def test_a_pool_that_cannot_weigh_tokens_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    prr = {**TINY, "global_pool": "prr"}
    monkeypatch.setattr(vision.timm, "create_model", lambda name, **s: create(name, **(prr | s)))
    changes = {"data": {"image_size": 64}, "model": {"vision": {"timm": "vit_tiny_patch16_224"}}}
    model = small_model(small_recipe(mlip=False, **changes), dtype=torch.float32)
    assert model.encode_image(torch.randn(1, 3, 64, 64), model.plan).isfinite().all()
    for method in ("guided", "tome"):
        with pytest.raises(UsageError) as caught:
            model.merge_plan(0.5, method)
        assert str(caught.value) == ("model.merging: towers that pool by 'prr' cannot merge; set model.merging to null")


@pytest.mark.slow
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
    with pytest.raises(UsageError, match=rf"^model\.vision\.timm: {name} is a {kind}; use a VisionTransformer or "):
        ImageTower(Vision(timm=name), image_size=224)
