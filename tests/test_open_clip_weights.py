"""Weights by OpenCLIP's names: equal features, there and back, and the architectures that have them."""

import json
from collections.abc import Iterator
from typing import Any

import open_clip
import pytest
import torch
from models_for_tests import small_model, small_recipe
from open_clip_for_tests import (
    OURS_BY_SIZES,
    TINY,
    TINY_QUICK,
    assert_same_features,
    config,
    randomised,
    recipe_for,
    tiny_towers,
)
from torch import Tensor

from mlip_cli.errors import UsageError
from mlip_cli.model import open_clip as architecture
from mlip_cli.model.clip import CLIP, build_model
from mlip_cli.model.open_clip import from_open_clip, to_open_clip, without_counterpart
from mlip_cli.recipe.config import Recipe
from mlip_cli.runs.initial_weights import open_clip_configuration


@pytest.fixture(autouse=True, scope="module")
def _towers() -> Iterator[None]:
    with tiny_towers():
        yield


def loaded(recipe: Recipe, weights: dict[str, Tensor]) -> CLIP:
    model = small_model(recipe, dtype=torch.float32).eval()
    own = model.state_dict()
    zeros = {name: torch.zeros_like(own[name]) for name in own if name.endswith("patch_embed.proj.bias")}
    model.load_state_dict(zeros | weights)
    return model


@pytest.mark.parametrize(
    ("vision", "theirs", "quick_gelu"),
    [
        ({"timm": TINY}, {}, False),
        ({"timm": TINY_QUICK}, {}, True),
        (OURS_BY_SIZES, {"no_ln_pre": True, "norm_kwargs": {"eps": 1e-6}}, False),
    ],
)
def test_features_equal_open_clips_and_the_way_back_gives_every_tensor(
    vision: dict[str, Any], theirs: dict[str, Any], quick_gelu: bool
) -> None:
    foreign = randomised(open_clip.CLIP(**config(quick_gelu=quick_gelu, vision=theirs)))
    recipe = recipe_for(vision, activation="quick_gelu" if quick_gelu else "gelu")
    weights = foreign.state_dict()
    model = loaded(recipe, from_open_clip(weights))
    assert_same_features(model, foreign)
    back = to_open_clip(model.state_dict())
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) and back[name].is_contiguous() for name in weights)
    assert architecture.of_model(model) == architecture.of_open_clip(config(quick_gelu=quick_gelu, vision=theirs))


def test_our_own_patch_bias_goes_into_the_positions() -> None:
    model = randomised(small_model(small_recipe(mlip=False), dtype=torch.float32))
    foreign = open_clip.CLIP(**config(vision={"no_ln_pre": True, "norm_kwargs": {"eps": 1e-6}}))
    foreign.load_state_dict(to_open_clip(model.state_dict()))
    assert_same_features(model, foreign.eval())


def test_the_way_back_from_mlip_drops_what_only_mlip_has() -> None:
    model = small_model(dtype=torch.float32)
    back = to_open_clip(model.state_dict())
    assert {name.split(".")[0] for name in without_counterpart(model.state_dict())} == {
        "frequency",
        "frequency_projection",
        "token_projections",
        "log_scales",
    }
    foreign = open_clip.CLIP(**config(vision={"no_ln_pre": True, "norm_kwargs": {"eps": 1e-6}}))
    foreign.load_state_dict(back)  # strict: it has all that OpenCLIP's model has
    assert back["logit_scale"] == model.log_scales["spatial_global"][0]
    carried = len(model.state_dict()) - len(without_counterpart(model.state_dict()))
    assert len(back) == carried - 1  # the patch bias is in the positions


def test_sigmoid_models_bring_their_bias() -> None:
    foreign = randomised(open_clip.CLIP(**config(init_logit_bias=-10)))
    ours = from_open_clip(foreign.state_dict())
    assert ours["logit_biases.spatial_global"].shape == (1,)
    back = to_open_clip(ours)
    assert back.keys() == foreign.state_dict().keys()
    assert torch.equal(back["logit_bias"], foreign.logit_bias)


def test_other_spellings_of_the_names_are_read() -> None:
    foreign = randomised(open_clip.CLIP(**config()))
    plain = from_open_clip(foreign.state_dict())
    custom = open_clip.CustomTextCLIP(**config())
    custom.load_state_dict(open_clip.model.convert_to_custom_text_state_dict(foreign.state_dict()))
    of_jit = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(16), "vocab_size": torch.tensor(9)}
    for weights in (
        custom.state_dict(),
        {f"module.{name}": tensor for name, tensor in foreign.state_dict().items()},
        foreign.state_dict() | of_jit,
    ):
        found = from_open_clip(weights)
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_foreign_parts_are_refused_by_name() -> None:
    resnet = {"visual.layer1.0.conv1.weight": torch.zeros(1), "visual.attnpool.c_proj.weight": torch.zeros(1)}
    with pytest.raises(UsageError, match=r"^visual.layer1.0.conv1.weight, visual.attnpool.c_proj.weight: no cou"):
        from_open_clip(resnet)
    with pytest.raises(UsageError, match=r"^vision.trunk.reg_token: no counterpart in OpenCLIP's ViT"):
        to_open_clip({"vision.trunk.reg_token": torch.zeros(1)})
    stem = small_recipe(model={"frequency": {"placement": "stem", "width": 32, "depth": 1}, "merging": None})
    with pytest.raises(UsageError, match=r"^vision.trunk.blocks.0.filter.kernel: no counterpart in OpenCLIP's ViT"):
        architecture.of_model(small_model(stem))


def published(name: str, tower: str) -> tuple[CLIP, open_clip.CLIP]:
    """The model of the recipe that is named for an architecture, and OpenCLIP's, both without numbers."""
    described = open_clip_configuration(name)
    wanted = architecture.of_open_clip(described)
    text = {key: getattr(wanted.text, key) for key in ("width", "depth", "num_heads", "activation")}
    model = {"embed_dim": wanted.embed_dim, "vision": {"timm": tower}, "text": text | {"context_length": 77}}
    train = {"steps": 1, "global_batch_size": 2}
    recipe = Recipe.model_validate_json(
        json.dumps({"data": {"train": "x", "image_size": wanted.image_size}, "model": model, "train": train})
    )
    assert f"vision: {{timm: {tower}}}" in str(architecture.fitting_recipe(wanted))
    with torch.device("meta"):
        ours, foreign = build_model(recipe).eval(), open_clip.CLIP(**described)
    assert architecture.of_model(ours) == wanted
    return ours, foreign


def test_another_resolution_fits_the_recipe_that_is_named() -> None:
    ours, foreign = published("ViT-L-14-336-quickgelu", "vit_large_patch14_clip_quickgelu_336")
    mine, other = ours.state_dict(), from_open_clip(foreign.state_dict())
    assert {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in other.items()}


@pytest.mark.parametrize(
    ("name", "tower"),
    [
        ("ViT-B-32-quickgelu", "vit_base_patch32_clip_quickgelu_224"),
        ("ViT-B-16", "vit_base_patch16_clip_224"),
        ("ViT-L-14-quickgelu", "vit_large_patch14_clip_quickgelu_224"),
    ],
)
def test_published_architectures_give_the_same_features_and_get_every_tensor_back(name: str, tower: str) -> None:
    ours, foreign = published(name, tower)
    foreign = randomised(foreign.to_empty(device="cpu"))
    foreign.attn_mask = torch.full((77, 77), -torch.inf).triu(1)  # a buffer that no state dict holds
    weights = foreign.state_dict()
    ours.load_state_dict(from_open_clip(weights), assign=True)
    assert_same_features(ours, foreign, image_size=224, length=77, n=2)
    back = to_open_clip(ours.state_dict())
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_cfg": {"layers": [3, 4, 6, 3]}}, "vision_cfg.layers [3, 4, 6, 3]"),
        ({"vision_cfg": {"timm_model_name": "vit_base_patch16_siglip_256"}}, "vision_cfg.timm_model_name vit_base"),
        ({"vision_cfg": {"pool_type": "avg"}}, "vision_cfg.pool_type avg"),
        ({"vision_cfg": {"ls_init_value": 1e-4}}, "vision_cfg.ls_init_value 0.0001"),
        (
            {"vision_cfg": {"norm_kwargs": {"eps": 1e-6, "bias": False}}},
            "vision_cfg.norm_kwargs.bias False: no such part here",
        ),
        (
            {"text_cfg": {"norm_kwargs": {"elementwise_affine": False}}},
            "text_cfg.norm_kwargs.elementwise_affine False: ",
        ),
        ({"text_cfg": {"no_causal_mask": True, "vocab_size": 32000}}, "text_cfg.no_causal_mask True, text_cfg.vocab_s"),
        ({"multimodal_cfg": {"width": 512}}, "multimodal_cfg: no such part here"),
    ],
)
def test_configurations_with_parts_that_are_not_ours_are_refused(change: dict[str, Any], words: str) -> None:
    changed = config()
    for key, value in change.items():
        changed[key] = changed.get(key, {}) | value
    with pytest.raises(UsageError) as refused:
        architecture.of_open_clip(changed)
    assert str(refused.value).startswith(words)


@pytest.mark.parametrize(("name", "mlp_width"), [("ViT-g-14", 6144), ("ViT-bigG-14", 8192), ("ViT-e-14", 15360)])
def test_mlps_of_odd_widths_keep_them(name: str, mlp_width: int) -> None:
    assert architecture.of_open_clip(open_clip_configuration(name)).image.mlp_width == mlp_width
