"""`mlip profile` on small real models, with and without data."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import make_run, small_recipe
from shards_for_tests import make_dataset

from mlip_cli import cli
from mlip_cli.commands import profile
from mlip_cli.config import LOSS_NAMES
from mlip_cli.recipe import recipe_yaml


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with recipes of a CLIP and an MLIP and a run of the latter."""
    monkeypatch.chdir(tmp_path)
    recipe = small_recipe(data={"train": "data/colors"})
    Path("mlip.yaml").write_text(recipe_yaml(recipe))
    Path("clip.yaml").write_text(recipe_yaml(small_recipe(mlip=False)))
    make_run(Path("runs/small"), recipe)
    return tmp_path


def mlip(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["mlip", "profile", *arguments])
    return cli._exit_code()


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out)


def test_a_recipe_needs_neither_data_nor_weights(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mlip(monkeypatch, "mlip.yaml", "--batch-size", "4", "--rounds", "3", "--json") == 0
    result = printed(capsys)
    assert result["target"] == "recipe mlip, random weights"
    assert result["caption_tokens"] == 16
    assert result["caption_tokens_from"] == "the context length; data/colors is not there"
    assert result["tokens_per_block"] == [16, 11, 8, 8]
    assert result["merging"] == {"method": "guided", "rate": 0.5, "before_blocks": [2, 3]}
    total = result["parameters"].pop("total")
    assert total == sum(result["parameters"].values())
    flops = result["gflops"]
    assert flops["image_tower"] == pytest.approx(sum(flops["image_tower_by_part"].values()))
    assert flops["image_tower"] < flops["image_tower_unmerged"]
    assert flops["frequency_branch"] > 0
    assert [s["part"] for s in result["speed"]] == [
        "image tower, rate 0",
        "image tower, rate 0.50",
        "text tower",
        "training step",
    ]
    for line in result["speed"]:
        assert line["per_s"] == pytest.approx(4 / line["median_s"])
        assert len(line["seconds"]) == 3
    assert result["peak_memory"]["gib"] > 0


def test_a_plain_clip_has_no_rows_for_what_it_lacks(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mlip(monkeypatch, "clip.yaml", "--batch-size", "2", "--rounds", "3") == 0
    out = capsys.readouterr().out
    assert "GFLOPs an image  rate 0\n" in out
    assert "frequency" not in out
    assert "patch tokens in each block: 16 16 16 16\n" in out
    assert "on cpu, " in out


def test_the_newest_run_with_captions_as_its_data_has_them(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_dataset(Path("data/colors"), n=20)
    assert mlip(monkeypatch, "--batch-size", "2", "--rounds", "3", "--json") == 0
    result = printed(capsys)
    assert result["target"] == "small, step 8"
    assert result["caption_tokens"] == 8
    assert result["caption_tokens_from"] == "batches of data/colors"


def test_captions_are_as_wide_as_in_typical_batches(place: Path) -> None:
    text = {"width": 32, "depth": 2, "num_heads": 2, "context_length": 77}
    recipe = small_recipe(data={"train": "data/long"}, model={"text": text})
    make_dataset(Path("data/long"), n=16, captions=["a short one", "of " * 18])  # 20 tokens, in nearly every batch of 8
    assert profile.caption_length(recipe) == (24, "batches of data/long")


def test_timed_training_steps_make_gradients_and_leave_the_weights_alone(place: Path) -> None:
    subject = profile.load_subject("mlip.yaml", "cpu")
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    gradients: dict[str, bool] = {}
    for name, parameter in subject.model.named_parameters():
        parameter.register_hook(lambda grad, name=name: gradients.update({name: bool(grad.abs().sum() > 0)}))
    profile.training_step(subject, profile.random_batch(subject, batch_size=4, num_tokens=9))()
    after = subject.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {f"log_scales.{name}" for name in LOSS_NAMES} <= gradients.keys()
    assert sum(gradients.values()) > 0.9 * len(list(subject.model.parameters()))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("runs/smal", "runs/smal: no such file and no shipped recipe; shipped: cc12m, "),
        ("openmojy", "openmojy: no such file and no shipped recipe; did you mean openmoji? shipped: "),
        ("empty", "empty: "),
    ],
)
def test_what_is_not_there(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], target: str, message: str
) -> None:
    Path("empty").mkdir()
    assert mlip(monkeypatch, target) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mlip(monkeypatch, "mlip.yaml", "--device", "cuda") == 2
    assert capsys.readouterr().err == "error: device cuda: PyTorch sees none; use cpu, and ask mlip doctor why\n"
