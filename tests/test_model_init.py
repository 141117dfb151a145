"""`model.init`: starts from files that others wrote, from runs, at other image sizes, and what is refused."""

import argparse
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from models_for_tests import make_run, small_model, small_recipe
from open_clip_for_tests import TINY, TINY_QUICK, assert_same_features, config, randomised, recipe_for, tiny_towers
from safetensors.torch import save_file
from torch import nn

from mlip_cli.commands import initial_weights
from mlip_cli.commands.initial_weights import check_initial, load_initial, open_clip_configuration
from mlip_cli.commands.weight_files import read_weights
from mlip_cli.config import Recipe
from mlip_cli.errors import UsageError
from mlip_cli.model.open_clip_weights import without_counterpart


@pytest.fixture(autouse=True, scope="module")
def _towers() -> Iterator[None]:
    with tiny_towers():
        yield


def with_init(recipe: Recipe, init: str | Path) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"init": str(init)})})


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
        "activation gelu (there quick_gelu); model.text.activation gelu (there quick_gelu); use "
        f"model: {{embed_dim: 16, vision: {{timm: {TINY_QUICK}}}, "
        "text: {width: 32, depth: 2, num_heads: 2, context_length: 16, activation: quick_gelu}} "
        "(its own data.image_size is 32; for others the positions are resampled)"
    )
    with pytest.raises(UsageError, match=r"model.vision's norm before its blocks False \(there True\)"):
        check_initial(small_model(small_recipe()), recipe)


def test_a_file_in_half_precision_is_resampled_in_full(tiny_file: str) -> None:
    file = Path(tiny_file.rpartition(":")[2])
    half = {name: tensor.half() for name, tensor in read_weights(file).items()}
    save_file(half, file)
    recipe = recipe_for({"timm": TINY_QUICK}, activation="quick_gelu", data={"image_size": 48})
    model = small_model(recipe, dtype=torch.float32)
    notes = load_initial(model, with_init(recipe, tiny_file))
    assert "model.init: vision.trunk.pos_embed resampled from 4 x 4 to 6 x 6 patches" in notes.facts
    grid = half["visual.positional_embedding"][None, 1:].float().unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(grid, size=(6, 6), mode="bicubic", antialias=True).flatten(2).mT
    torch.testing.assert_close(model.vision.trunk.pos_embed[:, 1:], expected, rtol=1e-6, atol=1e-6)


def test_a_tower_with_other_parts_is_no_start(tiny_file: str) -> None:
    stem = {"frequency": {"placement": "stem", "width": 32, "depth": 2}, "merging": None}
    recipe = with_init(small_recipe(model=stem), tiny_file)
    with pytest.raises(UsageError, match=r"does not fit the recipe: vision.trunk.blocks.0.filter.kernel, .*: no"):
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
    """Do what the command at the end of a message does."""
    python, option, program = shlex.split(message.partition("with: ")[2])
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
