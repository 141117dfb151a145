"""Weights by OpenCLIP's names: equal features, there and back, and what of them a recipe can start from."""

import argparse
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from models_for_tests import make_run, small_model, small_recipe
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mlip_cli.commands import initial_weights
from mlip_cli.commands.initial_weights import check_initial, load_initial, open_clip_configuration
from mlip_cli.commands.weight_files import read_weights
from mlip_cli.config import Recipe
from mlip_cli.errors import UsageError
from mlip_cli.model import architecture
from mlip_cli.model.clip import CLIP, build_model
from mlip_cli.model.open_clip_weights import from_open_clip, to_open_clip, without_counterpart

TINY = "vit_tiny_patch8_clip_for_tests"
TINY_QUICK = "vit_tiny_patch8_clip_quickgelu_for_tests"
OURS_BY_SIZES = {"patch_size": 8, "width": 32, "depth": 4, "num_heads": 2}
TEXTS = ["a dog", "!!! wow !", "a red balloon with quite a long string over the roofs", "x"]


@pytest.fixture(autouse=True, scope="module")
def tiny_towers() -> Iterator[None]:
    """Towers of timm with the form of OpenAI's, but small: `TINY` with GELU, `TINY_QUICK` with QuickGELU."""

    def tower(**changes: Any) -> Any:
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "pre_norm": True}
        norm = {"norm_layer": lambda width, **kinds: nn.LayerNorm(width, eps=1e-5, **kinds)}

        def build(**given: Any) -> VisionTransformer:
            ours = {key: value for key, value in given.items() if not key.startswith(("pretrained", "cache"))}
            return VisionTransformer(**sizes | norm | changes | ours)

        return build

    registry = timm.models._registry._model_entrypoints
    registry[TINY], registry[TINY_QUICK] = tower(), tower(act_layer="quick_gelu")
    yield
    del registry[TINY], registry[TINY_QUICK]


def config(*, quick_gelu: bool = False, vision: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    """OpenCLIP's configuration of a tiny CLIP with a class token, 4 x 4 patches and 16 text tokens."""
    sizes = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 4, "head_width": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    return {"embed_dim": 16, "quick_gelu": quick_gelu, "vision_cfg": sizes | (vision or {}), "text_cfg": text, **top}


def randomised(model: nn.Module, seed: int = 0) -> Any:
    """The model with every parameter random, biases and LayerNorms included, so that no exchange goes unseen."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        size = 0.5 if parameter.ndim < 2 else 1.5 * parameter.shape[-1] ** -0.5
        parameter.data = size * noise + (1 if "ln_" in name and name.endswith("weight") else 0)
    return model.eval()


def recipe_for(vision: dict[str, Any], *, activation: str = "gelu", **changes: Any) -> Recipe:
    recipe = small_recipe(mlip=False, **changes)
    text = recipe.model.text.model_copy(update={"activation": activation})
    section = recipe.model.model_copy(update={"vision": recipe.model.vision.model_validate(vision), "text": text})
    return recipe.model_copy(update={"model": section})


def with_init(recipe: Recipe, init: str | Path) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"init": str(init)})})


def loaded(recipe: Recipe, weights: dict[str, Tensor]) -> CLIP:
    model = small_model(recipe, dtype=torch.float32).eval()
    own = model.state_dict()
    zeros = {name: torch.zeros_like(own[name]) for name in own if name.endswith("patch_embed.proj.bias")}
    model.load_state_dict(zeros | weights)
    return model


def token_ids(length: int) -> Tensor:
    return open_clip.get_tokenizer("ViT-B-32", context_length=length)(TEXTS)


def assert_same_features(ours: Any, theirs: Any, *, image_size: int = 32, length: int = 16) -> None:
    """Equal within 1e-5 of normalised features, and not because all pictures or texts give the same."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, image_size, image_size, generator=generator)
    ids = token_ids(length)
    with torch.no_grad():
        for mine, other in (
            (ours.encode_image(images), theirs.encode_image(images)),
            (ours.encode_text(ids), theirs.encode_text(ids)),
            (ours.encode_text(ids[:, : length - 2]), theirs.encode_text(ids)),
        ):
            mine, other = nn.functional.normalize(mine, dim=-1), nn.functional.normalize(other, dim=-1)
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
            assert (other[0] - other[1:]).norm(dim=-1).min() > 0.01


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
    described = architecture.of_model(model)
    assert described == architecture.of_open_clip(config(quick_gelu=quick_gelu, vision=theirs))
    again = open_clip.CLIP(**architecture.open_clip_config(described))
    again.load_state_dict(back)
    assert_same_features(model, again.eval())


def test_our_own_patch_bias_goes_into_the_positions() -> None:
    model = randomised(small_model(small_recipe(mlip=False), dtype=torch.float32))
    foreign = open_clip.CLIP(**architecture.open_clip_config(architecture.of_model(model)))
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
    described = architecture.open_clip_config(architecture.of_open_clip(config()), logit_bias=-10.0)
    open_clip.CLIP(**described).load_state_dict(back)


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
    with pytest.raises(
        UsageError, match=r"^visual.layer1.0.conv1.weight, visual.attnpool.c_proj.weight: no cou"
    ):
        from_open_clip(resnet)
    with pytest.raises(UsageError, match=r"^vision.trunk.reg_token: no counterpart in OpenCLIP's ViT"):
        to_open_clip({"vision.trunk.reg_token": torch.zeros(1)})


@pytest.mark.parametrize(
    ("name", "tower"),
    [
        ("ViT-B-32-quickgelu", "vit_base_patch32_clip_quickgelu_224"),
        ("ViT-B-16", "vit_base_patch16_clip_224"),
        ("ViT-L-14-336-quickgelu", "vit_large_patch14_clip_quickgelu_336"),
    ],
)
def test_published_architectures_fit_the_recipe_that_is_named(name: str, tower: str) -> None:
    described = open_clip_configuration(name)
    wanted = architecture.of_open_clip(described)
    text = {key: getattr(wanted.text, key) for key in ("width", "depth", "num_heads", "activation")}
    model = {"embed_dim": wanted.embed_dim, "vision": {"timm": tower}, "text": text | {"context_length": 77}}
    recipe = Recipe.model_validate_json(
        json.dumps({"data": {"train": "x", "image_size": wanted.image_size}, "model": model, "train": BRIEF})
    )
    assert f"vision: {{timm: {tower}}}" in str(architecture.fitting_recipe(wanted))
    with torch.device("meta"):
        ours, theirs = build_model(recipe), open_clip.CLIP(**described)
    assert architecture.of_model(ours) == wanted
    mine, other = ours.state_dict(), from_open_clip(theirs.state_dict())
    assert {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in other.items()}


BRIEF = {"steps": 1, "global_batch_size": 2}


def test_a_published_architecture_gives_the_same_features() -> None:
    described = open_clip_configuration("ViT-B-32-quickgelu")
    with torch.device("meta"):
        foreign = open_clip.CLIP(**described)
    foreign = randomised(foreign.to_empty(device="cpu"))
    foreign.attn_mask = torch.full((77, 77), -torch.inf).triu(1)  # a buffer that no state dict holds
    text = {"width": 512, "depth": 12, "num_heads": 8, "activation": "quick_gelu"}
    model = {"embed_dim": 512, "vision": {"timm": "vit_base_patch32_clip_quickgelu_224"}, "text": text}
    recipe = Recipe.model_validate_json(json.dumps({"data": {"train": "x"}, "model": model, "train": BRIEF}))
    with torch.device("meta"):
        ours = build_model(recipe).eval()
    ours.load_state_dict(from_open_clip(foreign.state_dict()), assign=True)
    assert_same_features(ours, foreign, image_size=224, length=77)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_cfg": {"layers": [3, 4, 6, 3]}}, "vision_cfg.layers [3, 4, 6, 3]"),
        ({"vision_cfg": {"timm_model_name": "vit_base_patch16_siglip_256"}}, "vision_cfg.timm_model_name vit_base"),
        ({"vision_cfg": {"pool_type": "avg"}}, "vision_cfg.pool_type avg"),
        ({"vision_cfg": {"ls_init_value": 1e-4}}, "vision_cfg.ls_init_value 0.0001"),
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


@pytest.fixture
def tiny_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """`model.init` of a tiny CLIP with QuickGELU, of an architecture that only this test knows."""
    known = {"tiny": config(quick_gelu=True), "tiny-gelu": config()}
    monkeypatch.setattr(initial_weights, "open_clip_configuration", lambda name: known[name])
    save_file(randomised(open_clip.CLIP(**known["tiny"])).state_dict(), tmp_path / "tiny.safetensors")
    return f"open_clip:tiny:{tmp_path / 'tiny.safetensors'}"


def test_a_run_starts_from_a_foreign_file(tiny_file: str) -> None:
    recipe = with_init(recipe_for({"timm": TINY_QUICK}, activation="quick_gelu"), tiny_file)
    model = small_model(recipe, dtype=torch.float32).eval()
    notes = load_initial(model, recipe)
    assert notes.facts == (f"model.init: weights of {tiny_file}",)
    assert notes.cautions == ()
    assert_same_features(model, randomised(open_clip.CLIP(**config(quick_gelu=True))))
    assert model.log_scales["spatial_global"] == randomised(open_clip.CLIP(**config(quick_gelu=True))).logit_scale


def test_a_foreign_file_starts_mlip_with_the_rest_at_random(tiny_file: str) -> None:
    plain = recipe_for({"timm": TINY_QUICK}, activation="quick_gelu")
    mlip = small_recipe()
    section = plain.model.model_copy(update={"frequency": mlip.model.frequency, "merging": mlip.model.merging})
    recipe = with_init(mlip.model_copy(update={"model": section}), tiny_file)
    model, untouched = (small_model(recipe, dtype=torch.float32) for _ in range(2))
    notes = load_initial(model, recipe)
    assert notes.facts[1] == (
        "model.init: not in it, so as in a run without: frequency, frequency_projection, token_projections.spatial, "
        "token_projections.frequency, token_projections.text, log_scales.spatial_token, log_scales.frequency_global, "
        "log_scales.frequency_token"
    )
    own, fresh = model.state_dict(), untouched.state_dict()
    unchanged = {name for name in own if torch.equal(own[name], fresh[name])}
    assert unchanged == set(without_counterpart(own))


def test_scale_and_bias_of_another_kind_of_loss_are_not_taken(tiny_file: str) -> None:
    recipe = recipe_for({"timm": TINY_QUICK}, activation="quick_gelu", losses={"spatial_global": {"kind": "sigmoid"}})
    model = small_model(recipe, dtype=torch.float32)
    scale = model.log_scales["spatial_global"].clone()
    notes = load_initial(model, with_init(recipe, tiny_file))
    assert notes.facts[1].endswith(": log_scales.spatial_global, logit_biases.spatial_global")
    assert torch.equal(model.log_scales["spatial_global"], scale)


def test_what_differs_is_named_with_the_recipe_that_fits(tiny_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = with_init(recipe_for({"timm": TINY}, model={"embed_dim": 24}), tiny_file)
    monkeypatch.setattr(timm, "list_models", lambda pattern: [TINY, TINY_QUICK])
    with pytest.raises(UsageError) as refused:
        check_initial(small_model(recipe), recipe)
    assert str(refused.value) == (
        "model.init: open_clip:tiny does not fit the recipe: model.embed_dim 24 (there 16); model.vision's "
        "activation gelu (there quick_gelu); model.text.activation gelu (there quick_gelu); a recipe that fits has\n"
        "data: {image_size: 32}\n"
        "model:\n"
        "  embed_dim: 16\n"
        f"  vision: {{timm: {TINY_QUICK}}}\n"
        "  text: {width: 32, depth: 2, num_heads: 2, context_length: 16, activation: quick_gelu}"
    )
    with pytest.raises(UsageError, match=r"model.vision's norm before its blocks False \(there True\)"):
        check_initial(small_model(small_recipe()), recipe)


def test_a_tower_with_other_parts_is_no_start(tiny_file: str) -> None:
    stem = {"frequency": {"placement": "stem", "width": 32, "depth": 2}, "merging": None}
    recipe = with_init(small_recipe(model=stem), tiny_file)
    with pytest.raises(
        UsageError, match=r"does not fit the recipe: vision.trunk.blocks.0.filter.kernel, .*: no"
    ):
        check_initial(small_model(recipe), recipe)


def test_unknown_architectures_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"OpenCLIP has no architecture 'ViT-B-23'; did you mean ViT-B-32"):
        open_clip_configuration("ViT-B-23")
    recipe = with_init(small_recipe(), f"open_clip:ViT-B-32:{tmp_path}/none.pt")
    with pytest.raises(UsageError, match=r"none.pt: no such file; model.init=open_clip:ARCH:FILE reads"):
        check_initial(small_model(recipe), recipe)


def test_a_file_of_another_architecture_than_named_is_refused(tiny_file: str, tmp_path: Path) -> None:
    small = config(quick_gelu=True) | {"embed_dim": 8}
    save_file(randomised(open_clip.CLIP(**small)).state_dict(), tmp_path / "tiny.safetensors")
    recipe = with_init(recipe_for({"timm": TINY_QUICK}, activation="quick_gelu"), tiny_file)
    with pytest.raises(UsageError, match=r"tiny.safetensors: weights of another model: 2 tensors differ from the rec"):
        load_initial(small_model(recipe), recipe)


def test_files_that_torch_saved_are_read_without_running_them(tmp_path: Path) -> None:
    model = nn.Linear(2, 3)
    of_trainer = tmp_path / "epoch.pt"
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, of_trainer)
    assert torch.equal(read_weights(of_trainer)["weight"], model.weight)
    program = tmp_path / "it's.pt"
    torch.save({"state_dict": model.state_dict(), "args": argparse.Namespace(lr=1)}, program)
    with pytest.raises(UsageError, match="holds more than tensors and plain values, which could run anything") as said:
        read_weights(program)
    run_cure(str(said.value))
    assert torch.equal(read_weights(tmp_path / "it's.weights.pt")["weight"], model.weight)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_torchscript_archive_is_refused_with_the_way_out(tmp_path: Path) -> None:
    model = nn.Linear(2, 3)
    archive = tmp_path / "ViT.pt"
    torch.jit.trace(model, torch.zeros(1, 2)).save(str(archive))
    with pytest.raises(UsageError, match="a TorchScript archive, which is a program; where you trust it") as said:
        read_weights(archive)
    run_cure(str(said.value))
    assert torch.equal(read_weights(tmp_path / "ViT.weights.pt")["weight"], model.weight)


def run_cure(message: str) -> None:
    """Do what the command in the last line of a message does."""
    python, option, program = shlex.split(message.splitlines()[-1])
    assert (python, option) == ("python", "-c")
    exec(program, {})


@pytest.mark.parametrize(("name", "content"), [("a.pt", b"no"), ("a.safetensors", b"no"), ("b.bin", b"PK\x03\x04no")])
def test_damaged_files_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=rf"^{tmp_path}/{name}: "):
        read_weights(tmp_path / name)


def test_a_file_without_a_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UsageError, match=r"list.pt: no state dict \(names and tensors\)"):
        read_weights(tmp_path / "list.pt")


def test_a_plain_run_starts_mlip_and_the_other_way_is_said(tmp_path: Path) -> None:
    make_run(tmp_path / "clip", small_recipe(mlip=False), seed=1)
    recipe = with_init(small_recipe(), tmp_path / "clip")
    model = small_model(recipe, dtype=torch.float32)
    notes = load_initial(model, recipe)
    assert notes.facts[1].startswith("model.init: not in it, so as in a run without: frequency, frequency_projection, ")
    base = small_model(small_recipe(mlip=False), dtype=torch.float32, seed=1).state_dict()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in base.items())
    make_run(tmp_path / "mlip", small_recipe())
    back = with_init(small_recipe(mlip=False), tmp_path / "mlip")
    assert load_initial(small_model(back), back).cautions == (
        "model.init: in it, and left out as the recipe has no such part: frequency, frequency_projection, "
        "log_scales.frequency_global, log_scales.frequency_token, log_scales.spatial_token, "
        "token_projections.frequency, token_projections.spatial, token_projections.text",
    )


def test_half_a_branch_is_no_start(tmp_path: Path) -> None:
    make_run(tmp_path / "run", small_recipe())
    deeper = with_init(small_recipe(model={"frequency": {"width": 24, "depth": 2}}), tmp_path / "run")
    with pytest.raises(UsageError, match=r"weights of another model: 9 tensors differ from the recipe's"):
        load_initial(small_model(deeper), deeper)


@pytest.mark.parametrize(("text", "place"), [({"activation": "quick_gelu"}, "text"), ({"num_heads": 4}, "text")])
def test_a_run_that_computes_otherwise_is_refused(tmp_path: Path, text: dict[str, Any], place: str) -> None:
    make_run(tmp_path / "run", small_recipe(mlip=False))
    recipe = small_recipe(mlip=False)
    changed = recipe.model.text.model_copy(update=text)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"text": changed})})
    with pytest.raises(UsageError, match=rf"its model.{place} has the same sizes and computes otherwise"):
        check_initial(small_model(recipe), with_init(recipe, tmp_path / "run"))


def test_another_image_size_resamples_positions_and_carries_filters_over(tmp_path: Path) -> None:
    make_run(tmp_path / "run", small_recipe(), seed=1)
    base = small_model(dtype=torch.float32, seed=1).state_dict()
    larger = with_init(small_recipe(data={"image_size": 48}), tmp_path / "run")
    model = small_model(larger, dtype=torch.float32)
    notes = load_initial(model, larger)
    assert "model.init: vision.trunk.pos_embed resampled from 4 x 4 to 6 x 6 patches" in notes.facts
    positions, before = model.vision.trunk.pos_embed, base["vision.trunk.pos_embed"]
    assert torch.equal(positions[:, 0], before[:, 0])
    grid = before[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(grid, size=(6, 6), mode="bicubic", antialias=True)
    torch.testing.assert_close(positions[:, 1:].unflatten(1, (6, 6)).permute(0, 3, 1, 2), expected)
    kernel, small = model.frequency.blocks[0].filter.kernel, base["frequency.blocks.0.filter.kernel"]
    assert torch.equal(kernel[0, 0], small[0, 0])  # the tap at the patch itself stays there
    assert torch.equal(kernel[-1, 1], small[-1, 1])
    assert notes.cautions == ()
    tiny = small_recipe(data={"image_size": 16}, model={"merging": {"rate": 0.5, "at": [3]}})
    smaller = with_init(tiny, tmp_path / "run")
    lossy = load_initial(small_model(smaller), smaller)
    assert lossy.cautions[0].startswith("model.init: frequency.blocks.0.filter.kernel from 4 x 4 to 2 x 2 patches, ")
