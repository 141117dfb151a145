"""A run whose captions are read by another tokenizer than CLIP's keeps that tokenizer's file."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_for_tests import mlip
from foreign_for_tests import CONFIGURATIONS, towers_of_timm, write_open_clip
from PIL import Image
from shards_for_tests import make_dataset

from mlip_cli.recipe.load import load_recipe
from mlip_cli.runs.folder import Run
from mlip_cli.runs.loading import load_run
from mlip_cli.runs.start import recipe_of_init

TUNING = """
data: {train: data, num_workers: 0}
model: {init: siglip}
optim: {lr: 1e-5, warmup_steps: 1}
train: {steps: 4, global_batch_size: 8, precision: fp32, checkpoint_every: {steps: 2}, keep: {last: 4}}
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    make_dataset(tmp_path / "data", n=16)
    (tmp_path / "tuning.yaml").write_text(TUNING)
    with towers_of_timm():
        write_open_clip(tmp_path / "siglip", CONFIGURATIONS["siglip"])
        yield


def tune(*more: str) -> str:
    """What a tuning in runs/tuned says; it must end well."""
    done = mlip("pretrain", "tuning.yaml", "--out", "runs/tuned", *more)
    assert done.returncode == 0, done.stderr
    return done.stderr


def cut_back(run: Run) -> None:
    """Remove what came after step 2."""
    shutil.rmtree(run.checkpoints / "step_0000004")
    stamp = json.loads(run.stamp.read_text())
    run.stamp.write_text(json.dumps(stamp | {"end_reason": "stopped"}))


def test_a_tuned_run_works_after_its_source_is_gone() -> None:
    tune()
    run = Run(Path("runs/tuned"))
    assert run.tokenizer.read_bytes() == Path("siglip/tokenizer.json").read_bytes()
    before = load_run("runs/tuned", device="cpu").tokenizer.encode(["a red balloon"])
    shutil.rmtree("siglip")
    shutil.rmtree("runs/foreign")
    Path("runs/tuned").rename("runs/moved")
    assert load_run("runs/moved", device="cpu").tokenizer.encode(["a red balloon"]).equal(before)
    done = mlip("eval-zeroshot", "runs/moved", "--task", "retrieval", "--dataset", "shards:data", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    named = str(load_recipe("runs/moved/recipe.yaml").recipe.model.text.tokenizer)
    assert "runs/tuned/tokenizer.json" in named, "the recipe of a run names the run's own copy"


def test_a_resumed_run_reads_its_own_copy_and_ends_as_the_whole_one() -> None:
    tune()
    run = Run(Path("runs/tuned"))
    weights = (run.checkpoints / "step_0000004" / "model.safetensors").read_bytes()
    cut_back(run)
    shutil.copytree("siglip", "elsewhere")
    for folder in ("siglip", "runs/foreign"):
        shutil.rmtree(folder)
    done = mlip("pretrain", "runs/tuned/recipe.yaml", "--out", "runs/tuned", "--resume")
    assert done.returncode == 0, done.stderr
    assert (run.checkpoints / "step_0000004" / "model.safetensors").read_bytes() == weights


def test_the_same_tokenizer_at_another_place_resumes_and_another_one_does_not() -> None:
    tune()
    run = Run(Path("runs/tuned"))
    cut_back(run)
    text = Path("siglip/tokenizer.json").read_text()
    Path("copy.json").write_text(text)
    tune("--resume", "model.text.tokenizer.file=copy.json")
    cut_back(run)
    Path("other.json").write_text(text.replace("balloon", "bolloan"))
    done = mlip("pretrain", "tuning.yaml", "--out", "runs/tuned", "--resume", "model.text.tokenizer.file=other.json")
    assert done.returncode == 2
    here = Path.cwd()
    assert f"(model.text.tokenizer.file: {here}/runs/tuned/tokenizer.json -> {here}/other.json)" in done.stderr, (
        done.stderr
    )


def test_a_run_that_was_killed_before_the_copy_begins_again() -> None:
    tune()
    run = Run(Path("runs/tuned"))
    shutil.rmtree(run.checkpoints)
    run.tokenizer.unlink()
    tune("--resume")
    assert run.tokenizer.is_file()


def test_the_recipe_of_a_run_is_taken_with_its_copy() -> None:
    tune()
    shutil.rmtree("siglip")
    taken = load_recipe("tuning.yaml", ["model.init=runs/tuned"], of_init=recipe_of_init).recipe.model.text.tokenizer
    assert taken is not None
    assert taken.file == str(Path("runs/tuned/tokenizer.json").absolute())


def test_an_average_has_the_tokenizer_too() -> None:
    for name in ("red", "green"):
        (Path("classes") / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), name).save(Path("classes") / name / "a.png")
    tune()
    done = mlip(
        *("average", "siglip", "runs/tuned", "--weights", "0.5", "--out", "runs/mixed", "--device", "cpu"),
        *("--dataset", "folder:classes"),
    )
    assert done.returncode == 0, done.stderr
    shutil.rmtree("siglip")
    shutil.rmtree("runs/tuned")
    assert load_run("runs/mixed", device="cpu").tokenizer.encode(["a red balloon"]).shape == (1, 16)
