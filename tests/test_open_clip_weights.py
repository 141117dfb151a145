"""Weights by OpenCLIP's names: equal features, and the architectures that have such weights."""

import re

import open_clip
import pytest
import timm
import torch
from models_for_tests import small_model
from open_clip_for_tests import assert_same_features, config, randomised, recipe_for
from torch import nn

from mlip_cli.data.packages import package_folder
from mlip_cli.errors import UsageError
from mlip_cli.model.clip import CLIP, build_model
from mlip_cli.model.open_clip import as_built, from_open_clip
from mlip_cli.recipe.architecture import TIMM_TOWERS, WITH_QUICKGELU, of_open_clip
from mlip_cli.recipe.config import Recipe, Train
from mlip_cli.runs.foreign import open_clip_configuration


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_features_equal_open_clips(activation: str) -> None:
    foreign = randomised(open_clip.CLIP(**config(quick_gelu=activation == "quick_gelu")))
    model = small_model(recipe_for(activation=activation), dtype=torch.float32).eval()
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
    """The model, without numbers, of an architecture."""
    described = of_open_clip(open_clip_configuration(name), source=name)
    recipe = Recipe(data=described.data, model=described.model, train=Train(global_batch_size=2))
    with torch.device("meta"):
        return build_model(recipe).eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tower"),
    [
        ("ViT-B-32", "vit_base_patch32_clip_224"),
        ("ViT-L-14-336-quickgelu", "vit_large_patch14_clip_quickgelu_224"),
        ("ViT-bigG-14", "vit_gigantic_patch14_clip_224"),
        ("ViT-e-14", None),
        ("ViT-L-14-CLIPA-336", None),
        ("ViT-SO400M-16-SigLIP2-256", "vit_so400m_patch16_siglip_256"),
        ("ViT-M-16-alt", None),
    ],
)
def test_published_architectures_have_the_same_shapes(name: str, tower: str | None) -> None:
    configuration = open_clip_configuration(name)
    described = of_open_clip(configuration, source=name)
    assert described.model.vision.timm == tower
    with torch.device("meta"):
        custom = configuration.pop("custom_text", False)
        foreign = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**configuration)
    mine, other = published(name), from_open_clip(foreign.state_dict(), source=name)
    other = as_built(other, mine.state_dict())
    own = {n: t.shape for n, t in mine.state_dict().items() if not n.startswith("log")}
    assert own == {n: t.shape for n, t in other.items() if not n.startswith("log")}


def test_all_other_architectures_are_refused_by_name_and_reason() -> None:
    """Those with a ResNet, a text tower of transformers, or a decoder. Building refuses timm's other kinds."""
    names = [path.stem for path in (package_folder("open_clip") / "model_configs").glob("*.json")]
    refused = {}
    for name in names:
        try:
            of_open_clip(open_clip_configuration(name), source=name)
        except UsageError as error:
            refused[name] = str(error)
    assert len(names) - len(refused) >= 100
    assert all(re.match("RN|coca|nllb|mt5|roberta|xlm|convnext_large_d", name) for name in refused)
    assert all(why.startswith(f"{name}: ") and "no such part here" in why for name, why in refused.items())


@pytest.mark.slow
def test_towers_of_timm_have_the_numbers_of_the_table() -> None:
    """And no tower of timm for CLIP is missing from it."""
    known = {name.rpartition("_")[0] for name in TIMM_TOWERS.values()}
    names = timm.list_models("vit_*_clip_*")
    assert {re.sub("_quickgelu|_[0-9]+$", "", name) for name in names} == known
    quick = {own for own in known if any(part in own for part in WITH_QUICKGELU)}
    assert {re.sub("_quickgelu|_[0-9]+$", "", name) for name in names if "_quickgelu" in name} == quick
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
