"""The precision of evaluations: the number types of their products, and results that are kept apart by it."""

import json
import logging
import shutil
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import make_run, small_model, small_recipe
from safetensors.torch import load_file
from shards_for_tests import make_dataset
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mlip_cli
from mlip_cli import cli
from mlip_cli.commands import dry_run, training
from mlip_cli.data.tokenizer import Tokenizer
from mlip_cli.devices import has_units_for_bf16, pick_device
from mlip_cli.errors import UsageError
from mlip_cli.evaluate import stored
from mlip_cli.evaluate.average_results import AverageResult
from mlip_cli.evaluate.evaluators import training_evaluators
from mlip_cli.evaluate.results import SweepResult, ZeroshotResult
from mlip_cli.evaluate.validation import tokenize, validation_pairs
from mlip_cli.files import write_json
from mlip_cli.recipe.config import CheckpointEvery, Recipe
from mlip_cli.recipe.load import recipe_yaml
from mlip_cli.runs.checkpoint import WEIGHTS
from mlip_cli.runs.folder import Run, evaluation_precision
from mlip_cli.runs.loading import load_run
from mlip_cli.terminal.endings import exit_code
from mlip_cli.terminal.output import logger
from mlip_cli.train import setup
from mlip_cli.train.gradients import Precision
from mlip_cli.train.optim import build_optimizer
from mlip_cli.train.state import Training

CPU = torch.device("cpu")
COLORS = "shards:data/colors"
SETTINGS = ("--batch-size", "8", "--device", "cpu", "--json")
OF_TOWERS = ("convolution", "addmm", "_scaled_dot_product")
"""Patches, linear maps with a bias, and attention: only towers have these. Merging compares tokens in fp32."""


class Products(TorchDispatchMode):
    """Notes the number types that go into products of matrices and convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, torch.dtype]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "mm" or name.startswith(OF_TOWERS):
            self.seen |= {(name, own.dtype) for own in args if isinstance(own, Tensor) and own.is_floating_point()}
        return func(*args, **(kwargs or {}))

    @property
    def of_towers(self) -> set[torch.dtype]:
        """The types of products that only the towers have; there are some of every kind."""
        names = {name for name, _ in self.seen}
        assert all(any(name.startswith(kind) for name in names) for kind in ("convolution", "addmm")), names
        return {dtype for name, dtype in self.seen if name != "mm"}


def trained_in(precision: str) -> Recipe:
    recipe = small_recipe(evaluate={"zeroshot": [COLORS]}, data={"validation": ["data/colors"]})
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": precision})})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs, the first trained in bf16, and a data set."""
    folder = tmp_path_factory.mktemp("precision")
    make_dataset(folder / "data" / "colors", n=24)
    make_run(folder / "runs" / "half", trained_in("bf16"))
    make_run(folder / "runs" / "other", trained_in("bf16"), seed=1)
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to write into, as the current folder."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(made, tmp_path, dirs_exist_ok=True)


def mlip(command: str, *arguments: str) -> dict[str, Any]:
    """The JSON that a command prints."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out:
        patch.setattr(sys, "argv", ["mlip", command, *arguments, *SETTINGS])
        assert exit_code(cli.app) == 0
    found: dict[str, Any] = json.loads(out.getvalue())
    return found


def sweep(*arguments: str) -> dict[str, Any]:
    return mlip("merge-sweep", "runs/half", "--rates", "0.5", "--rounds", "5", "--pictures", "1", *arguments)


def evaluate(*arguments: str) -> dict[str, Any]:
    [result] = mlip("eval-zeroshot", "runs/half", *arguments)["results"]
    return result


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "dtype"), [((), torch.float32), (("--precision", "bf16"), torch.bfloat16)])
def test_towers_multiply_in_the_precision_and_features_are_compared_in_fp32(
    place: Path, asked: tuple[str, ...], dtype: torch.dtype
) -> None:
    for measured in (sweep, evaluate):
        with Products() as products:
            measured(*asked)
        assert products.of_towers == {dtype}
        assert ("mm", torch.float32) in products.seen


def test_evaluations_during_training_multiply_as_the_training_does(place: Path) -> None:
    recipe = trained_in("bf16")
    model, tokenizer = small_model(recipe, dtype=torch.float32), Tokenizer.of(recipe.model.text)
    training = Training(model, build_optimizer(model, recipe.optim), Precision.named("bf16", CPU), CPU)
    pairs = validation_pairs(recipe, tokenizer, device=CPU)
    for evaluator in training_evaluators(recipe, tokenizer, pairs):
        with Products() as products, torch.no_grad(), training.as_measured() as encoder:
            evaluator.measure(encoder, lambda _: None)
        assert products.of_towers == {torch.bfloat16}
        assert ("mm", torch.float32) in products.seen


def test_a_result_in_another_precision_is_another_result(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, folder = evaluate(), place / "runs/half/evals"
    assert first["precision"] == "fp32"
    half = evaluate("--precision", "bf16")
    assert half["precision"] == "bf16"
    assert half["images_per_s"] != first["images_per_s"], "the stored one"
    assert {ZeroshotResult.read(path).precision for path in folder.glob("shards*.json")} == {"fp32", "bf16"}
    monkeypatch.setattr(stored, "_load", lambda _: pytest.fail("measured"))
    assert evaluate() == first
    assert evaluate("--precision", "bf16") == half


@pytest.mark.parametrize(("device_type", "is_reused"), [("cpu", True), ("cuda", False)])
def test_a_result_without_its_precision_was_measured_in_fp32(place: Path, device_type: str, is_reused: bool) -> None:
    """On CUDA a run that was trained in bf16 is evaluated in bf16 today."""
    first = evaluate()
    [path] = (place / "runs/half/evals").glob("shards*.json")
    value = json.loads(path.read_text())
    del value["precision"]
    path.write_text(json.dumps(value | {"device_type": device_type}))
    assert (evaluate()["images_per_s"] == first["images_per_s"]) is is_reused


def test_averages_are_kept_apart_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    average = ("runs/half", "runs/other", "--weights", "0,1", "--dataset", COLORS)
    first, half = mlip("average", *average), mlip("average", *average, "--precision", "bf16")
    assert (first["precision"], half["precision"]) == ("fp32", "bf16")
    results = [AverageResult.read(path) for path in (place / "runs/other/evals").glob("average-*.json")]
    assert {own.precision for own in results} == {"fp32", "bf16"}
    monkeypatch.setattr("mlip_cli.evaluate.stored_averages.Averages._open", lambda _: pytest.fail("measured"))
    assert mlip("average", *average) == first
    assert mlip("average", *average, "--precision", "bf16") == half


@pytest.mark.slow
def test_a_sweep_in_another_precision_stands_beside_the_first(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = [sweep(), sweep("--precision", "bf16")]
    assert [own["precision"] for own in results] == ["fp32", "bf16"]
    names = ["merge_sweep_step_0000008.json", "merge_sweep_step_0000008_bf16.json"]
    kept = [SweepResult.read(place / "runs/half/evals" / name).to_json() for name in names]
    assert kept == results
    page = (place / "runs/half/report.html").read_text("utf-8")
    assert "batch of 8, bf16, on cpu" in page
    assert results[0]["datasets"][0]["points"][0]["acc1"] == pytest.approx(evaluate("--merge-rate", "0")["acc1"])


def test_vectors_of_another_precision_are_others(place: Path) -> None:
    def search(*arguments: str) -> dict[str, Any]:
        return mlip("search", "runs/half", "red", "--images", "data/colors", *arguments)

    found = [search(), search("--precision", "bf16"), search()]
    assert [own["precision"] for own in found] == ["fp32", "bf16", "fp32"]
    assert [own["num_encoded"] for own in found] == [24, 24, 0]
    cosines = [[match["cosine"] for match in own["queries"][0]["found"]] for own in found]
    assert cosines[1] != cosines[0] == cosines[2]
    assert cosines[1] == pytest.approx(cosines[0], abs=0.02)


def test_a_loaded_model_encodes_in_the_precision_and_gives_fp32(place: Path) -> None:
    texts = ["a red disc", "a blue bar"]
    usual, full, half = (mlip_cli.load("runs/half", "cpu", precision=own) for own in (None, "fp32", "bf16"))
    assert (usual.precision, full.precision, half.precision) == ("fp32", "fp32", "bf16")
    assert torch.equal(usual.encode_text(texts), full.encode_text(texts))
    found = half.encode_text(texts)
    assert found.dtype == torch.float32
    assert not torch.equal(found, full.encode_text(texts))
    torch.testing.assert_close(found, full.encode_text(texts), atol=0.02, rtol=0)


def test_texts_have_few_lengths_on_cuda_and_the_same_features() -> None:
    model, tokenizer = small_model(), Tokenizer(16)
    lengths = {}
    for number in range(1, 14):
        texts = [" ".join(["red"] * number)]
        ids = {own: tokenize(tokenizer, torch.device(own), texts) for own in ("cpu", "cuda")}
        lengths[number] = [tokens.shape[1] for tokens in ids.values()]
        with torch.no_grad():
            features = [model.encode_text(own) for own in ids.values()]
        torch.testing.assert_close(*features, atol=1e-12, rtol=0)
    assert lengths == {n: [n + 2, 8 if n + 2 <= 8 else 16] for n in range(1, 14)}


def test_the_usual_precision_is_that_of_the_training_on_cuda_alone() -> None:
    assert [evaluation_precision(trained_in("bf16"), own) for own in ("cuda", "mps", "cpu")] == ["bf16", "fp32", "fp32"]


def test_half_precision_without_cuda_is_refused(place: Path) -> None:
    with pytest.raises(
        UsageError, match=r"^precision fp16: needs CUDA, and the device is cpu here; take bf16 or fp32$"
    ):
        load_run("runs/half", device="cpu", precision="fp16")


@pytest.mark.parametrize(
    ("capabilities", "has_units"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_f": True}, False),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True}, True),
        ({"architecture": "x86_64", "amx_bf16": True}, True),
        ({"architecture": "aarch64", "neon": True, "bf16": True}, True),
    ],
)
def test_a_cpu_has_units_for_bf16_if_its_capabilities_say_so(
    capabilities: dict[str, str | bool], has_units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert has_units_for_bf16(CPU) == has_units
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not has_units_for_bf16(CPU)


@pytest.mark.slow
@pytest.mark.parametrize(("has_units", "begun"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_what_the_device_is_fast_in_and_stays_so_on_another_machine(
    place: Path,
    has_units: bool,
    begun: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = small_recipe(train="data/colors").in_precision("auto")
    every = recipe.train.model_copy(update={"checkpoint_every": CheckpointEvery(steps=4)})
    (place / "auto.yaml").write_text(recipe_yaml(recipe.model_copy(update={"train": every})))
    run = Run(place / "runs" / "auto")
    caplog.set_level(logging.INFO, logger.name)

    def train(*, has_units: bool, resume: bool) -> str:
        for module in (training, setup):
            monkeypatch.setattr(module, "has_units_for_bf16", lambda device: has_units)
        before, resumed = (run.log.read_text(), ["--resume"]) if resume else ("", [])
        monkeypatch.setattr(sys, "argv", ["mlip", "pretrain", "auto.yaml", "--out", "runs/auto", *resumed])
        assert exit_code(cli.app) == 0
        return run.log.read_text().removeprefix(before)

    said = train(has_units=has_units, resume=False)
    assert f"loader process each, {begun}" in said
    assert "no units" not in said
    weights = load_file(run.checkpoints / "step_0000008" / WEIGHTS)

    shutil.rmtree(run.checkpoints / "step_0000008")
    write_json(run.stamp, json.loads(run.stamp.read_text()) | {"end_reason": "stopped"})
    monkeypatch.setattr(dry_run, "has_units_for_bf16", lambda device: not has_units)
    monkeypatch.setattr(sys, "argv", ["mlip", "pretrain", "auto.yaml", "--out", "runs/auto", "--resume", "--dry-run"])
    capsys.readouterr()
    assert exit_code(cli.app) == 0
    assert f"loader process each, {begun}" in capsys.readouterr().out
    said = train(has_units=not has_units, resume=True)
    assert f"loader process each, {begun}" in said
    assert ("train.precision bf16: the device, cpu, has no units for it" in said) == (begun == "bf16")
    assert run.read_recipe().train.precision == begun
    for name, again in load_file(run.checkpoints / "step_0000008" / WEIGHTS).items():
        assert again.equal(weights[name])


@pytest.fixture
def settings_of_fp32() -> Iterator[None]:
    """The settings of the process, put back."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    yield
    torch.backends.cudnn.allow_tf32 = before[0]
    torch.set_float32_matmul_precision(before[1])


def test_convolutions_and_products_have_one_precision_in_fp32(settings_of_fp32: None) -> None:
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    pick_device("cpu")
    assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == (False, "highest")
    assert not torch.backends.cuda.matmul.allow_tf32
