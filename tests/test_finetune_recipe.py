"""recipes/finetune.yaml: it trains the model of the weights that it starts from, and is checked without weights."""

import json
from pathlib import Path

import pytest
from command_for_tests import mlip
from models_for_tests import make_run, small_recipe
from shards_for_tests import make_dataset

from mlip_cli.errors import RecipeError
from mlip_cli.recipe.load import load_recipe, load_without_weights
from mlip_cli.recipe.shipped import recipes_folder
from mlip_cli.runs.start import recipe_of_init

FINETUNE = recipes_folder() / "finetune.yaml"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    losses = {"spatial_global": {"kind": "sigmoid"}}
    make_run(tmp_path / "start", small_recipe(mlip=False, losses=losses, data={"pixel_mean": [0.5, 0.4, 0.3]}))


def test_model_losses_and_pixels_are_those_of_the_weights() -> None:
    start = recipe_of_init("start")
    tuned = load_recipe(str(FINETUNE), ["model.init=start"], of_init=recipe_of_init).recipe
    assert tuned.model == start.model.model_copy(update={"init": "start"})
    assert (tuned.losses, tuned.data.image_size, tuned.data.pixel_mean) == (start.losses, 32, (0.5, 0.4, 0.3))
    assert (tuned.optim.lr, tuned.optim.layer_decay, tuned.evaluate.at_start) == (1e-5, 0.75, True)


def test_a_tuning_by_the_command_says_what_changed() -> None:
    for name in ("train", "validation"):
        make_dataset(Path("data/mine") / name, n=16, seed=len(name))
    small = ["train.steps=3", "train.global_batch_size=8", "optim.warmup_steps=1", "data.num_workers=0"]
    done = mlip("pretrain", str(FINETUNE), "model.init=start", *small, "--out", "tuned", "--json", COLUMNS="300")
    assert done.returncode == 0, done.stderr
    assert "model.init: weights of start/checkpoints/step_0000008" in done.stderr
    assert "step 3 beside step 0" in done.stderr
    assert "warning" not in done.stderr
    changes = json.loads(done.stdout)["before_after"]
    assert (changes["from_step"], changes["to_step"]) == (0, 3)
    assert {change["dataset"] for change in changes["changes"]} == {"validation"}


def test_it_is_checked_without_weights_and_others_as_they_are(tmp_path: Path) -> None:
    assert load_without_weights(str(FINETUNE)).recipe.model.vision == load_recipe("laptop").recipe.model.vision
    assert load_without_weights("smoke").recipe == load_recipe("smoke").recipe
    broken = tmp_path / "broken.yaml"
    broken.write_text(FINETUNE.read_text().replace("layer_decay: 0.75", "layer_decay: 1.75"))
    with pytest.raises(RecipeError, match=r"optim\.layer_decay: expected a number above 0 and at most 1, not 1\.75$"):
        load_without_weights(str(broken))
