"""Weights by OpenCLIP's names: equal features, and the architectures that have such weights."""

import re
from collections.abc import Iterator
from typing import Any

import open_clip
import pytest
import timm
import torch
import yaml
from models_for_tests import small_model
from open_clip_for_tests import (
    TINY,
    TINY_QUICK,
    assert_same_features,
    config,
    randomised,
    recipe_for,
    tiny_towers,
)
from torch import nn

from mlip_cli.errors import UsageError
from mlip_cli.model.clip import CLIP, build_model
from mlip_cli.model.open_clip import TIMM_TOWERS, as_yaml, from_open_clip, model_section
from mlip_cli.recipe.config import Recipe
from mlip_cli.runs.initial_weights import open_clip_configuration


@pytest.fixture(autouse=True, scope="module")
def _towers() -> Iterator[None]:
    with tiny_towers():
        yield


@pytest.mark.parametrize(("tower", "activation"), [(TINY, "gelu"), (TINY_QUICK, "quick_gelu")])
def test_features_equal_open_clips(tower: str, activation: str) -> None:
    foreign = randomised(open_clip.CLIP(**config(quick_gelu=activation == "quick_gelu")))
    model = small_model(recipe_for({"timm": tower}, activation=activation), dtype=torch.float32).eval()
    model.load_state_dict(from_open_clip(foreign.state_dict(), source="a"))
    assert_same_features(model, foreign)


def test_sigmoid_models_bring_their_bias() -> None:
    foreign = randomised(open_clip.CLIP(**config(init_logit_bias=-10)))
    ours = from_open_clip(foreign.state_dict(), source="a")
    assert ours["logit_biases.spatial_global"].shape == (1,)
    assert torch.equal(ours["logit_biases.spatial_global"][0], foreign.logit_bias)


def test_other_spellings_of_the_names_are_read() -> None:
    foreign = randomised(open_clip.CLIP(**config()))
    plain = from_open_clip(foreign.state_dict(), source="a")
    custom = open_clip.CustomTextCLIP(**config())
    custom.load_state_dict(open_clip.model.convert_to_custom_text_state_dict(foreign.state_dict()))
    of_jit = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(16), "vocab_size": torch.tensor(9)}
    for weights in (
        custom.state_dict(),
        {f"module.{name}": tensor for name, tensor in foreign.state_dict().items()},
        foreign.state_dict() | of_jit,
    ):
        found = from_open_clip(weights, source="a")
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_foreign_parts_are_refused_by_name() -> None:
    resnet = {"visual.layer1.0.conv1.weight": torch.zeros(1), "visual.attnpool.c_proj.weight": torch.zeros(1)}
    with pytest.raises(
        UsageError, match=r"^a: visual.layer1.0.conv1.weight, visual.attnpool.c_proj.weight: no such part here; "
    ):
        from_open_clip(resnet, source="a")


def published(name: str) -> CLIP:
    """The model, without numbers, of the recipe that mlip names for an architecture."""
    configuration = open_clip_configuration(name)
    tree = yaml.safe_load(as_yaml(model_section(configuration, source=name)))
    tree |= {"data": {"train": "x"}, "train": {"steps": 1, "global_batch_size": 2}}
    tree["data"]["image_size"] = configuration["vision_cfg"]["image_size"]
    with torch.device("meta"):
        return build_model(Recipe.model_validate(tree, strict=False)).eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tower"),
    [
        ("ViT-B-32", "vit_base_patch32_clip_224"),
        ("ViT-L-14-336-quickgelu", "vit_large_patch14_clip_quickgelu_224"),
        ("ViT-bigG-14", "vit_gigantic_patch14_clip_224"),
    ],
)
def test_mlip_names_a_recipe_of_the_same_shapes_for_published_architectures(name: str, tower: str) -> None:
    configuration = open_clip_configuration(name)
    assert f"vision: {{timm: {tower}}}" in as_yaml(model_section(configuration, source=name))
    with torch.device("meta"):
        foreign = open_clip.CLIP(**configuration)
    mine, other = published(name).state_dict(), from_open_clip(foreign.state_dict(), source=name)
    assert {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in other.items()}


@pytest.mark.slow
def test_towers_of_timm_have_the_numbers_of_the_table() -> None:
    """And no tower of timm for CLIP is missing from it."""
    known = {name.rpartition("_")[0] for name in TIMM_TOWERS.values()}
    names = [name for name in timm.list_models("vit_*_clip_*") if name not in (TINY, TINY_QUICK)]
    assert {re.sub("_quickgelu|_[0-9]+$", "", name) for name in names} == known
    for numbers, name in TIMM_TOWERS.items():
        with torch.device("meta"):
            trunk = timm.create_model(name, num_classes=0)
        attention, mlp, patch_size = trunk.blocks[0].attn, trunk.blocks[0].mlp, trunk.patch_embed.patch_size[0]
        assert numbers == (
            patch_size, trunk.embed_dim, len(trunk.blocks), attention.num_heads, mlp.fc1.out_features
        )  # fmt: skip
        assert isinstance(trunk.norm_pre, nn.LayerNorm)
        assert (trunk.norm.eps, trunk.global_pool) == (1e-5, "token")
        assert isinstance(mlp.act, nn.GELU)


@pytest.mark.slow
def test_a_published_architecture_gives_the_same_features() -> None:
    """With the first two blocks of both towers, since all blocks are alike."""
    configuration = open_clip_configuration("ViT-B-32-quickgelu")
    for section in ("vision_cfg", "text_cfg"):
        configuration[section]["layers"] = 2
    foreign = randomised(open_clip.CLIP(**configuration))
    ours = published("ViT-B-32-quickgelu")
    ours.vision.trunk.blocks, ours.text.blocks = ours.vision.trunk.blocks[:2], ours.text.blocks[:2]
    ours.load_state_dict(from_open_clip(foreign.state_dict(), source="a"), assign=True)
    assert_same_features(ours, foreign, image_size=224, length=77, n=2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_cfg": {"layers": [3, 4, 6, 3]}}, "vision_cfg.layers [3, 4, 6, 3]"),
        ({"vision_cfg": {"timm_model_name": "vit_base_patch16_siglip_256"}}, "vision_cfg.timm_model_name vit_base"),
        ({"vision_cfg": {"pool_type": "avg"}}, "vision_cfg.pool_type avg"),
        ({"vision_cfg": {"ls_init_value": 1e-4}}, "vision_cfg.ls_init_value 0.0001"),
        ({"text_cfg": {"norm_kwargs": {"eps": 1e-6}}}, "text_cfg.norm_kwargs {'eps': 1e-06}: no such part here"),
        (
            {"text_cfg": {"no_causal_mask": True, "vocab_size": 32000}},
            "text_cfg.no_causal_mask True, text_cfg.voc",
        ),
        ({"multimodal_cfg": {"width": 512}}, "multimodal_cfg {'width': 512}: no such part here"),
    ],
)
def test_configurations_with_parts_that_are_not_ours_are_refused(change: dict[str, Any], words: str) -> None:
    changed = config()
    for key, value in change.items():
        changed[key] = changed.get(key, {}) | value
    with pytest.raises(UsageError) as refused:
        model_section(changed, source="tiny")
    assert str(refused.value).startswith(f"tiny: {words}")


def test_a_form_that_no_known_tower_has_is_refused() -> None:
    for name, configuration in (("ViT-e-14", open_clip_configuration("ViT-e-14")), ("tiny", config())):
        with pytest.raises(UsageError, match=rf"^{name}: mlip knows no tower of timm with this form; use another arch"):
            model_section(configuration, source=name)
