"""`model.vision.init`: the image tower starts from timm's weights; locked-image tuning; what is refused."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from command_for_tests import mlip
from models_for_tests import small_model, small_recipe
from open_clip_for_tests import randomised
from safetensors.torch import save_file
from shards_for_tests import make_dataset
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from mlip_cli.commands.dry_run import plan
from mlip_cli.errors import UsageError
from mlip_cli.recipe.checks import check
from mlip_cli.recipe.config import Recipe
from mlip_cli.recipe.load import absolute_paths, load_recipe, recipe_yaml
from mlip_cli.runs.checkpoint import load_weights
from mlip_cli.runs.initial_weights import check_initial
from mlip_cli.runs.start import check_inits_there, recipe_of_init
from mlip_cli.runs.tower_weights import load_tower
from mlip_cli.train.facts import cautions

SMALL_TOWER = {"patch_size": 8, "width": 32, "depth": 4, "num_heads": 2}


def of_timm(**changes: Any) -> VisionTransformer:
    """A small tower of timm's class with random weights, in the form of `SMALL_TOWER`."""
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    return randomised(VisionTransformer(**sizes | {"num_classes": 7} | changes))


def recipe_for(file: Path, *, image_size: int = 32, **model: Any) -> Recipe:
    """A CLIP with the small tower, unless `model` has another `vision`, that starts from `file`."""
    vision = model.pop("vision", SMALL_TOWER) | {"init": str(file)}
    return small_recipe(mlip=False, model={"vision": vision, **model}, data={"image_size": image_size})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(of_timm().state_dict(), tmp_path / "tower.safetensors")
    return tmp_path / "tower.safetensors"


# features -------------------------------------------------------------------------------------------------------------


def assert_features_of_timm(name: str, file: Path, *, image_size: int, pool: str | None = None) -> tuple[str, ...]:
    """Features of a tower that started from `file` equal those of timm's own class and loading; returns the facts."""
    theirs = timm.create_model(name, img_size=image_size)
    weights = torch.load(file, weights_only=True)
    theirs.load_state_dict(checkpoint_filter_fn(weights, theirs))
    recipe = recipe_for(file, image_size=image_size, vision={"timm": name, "pool": pool})
    model = small_model(recipe, dtype=torch.float32)
    facts = load_tower(model, recipe).facts
    model, theirs = model.double().eval(), theirs.double().eval()
    images = torch.randn(2, 3, image_size, image_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tokens = theirs.forward_features(images)
        pooled = theirs.forward_head(tokens, pre_logits=True)
        ours = model.vision(images, model.plan)
    patches = tokens[:, theirs.num_prefix_tokens :]
    expected = pooled if pool is None else patches.mean(1)
    torch.testing.assert_close(ours.tokens, patches, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.pooled, expected, rtol=0, atol=1e-6)
    assert (pooled[0] - pooled[1]).norm() > 0.01
    return facts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "image_size", "words"),
    [
        ("vit_small_patch14_dinov2", 56, "pos_embed resampled from 37 x 37 to 4 x 4 patches"),
        ("vit_small_patch14_reg4_dinov2", 56, "pos_embed resampled from 37 x 37 to 4 x 4 patches"),
        ("vit_small_patch14_dinov2", 518, None),
        ("vit_base_patch16_224", 224, "head.weight, head.bias: not used, the tower has no such parts"),
        ("vit_base_patch16_224", 96, "pos_embed resampled from 14 x 14 to 6 x 6 patches"),
        ("vit_xsmall_patch16_clip_224", 224, "head.weight, head.bias: not used, the tower has no such parts"),
    ],
)
def test_features_equal_timms(tmp_path: Path, name: str, image_size: int, words: str | None) -> None:
    torch.save(randomised(timm.create_model(name)).state_dict(), tmp_path / "tower.pth")
    facts = assert_features_of_timm(name, tmp_path / "tower.pth", image_size=image_size)
    assert facts[0] == (
        f"model.vision.init: the image tower has the weights of {tmp_path}/tower.pth; all other parts start from random"
        " values"
    )
    assert (words is None and len(facts) == 1) or any(words in fact for fact in facts if words), facts


@pytest.mark.slow
def test_the_mean_of_the_patches_of_dinov2_can_be_pooled(tmp_path: Path) -> None:
    weights = randomised(timm.create_model("vit_small_patch14_dinov2")).state_dict()
    torch.save(weights, tmp_path / "tower.pth")
    assert_features_of_timm("vit_small_patch14_dinov2", tmp_path / "tower.pth", image_size=56, pool="mean")


def taken(recipe: Recipe) -> dict[str, Tensor]:
    model = small_model(recipe, dtype=torch.float32)
    load_tower(model, recipe)
    return dict(model.vision.trunk.state_dict())


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.module."])
@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_wrappers_and_checkpoints_are_opened(tmp_path: Path, prefix: str, key: str | None) -> None:
    weights = of_timm().state_dict()
    content: dict[str, Any] = {prefix + name: tensor for name, tensor in weights.items()}
    content[f"{prefix}mask_token"] = torch.zeros(1, 1, 32)
    torch.save(content if key is None else {"epoch": 3, key: content}, tmp_path / "tower.bin")
    own = taken(recipe_for(tmp_path / "tower.bin"))
    assert all(torch.equal(own[name], tensor) for name, tensor in weights.items() if not name.startswith("head"))


def test_all_other_parts_keep_their_random_values(file: Path) -> None:
    recipe = recipe_for(file)
    model, untouched = (small_model(recipe, dtype=torch.float32) for _ in range(2))
    load_tower(model, recipe)
    own, fresh = model.state_dict(), untouched.state_dict()
    assert all(torch.equal(own[name], fresh[name]) != name.startswith("vision.") for name in own)


# mistakes -------------------------------------------------------------------------------------------------------------

CURE = "; name the tower that the file belongs to as model.vision.timm; a file of a whole CLIP is for model.init"


@pytest.mark.parametrize(
    ("tower", "words"),
    [
        (
            {"init_values": 1e-5},
            "blocks.0.ls1.gamma (32,) (expected none); blocks.0.ls2.gamma (32,) (expected none); "
            "blocks.1.ls1.gamma (32,) (expected none); 8 differ",
        ),
        (
            {"depth": 3},
            "blocks.3.attn.proj.bias missing (expected (32,)); blocks.3.attn.proj.weight missing (expected (32, 32)); "
            "blocks.3.attn.qkv.bias missing (expected (96,)); 12 differ",
        ),
        ({"patch_size": 4}, "patch_embed.proj.weight (32, 3, 4, 4) (expected (32, 3, 8, 8)); 1 differ"),
        (
            {"reg_tokens": 2},
            "pos_embed (1, 19, 32) (expected (1, 17, 32)); reg_token (1, 2, 32) (expected none); 2 differ",
        ),
    ],
)
def test_another_tower_is_refused_by_its_tensors(tmp_path: Path, tower: dict[str, Any], words: str) -> None:
    save_file(of_timm(**tower).state_dict(), tmp_path / "other.safetensors")
    recipe = recipe_for(tmp_path / "other.safetensors")
    with pytest.raises(UsageError) as refused:
        load_tower(small_model(recipe), recipe)
    place = f"model.vision.init: {tmp_path}/other.safetensors does not fit the image tower: "
    assert str(refused.value) == f"{place}{words}{CURE}"


def test_files_that_hold_no_whole_weights_are_refused(tmp_path: Path) -> None:
    weights = of_timm().state_dict()
    weights["norm.bias"][3] = torch.nan
    save_file(weights, tmp_path / "nan.safetensors")
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "nan.safetensors").read_bytes()[:-8])
    (tmp_path / "augreg.npz").write_bytes(b"PK")
    for name, words in (
        ("nan.safetensors", f"model.vision.init: {tmp_path}/nan.safetensors: vision.trunk.norm.bias holds NaN or inf"),
        ("half.safetensors", f"{tmp_path}/half.safetensors: not a whole safetensors file"),
        ("augreg.npz", f"{tmp_path}/augreg.npz: arrays of NumPy, by JAX's names; take timm's file of these weights"),
    ):
        recipe = recipe_for(tmp_path / name)
        with pytest.raises(UsageError) as refused:
            load_tower(small_model(recipe), recipe)
        assert str(refused.value).startswith(words)


def mistakes(recipe: Recipe) -> list[str]:
    return [f"{key}: {wrong}" for key, wrong in check(recipe)]


def test_stems_and_a_second_source_are_mistakes_of_the_recipe(file: Path) -> None:
    stem = {"frequency": {"placement": "stem", "input": "tokens", "width": 32, "depth": 1}}
    recipe = small_recipe(model=stem | {"vision": SMALL_TOWER | {"init": str(file)}, "merging": None})
    assert mistakes(recipe) == [
        "model.vision.init: a stem replaces the first blocks of the trained tower; set model.frequency to null or its "
        "placement to branch, or this to null"
    ]
    assert mistakes(recipe_for(file, init="runs/x")) == [
        "model.vision.init: model.init gives the image tower its weights already; set one of the two to null"
    ]
    branch = small_recipe(model={"vision": SMALL_TOWER | {"init": str(file)}})
    assert mistakes(branch) == []


def test_only_the_image_tower_can_be_frozen(file: Path) -> None:
    assert mistakes(recipe_for(file, freeze="image")) == []
    assert mistakes(recipe_for(file, freeze="text")) == [
        "model.freeze: the text tower would keep random weights; give model.init, or set it to null"
    ]
    assert mistakes(small_recipe(mlip=False, model={"freeze": "image"})) == [
        "model.freeze: the image tower would keep random weights; give model.init or model.vision.init, or set it to "
        "null"
    ]


def test_what_a_later_layer_names_replaces_the_other(file: Path, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(recipe_yaml(recipe_for(file)))
    loaded = load_recipe(str(tmp_path / "x.yaml"), ["model.init=runs/y"])
    assert (loaded.recipe.model.init, loaded.recipe.model.vision.init) == ("runs/y", None)
    assert [re.sub(r":\d+,", ":N,", note) for note in loaded.notes] == [
        f"model.init: runs/y replaces model.vision.init of {tmp_path}/x.yaml:N, which is null now"
    ]
    (tmp_path / "y.yaml").write_text(recipe_yaml(loaded.recipe))
    again = load_recipe(str(tmp_path / "y.yaml"), [f"model.vision.init={file}"]).recipe
    assert (again.model.init, again.model.vision.init) == (None, str(file))


def test_a_missing_file_is_named_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = recipe_for(Path("none.pth"))
    words = "model.vision.init: none.pth: no such file; it is a file of weights that timm saved"
    with pytest.raises(UsageError) as refused:
        check_inits_there(recipe.model)
    assert str(refused.value) == words
    Path("x.yaml").write_text(recipe_yaml(recipe))
    done = mlip("pretrain", "x.yaml", "--dry-run", COLUMNS="300")
    assert (done.returncode, words in done.stderr) == (2, True), done.stderr
    moved = absolute_paths(recipe)
    assert moved.model.vision.init == str(tmp_path / "none.pth")
    assert absolute_paths(moved) == moved


def test_pixels_that_are_not_those_of_timms_weights_are_named(file: Path) -> None:
    recipe = recipe_for(file, image_size=224, vision={"timm": "vit_base_patch16_224"})
    assert plan(recipe, resumes=True).cautions == plan(recipe, resumes=False).cautions[:-1]
    assert plan(recipe, resumes=False).cautions[-1] == (
        "timm's usual weights of vit_base_patch16_224 read other pixels than this recipe gives them; if "
        "model.vision.init holds these, set data.pixel_mean=[0.5, 0.5, 0.5] data.pixel_std=[0.5, 0.5, 0.5]"
    )
    half = {"pixel_mean": [0.5] * 3, "pixel_std": [0.5] * 3, "image_size": 224}
    vision = {"timm": "vit_base_patch16_224", "init": str(file)}
    right = small_recipe(mlip=False, model={"vision": vision, "freeze": "image"}, data=half)
    assert plan(right, resumes=False).cautions == []


def test_settings_that_would_spoil_a_trained_tower_are_named(file: Path) -> None:
    recipe = recipe_for(file)
    model = small_model(recipe)
    overwritten = (
        "optim.lr 0.001 fits a training from random weights, and model.vision.init gives the image tower trained ones: "
        "it overwrites what they have learned; set model.freeze=image"
    )
    assert cautions(recipe, model.plan, 8) == [overwritten]
    optim = recipe.optim.model_copy(update={"layer_decay": 0.5})
    frozen = recipe_for(file, freeze="image").model_copy(update={"optim": optim})
    assert cautions(frozen, model.plan, 8) == [
        "optim.layer_decay 0.5 is for trained weights, and model.init is null: it slows the new text tower too; set it "
        "to 1"
    ]


# locked-image tuning --------------------------------------------------------------------------------------------------


@pytest.fixture
def locked(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe that trains a text tower beside a locked image tower, in the current folder."""
    monkeypatch.chdir(tmp_path)
    make_dataset(tmp_path / "data", n=16)
    recipe = small_recipe(
        mlip=False,
        train="data",
        model={"vision": SMALL_TOWER | {"init": "tower.safetensors"}, "freeze": "image"},
        data={"num_workers": 0},
    )
    every = recipe.train.checkpoint_every.model_copy(update={"steps": 4})
    train = recipe.train.model_copy(update={"checkpoint_every": every})
    (tmp_path / "x.yaml").write_text(recipe_yaml(recipe.model_copy(update={"train": train})))
    return tmp_path / "x.yaml"


def test_a_locked_image_tower_stays_and_its_projection_trains(locked: Path) -> None:
    done = mlip("pretrain", "x.yaml", "--out", "lit", COLUMNS="300")
    assert done.returncode == 0, done.stderr
    assert "of them train (model.freeze: image; the image projection trains)" in done.stderr
    assert "all other parts start from random values" in done.stderr
    trained = load_weights(Path("lit/checkpoints/step_0000008"))
    fresh = small_model(load_recipe("x.yaml").recipe, dtype=torch.float32).state_dict()
    given = {f"vision.trunk.{name}": tensor for name, tensor in of_timm().state_dict().items()}
    tower = [name for name in trained if name.startswith("vision.")]
    assert all(torch.equal(trained[name], given[name]) for name in tower)
    for part in ("image_projection.weight", "text_projection.weight", "text.blocks.0.mlp.fc1.weight"):
        assert not torch.equal(trained[part], fresh[part]), part
    tuned = load_recipe("lit/recipe.yaml", ["model.init=lit"]).recipe
    check_initial(tuned)
    bare = Path("bare.yaml")
    bare.write_text("data: {train: data}\nmodel: {init: lit}\ntrain: {steps: 1, global_batch_size: 8}\n")
    of_run = load_recipe("bare.yaml", of_init=recipe_of_init).recipe
    assert (of_run.model.vision.init, of_run.model.freeze) == (None, None)


def test_a_resumed_run_does_not_read_the_file_again(locked: Path) -> None:
    done = mlip("pretrain", "x.yaml", "--out", "lit")
    assert done.returncode == 0, done.stderr
    whole = Path("lit/checkpoints/step_0000008/model.safetensors").read_bytes()
    shutil.rmtree("lit/checkpoints/step_0000008")
    stamp = Path("lit/run.json")
    stamp.write_text(stamp.read_text().replace('"finished"', '"stopped"'))
    Path("tower.safetensors").unlink()
    done = mlip("pretrain", "x.yaml", "--out", "lit", "--resume")
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stderr
    assert Path("lit/checkpoints/step_0000008/model.safetensors").read_bytes() == whole
    Path("elsewhere.safetensors").write_bytes(b"")
    done = mlip("pretrain", "x.yaml", "--out", "lit", "--resume", "model.vision.init=elsewhere.safetensors")
    assert done.returncode == 2
    assert "model.vision.init" in done.stderr
