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


@pytest.mark.parametrize(
    "name",
    [
        "module.{}",
        "_orig_mod.{}",
        "model.{}",
        "model._orig_mod.module.{}",
        "module._orig_mod.{}",
        "_orig_mod.module.model.{}",
        "_fsdp_wrapped_module.{}",
    ],
)
def test_what_wrappers_add_to_names_is_taken_off(name: str) -> None:
    weights = randomised(open_clip.CLIP(**config())).state_dict()
    plain = from_open_clip(weights, source="a")
    found = from_open_clip({name.format(own): tensor for own, tensor in weights.items()}, source="a")
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[own], plain[own]) for own in plain)


def test_wrappers_in_the_middle_of_names_are_taken_off() -> None:
    weights = randomised(open_clip.CLIP(**config())).state_dict()
    found = from_open_clip(
        {own.replace("visual.", "visual._orig_mod.").replace("mlp.", "mlp._checkpoint_wrapped_module."): tensor
         for own, tensor in weights.items()} | {"n_averaged": torch.tensor(3)},
        source="a",
    )  # fmt: skip
    assert found.keys() == from_open_clip(weights, source="a").keys()


def test_two_models_in_one_file_are_not_mixed() -> None:
    weights = randomised(open_clip.CLIP(**config())).state_dict()
    both = weights | {f"module.{own}": tensor for own, tensor in weights.items()}
    with pytest.raises(UsageError, match=r"^a: two tensors are named .* but for wrappers, one of them module\."):
        from_open_clip(both, source="a")


def by_transformers_names(model: open_clip.CLIP) -> dict[str, torch.Tensor]:
    """The weights of a CLIP as transformers' CLIPModel keeps them."""
    weights = {
        "logit_scale": model.logit_scale,
        "visual_projection.weight": model.visual.proj.T,
        "text_projection.weight": model.text_projection.T,
        "text_model.embeddings.position_ids": torch.arange(16)[None],
        "text_model.embeddings.token_embedding.weight": model.token_embedding.weight,
        "text_model.embeddings.position_embedding.weight": model.positional_embedding,
        "vision_model.embeddings.class_embedding": model.visual.class_embedding,
        "vision_model.embeddings.patch_embedding.weight": model.visual.conv1.weight,
        "vision_model.embeddings.position_embedding.weight": model.visual.positional_embedding,
    }
    norms = {
        "vision_model.pre_layrnorm": model.visual.ln_pre,
        "vision_model.post_layernorm": model.visual.ln_post,
        "text_model.final_layer_norm": model.ln_final,
    }
    for tower, blocks in (
        ("vision_model", model.visual.transformer.resblocks),
        ("text_model", model.transformer.resblocks),
    ):
        for number, block in enumerate(blocks):
            place = f"{tower}.encoder.layers.{number}"
            for third, name in enumerate(("q_proj", "k_proj", "v_proj")):
                width = block.attn.embed_dim
                rows = slice(third * width, (third + 1) * width)
                weights[f"{place}.self_attn.{name}.weight"] = block.attn.in_proj_weight[rows]
                weights[f"{place}.self_attn.{name}.bias"] = block.attn.in_proj_bias[rows]
            norms[f"{place}.layer_norm1"], norms[f"{place}.layer_norm2"] = block.ln_1, block.ln_2
            norms[f"{place}.self_attn.out_proj"] = block.attn.out_proj
            norms[f"{place}.mlp.fc1"], norms[f"{place}.mlp.fc2"] = block.mlp.c_fc, block.mlp.c_proj
    for place, module in norms.items():
        weights |= {f"{place}.weight": module.weight, f"{place}.bias": module.bias}
    return {name: tensor.detach() for name, tensor in weights.items()}


def test_transformers_names_give_the_same_weights() -> None:
    foreign = randomised(open_clip.CLIP(**config()))
    plain = from_open_clip(foreign.state_dict(), source="a")
    theirs = by_transformers_names(foreign)
    for weights in (theirs, {f"module.{name}": tensor.half() for name, tensor in theirs.items()}):
        found = from_open_clip(weights, source="a")
        assert found.keys() == plain.keys()
        for name, tensor in plain.items():
            assert torch.equal(found[name], tensor.to(found[name].dtype)), name


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("q_proj.bias", None), ("k_proj.bias", torch.zeros(3)), ("v_proj.bias", torch.tensor(1.0))],
)
def test_query_key_and_value_that_do_not_fit_together_are_named(name: str, tensor: torch.Tensor | None) -> None:
    weights = by_transformers_names(open_clip.CLIP(**config()))
    place = f"text_model.encoder.layers.1.self_attn.{name}"
    weights.pop(place)
    if tensor is not None:
        weights[place] = tensor
    message = (
        r"^a: transformer\.resblocks\.1\.attn\.in_proj_bias: query, key and value are not three tensors of one shape"
    )
    with pytest.raises(UsageError, match=message):
        from_open_clip(weights, source="a")


def test_foreign_parts_are_refused_by_name() -> None:
    resnet = {"visual.layer1.0.conv1.weight": torch.zeros(1), "visual.attnpool.c_proj.weight": torch.zeros(1)}
    with pytest.raises(
        UsageError, match=r"^a: visual.layer1.0.conv1.weight, visual.attnpool.c_proj.weight: no such part here; "
    ):
        from_open_clip(resnet, source="a")


def published(name: str) -> CLIP:
    """The model, without numbers, of the recipe that mlip names for an architecture."""
    configuration = open_clip_configuration(name)
    tree = yaml.safe_load(as_yaml(model_section(configuration, source=name), with_frequency=False))
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
    line = as_yaml(model_section(configuration, source=name), with_frequency=False)
    assert f"vision: {{timm: {tower}, pool: null}}" in line
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
