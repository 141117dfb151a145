"""`model.init`: starts from files that others wrote, from runs, at other image sizes, and what is refused."""

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from models_for_tests import make_run, small_model, small_recipe
from open_clip_for_tests import assert_same_features, config, randomised, recipe_for
from safetensors.torch import save_file
from torch import nn

from mlip_cli.errors import UsageError
from mlip_cli.recipe.config import Recipe
from mlip_cli.runs import foreign, initial_weights
from mlip_cli.runs.foreign import open_clip_configuration
from mlip_cli.runs.initial_weights import check_initial, load_initial
from mlip_cli.runs.weight_files import read_weights


def with_init(recipe: Recipe, init: str | Path) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"init": str(init)})})


@pytest.fixture
def tiny_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """`model.init` of a tiny CLIP with QuickGELU, of an architecture that only this test knows."""
    known = {"tiny": config(quick_gelu=True), "tiny-gelu": config()}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(foreign, "open_clip_configuration", lambda name: known[name])
    save_file(randomised(open_clip.CLIP(**known["tiny"])).state_dict(), tmp_path / "tiny.safetensors")
    return f"open_clip:tiny:{tmp_path / 'tiny.safetensors'}"


@pytest.mark.slow
def test_a_run_starts_from_a_foreign_file(tiny_file: str) -> None:
    recipe = with_init(recipe_for(activation="quick_gelu"), tiny_file)
    model = small_model(recipe, dtype=torch.float32).eval()
    notes = load_initial(model, recipe)
    [copied] = Path("runs/foreign").glob("tiny-*/checkpoints/step_0000000")
    assert notes.facts == (f"model.init: weights of {copied}",)
    assert notes.cautions == ()
    assert_same_features(model, randomised(open_clip.CLIP(**config(quick_gelu=True))))
    assert model.log_scales["spatial_global"] == randomised(open_clip.CLIP(**config(quick_gelu=True))).logit_scale


def test_a_foreign_file_starts_mlip_with_the_rest_at_random(tiny_file: str) -> None:
    plain = recipe_for(activation="quick_gelu")
    mlip = small_recipe()
    section = plain.model.model_copy(update={"frequency": mlip.model.frequency, "merging": mlip.model.merging})
    recipe = with_init(mlip.model_copy(update={"model": section}), tiny_file)
    model, untouched = (small_model(recipe, dtype=torch.float32) for _ in range(2))
    notes = load_initial(model, recipe)
    assert notes.facts[1] == (
        "model.init: the weights have no frequency, frequency_projection, token_projections.spatial, "
        "token_projections.frequency, token_projections.text, log_scales.spatial_token, log_scales.frequency_global, "
        "log_scales.frequency_token; these parts start from random values"
    )
    own, fresh = model.state_dict(), untouched.state_dict()
    kept = {name.split(".")[0] for name in own if torch.equal(own[name], fresh[name])}
    assert kept == {"frequency", "frequency_projection", "token_projections", "log_scales"}
    taken = {name.split(".")[0] for name in own if not torch.equal(own[name], fresh[name])}
    assert taken == {"vision", "text", "image_projection", "text_projection", "log_scales"}


def test_scale_and_bias_of_another_kind_of_loss_are_not_taken(tiny_file: str) -> None:
    recipe = recipe_for(activation="quick_gelu", losses={"spatial_global": {"kind": "sigmoid"}})
    model = small_model(recipe, dtype=torch.float32)
    scale = model.log_scales["spatial_global"].clone()
    notes = load_initial(model, with_init(recipe, tiny_file))
    anew = "model.init: losses.spatial_global is another kind of loss there, so its scale starts anew"
    assert notes.facts[1:] == (anew,)
    assert torch.equal(model.log_scales["spatial_global"], scale)


def test_a_bias_of_another_kind_of_loss_is_left_out_with_its_scale(tmp_path: Path) -> None:
    make_run(tmp_path / "sigmoid", small_recipe(mlip=False, losses={"spatial_global": {"kind": "sigmoid"}}))
    recipe = with_init(small_recipe(mlip=False), tmp_path / "sigmoid")
    model = small_model(recipe, dtype=torch.float32)
    scale = model.log_scales["spatial_global"].clone()
    notes = load_initial(model, recipe)
    anew = "model.init: losses.spatial_global is another kind of loss there, so its scale starts anew"
    assert (notes.facts[1:], notes.cautions) == ((anew,), ())
    assert torch.equal(model.log_scales["spatial_global"], scale)


def test_an_architecture_that_does_not_fit_is_refused_with_the_keys_that_differ(tiny_file: str) -> None:
    recipe = with_init(recipe_for(model={"embed_dim": 24}), tiny_file)
    with pytest.raises(UsageError) as refused:
        check_initial(recipe)
    assert str(refused.value) == (
        f"model.init: {tiny_file} does not fit the recipe: model.embed_dim 24 (there 16); model.vision.activation "
        '"gelu" (there "quick_gelu"); model.text.activation "gelu" (there "quick_gelu"); take these values, or leave '
        "model.vision out of the recipe, and mlip takes the whole model from the weights"
    )


def test_other_pixels_than_those_of_the_weights_are_named(tiny_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(initial_weights, "warn", said.append)
    half = [0.5, 0.5, 0.5]
    check_initial(with_init(recipe_for(activation="quick_gelu", data={"pixel_mean": half}), tiny_file))
    assert said == [
        "data.pixel_mean: [0.5, 0.5, 0.5], but the weights of model.init were trained with "
        "[0.48145466, 0.4578275, 0.40821073]"
    ]


def test_a_file_in_half_precision_is_resampled_in_full(tiny_file: str) -> None:
    file = Path(tiny_file.rpartition(":")[2])
    half = {name: tensor.half() for name, tensor in read_weights(file).items()}
    save_file(half, file)
    recipe = recipe_for(activation="quick_gelu", data={"image_size": 48})
    model = small_model(recipe, dtype=torch.float32)
    notes = load_initial(model, with_init(recipe, tiny_file))
    assert "model.init: vision.trunk.pos_embed resampled from 4 x 4 to 6 x 6 patches" in notes.facts
    grid = half["visual.positional_embedding"][None, 1:].float().unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(grid, size=(6, 6), mode="bicubic", antialias=True).flatten(2).mT
    torch.testing.assert_close(model.vision.trunk.pos_embed[:, 1:], expected, rtol=1e-6, atol=1e-6)


def test_a_stem_does_not_start_from_a_foreign_file(tiny_file: str) -> None:
    stem = {"frequency": {"placement": "stem", "width": 32, "depth": 2}, "merging": None}
    recipe = with_init(small_recipe(model=stem), tiny_file)
    with pytest.raises(UsageError, match=r'; model.frequency {"placement": "stem", .*} \(there null\); take'):
        check_initial(recipe)


def test_unknown_architectures_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"^open_clip:ViT-B-23: OpenCLIP has no architecture 'ViT-B-23'; names look like ViT-B-32"
    ):
        open_clip_configuration("ViT-B-23")
    recipe = with_init(small_recipe(), f"open_clip:ViT-B-32:{tmp_path}/none.pt")
    with pytest.raises(UsageError, match=r"none.pt: no such file; open_clip:ARCH:FILE reads a local file of weights"):
        check_initial(recipe)


def test_a_file_of_another_architecture_than_named_is_refused(tiny_file: str, tmp_path: Path) -> None:
    small = config(quick_gelu=True) | {"embed_dim": 8}
    save_file(randomised(open_clip.CLIP(**small)).state_dict(), tmp_path / "tiny.safetensors")
    recipe = with_init(recipe_for(activation="quick_gelu"), tiny_file)
    with pytest.raises(
        UsageError, match=r"weights of another model: image_projection.weight \(8, 32\) \(expected \(16,"
    ):
        load_initial(small_model(recipe), recipe)


def test_mistakes_of_a_file_or_a_configuration_are_named_with_their_place_once(
    tiny_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(tiny_file.rpartition(":")[2])
    recipe = with_init(recipe_for(activation="quick_gelu"), tiny_file)
    save_file({"visual.layer1.weight": torch.zeros(1)}, file)
    with pytest.raises(UsageError, match=rf"^{tiny_file}: visual.layer1.weight: no such part here; "):
        load_initial(small_model(recipe), recipe)
    file.write_bytes(b"no")
    with pytest.raises(UsageError, match=rf"^{file}: not a whole safetensors file \("):
        load_initial(small_model(recipe), recipe)
    pooled = config(vision={"pool_type": "avg"})
    monkeypatch.setattr(foreign, "open_clip_configuration", lambda name: pooled)
    with pytest.raises(UsageError, match=r"^open_clip:tiny: vision_cfg.pool_type avg: no such part here; "):
        check_initial(recipe)


def test_a_plain_run_starts_mlip_and_mlip_starts_a_plain_run(tmp_path: Path) -> None:
    make_run(tmp_path / "clip", small_recipe(mlip=False), seed=1)
    recipe = with_init(small_recipe(), tmp_path / "clip")
    model = small_model(recipe, dtype=torch.float32)
    notes = load_initial(model, recipe)
    assert notes.facts[1].startswith("model.init: the weights have no frequency, frequency_projection, ")
    base = small_model(small_recipe(mlip=False), dtype=torch.float32, seed=1).state_dict()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in base.items())
    make_run(tmp_path / "mlip", small_recipe())
    back = with_init(small_recipe(mlip=False), tmp_path / "mlip")
    assert load_initial(small_model(back), back).cautions == (
        "model.init: these weights are ignored, as the recipe has no such parts: frequency, frequency_projection, "
        "log_scales.frequency_global, log_scales.frequency_token, log_scales.spatial_token, "
        "token_projections.frequency, token_projections.spatial, token_projections.text",
    )


TEXT = {"width": 32, "depth": 2, "num_heads": 2, "context_length": 16}
WIDE = {"patch_size": 8, "width": 192, "depth": 4, "num_heads": 2}
NARROWER_BRANCH = {"placement": "branch", "width": 24, "depth": 1}
FITTING_BRANCH = {"placement": "branch", "width": 32, "depth": 1}
"""As wide as the tower."""
OTHER_STEM = {"placement": "stem", "width": 32, "depth": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        ({}, {"embed_dim": 24}, "model.embed_dim 24 (there 16)"),
        ({}, {"frequency": NARROWER_BRANCH | {"depth": 2}}, "model.frequency.depth 2 (there 1)"),
        (
            {"frequency": FITTING_BRANCH},
            {"frequency": NARROWER_BRANCH},
            "model.frequency.width 24 (there 32)",
        ),
        (
            # 3 * 8**2 wide, so that DCT coefficients are as many as a token's numbers: all shapes are equal
            {"vision": WIDE, "frequency": NARROWER_BRANCH | {"input": "tokens"}},
            {"vision": WIDE, "frequency": NARROWER_BRANCH | {"input": "dct"}},
            'model.frequency.input "dct" (there "tokens")',
        ),
        (
            {"frequency": FITTING_BRANCH},
            {"frequency": OTHER_STEM, "merging": None},
            'model.frequency.placement "stem" (there "branch"); model.frequency.input "tokens" (there "dct"); '
            "model.frequency.depth 2 (there 1)",
        ),
        (
            {"vision": WIDE},
            {"text": TEXT | {"activation": "quick_gelu", "dropout": 0.1}},
            'model.vision.width 32 (there 192); model.text.activation "quick_gelu" (there "gelu")',
        ),
        ({}, {"text": TEXT | {"num_heads": 4}}, "model.text.num_heads 4 (there 2)"),
    ],
)
def test_a_run_of_another_form_is_refused_by_the_keys_that_differ(
    tmp_path: Path, theirs: dict[str, Any], ours: dict[str, Any], words: str
) -> None:
    make_run(tmp_path / "run", small_recipe(model=theirs))
    recipe = with_init(small_recipe(model=ours), tmp_path / "run")
    with pytest.raises(UsageError) as refused:
        check_initial(recipe)
    assert str(refused.value) == (
        f"model.init: {tmp_path}/run does not fit the recipe: {words}; take these values, or leave model.vision out of "
        "the recipe, and mlip takes the whole model from the weights"
    )


def test_a_run_goes_on_with_another_drop_path_and_dropout(tmp_path: Path) -> None:
    plain = small_recipe(mlip=False)
    make_run(tmp_path / "run", plain)
    vision = plain.model.vision.model_dump() | {"drop_path": 0.1}
    text = plain.model.text.model_dump() | {"dropout": 0.1}
    recipe = with_init(small_recipe(mlip=False, model={"vision": vision, "text": text}), tmp_path / "run")
    check_initial(recipe)


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
