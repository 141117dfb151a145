"""`mlip profile` on small real models, with and without data."""

import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import make_run, small_recipe
from shards_for_tests import make_dataset

from mlip_cli import __version__, cli
from mlip_cli.commands import profile
from mlip_cli.devices import pick_device
from mlip_cli.errors import RunError, Stopped, UsageError
from mlip_cli.model.clip import CLIP
from mlip_cli.profiling import measures
from mlip_cli.profiling import subject as profile_subject
from mlip_cli.profiling.measures import extra_share
from mlip_cli.profiling.result import ProfileResult
from mlip_cli.profiling.step import RepeatedStep
from mlip_cli.profiling.timing import Timing
from mlip_cli.recipe.config import Recipe
from mlip_cli.recipe.load import recipe_yaml
from mlip_cli.report import profiles
from mlip_cli.terminal.endings import exit_code
from mlip_cli.train.noise import noise_batch

CPU = torch.device("cpu")
LOSSES = ("spatial_global", "spatial_token", "frequency_global", "frequency_token")
SMALL_DATA = {"train": "data/colors", "num_workers": 2}


def write_recipe(path: str, recipe: Recipe) -> None:
    Path(path).write_text(recipe_yaml(recipe))


def by_micro_batches(size: int) -> Recipe:
    recipe = small_recipe()
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"micro_batch_size": size})})


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a recipe of an MLIP and a run of it."""
    monkeypatch.chdir(tmp_path)
    recipe = small_recipe(data={"train": "data/colors"})
    write_recipe("mlip.yaml", recipe)
    make_run(Path("runs/small"), recipe)
    return tmp_path


def mlip(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mlip", "profile", *arguments])
        return exit_code(cli.app)


def profile_json(*arguments: str, batch_size: int) -> dict[str, Any]:
    """What `mlip profile` prints as JSON."""
    with redirect_stdout(StringIO()) as out:
        assert mlip(*arguments, "--batch-size", str(batch_size), "--rounds", "5", "--json") == 0
    result: dict[str, Any] = json.loads(out.getvalue())
    return result


@dataclass(frozen=True)
class ProfiledRun:
    """A run with data, profiled once for all tests that only look."""

    folder: Path
    before: dict[Path, bytes]
    """Its files before."""
    result: dict[str, Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProfiledRun]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("run"))
        folder = Path("runs/small").absolute()
        make_run(folder, small_recipe(data=SMALL_DATA))
        make_dataset(Path("data/colors"), n=20)
        before = files_of(folder)
        result = profile_json("runs/small/checkpoints/step_0000008", batch_size=4)
        yield ProfiledRun(folder, before, result)


@pytest.fixture(scope="module")
def from_recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result for an MLIP recipe with micro-batches, without data and without weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("recipe"))
        write_recipe("mlip.yaml", by_micro_batches(3))
        result = profile_json("mlip.yaml", batch_size=4)
        assert not list(Path().glob("**/profile_*.json"))
    return result


@pytest.fixture(scope="module")
def plain_clip(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result for a plain CLIP recipe."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("clip"))
        write_recipe("clip.yaml", small_recipe(mlip=False))
        return profile_json("clip.yaml", batch_size=2)


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_recipe_needs_neither_data_nor_weights(from_recipe: dict[str, Any]) -> None:
    result = from_recipe
    assert result["target"] == "recipe mlip, random weights"
    assert result["caption_tokens"] == 16
    assert result["caption_tokens_from"] == "the context length, without data"
    assert result["tokens_per_block"] == [16, 11, 8, 8]
    assert result["merging"] == {"method": "guided", "rate": 0.5, "before_blocks": [2, 3]}
    assert result["parameters"]["total"] == sum(n for part, n in result["parameters"].items() if part != "total")
    flops = result["gflops"]
    assert flops["image_tower"] == pytest.approx(sum(flops["image_tower_by_part"].values()))
    assert flops["image_tower"] < flops["image_tower_unmerged"]
    assert flops["frequency_branch"] > 0
    assert result["peak_memory"]["gib"] > 0
    assert result["data"] is None
    assert result["limit"]["why"].endswith("of the step; there is no data to compare with")
    assert [row["part"] for row in result["breakdown"] if row["group"] == "data"] == ["copy to the device"]
    assert result["step"] is None


@pytest.mark.slow
def test_towers_and_pieces_of_the_step_are_timed_alone(from_recipe: dict[str, Any]) -> None:
    assert [line["part"] for line in from_recipe["speed"]] == [
        "image tower, rate 0",
        "image tower, rate 0.50",
        "text tower",
        "training forward",
        "training forward and backward",
        "optimizer",
        "training step",
    ]
    for line in from_recipe["speed"]:
        assert line["per_s"] == pytest.approx(4 / line["median_s"])
        assert len(line["seconds"]) == 5


@pytest.mark.slow
def test_parts_add_up_to_the_step(run: ProfiledRun) -> None:
    result = run.result
    inside = [row for row in result["breakdown"] if row["in_step"]]
    left = result["unaccounted"]
    assert sum(row["seconds"] for row in inside) + left["seconds"] == pytest.approx(result["whole_s"])
    assert sum(row["share"] for row in inside) + left["share"] == pytest.approx(1)
    assert {row["group"] for row in inside} == {"data", "forward", "losses", "backward", "optimizer"}
    assert {row["part"] for row in inside if row["group"] == "losses"} == {*LOSSES, "shared by all losses"}
    assert 0 < left["outside_s"] < result["whole_s"]
    assert result["clocks_cost"] > -1
    assert result["limit"].keys() == {"part", "why"}


@pytest.mark.slow
def test_a_plain_clip_has_no_rows_for_missing_parts(
    plain_clip: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    profiles.print_profile(ProfileResult.from_json(plain_clip))
    out = capsys.readouterr().out
    assert "GFLOPs an image  rate 0\n" in out
    assert "frequency" not in out
    assert "merging  " not in out.split("part of a training step")[1]
    assert "image tower, blocks 1-4 " in out
    assert "patch tokens in each block: 4 x 16\n" in out
    assert "on cpu, " in out


@pytest.mark.slow
def test_captions_are_as_wide_as_in_typical_batches(run: ProfiledRun, place: Path) -> None:
    assert run.result["caption_tokens"] == run.result["caption_tokens_in_step"] == 8
    assert run.result["caption_tokens_from"] == "batches of data/colors"
    text = {"width": 32, "depth": 2, "num_heads": 2, "context_length": 77}
    recipe = small_recipe(data={"train": "data/long"}, model={"text": text})
    make_dataset(Path("data/long"), n=16, captions=["a short one", "of " * 18])  # 20 tokens, in nearly every batch of 8
    datasets = profile_subject.training_data(recipe)
    assert profile_subject.caption_length(recipe, datasets) == (24, "batches of data/long")
    lengths = profile_subject.caption_lengths(recipe, datasets, num_captions=30, width=24)
    assert lengths is not None
    assert len(lengths) == 30
    assert set(lengths) == {5, 20}
    assert profile_subject.caption_lengths(recipe, [], num_captions=30, width=24) is None
    batch = noise_batch(recipe, batch_size=30, num_tokens=24, device=CPU, lengths=lengths)
    assert batch.text_lengths == lengths == tuple((batch.token_ids.argmax(1) + 1).tolist())
    assert [int(row.count_nonzero()) for row in batch.token_ids] == [*lengths]


@pytest.mark.parametrize(("is_open", "words"), [(True, "reading and decoding are not"), (False, "no data, so reading")])
def test_damaged_data_is_named_and_not_timed(
    place: Path, caplog: pytest.LogCaptureFixture, is_open: bool, words: str
) -> None:
    folder = make_dataset(Path("data/colors"), n=20)
    for path in folder.glob("*.tar" if is_open else "*.idx"):
        path.write_bytes(bytes(path.stat().st_size if is_open else 40))
    recipe = small_recipe(data=SMALL_DATA)
    with caplog.at_level("INFO", logger="mlip_cli"):
        datasets = profile_subject.training_data(recipe)
        assert bool(datasets) is is_open
        assert measures.loader_facts(recipe, datasets, ranks=1) is None
    assert [line for line in caplog.messages if line.startswith(words)], caplog.messages


def test_ranks_share_the_cores_of_the_machine(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(Path("data/colors"), n=20)
    recipe = small_recipe(data={"train": "data/colors"})
    datasets = profile_subject.training_data(recipe)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert [measures.ranks_of(torch.device(own)) for own in ("cuda", "cpu")] == [8, 1]
    facts = measures.loader_facts(recipe, datasets, ranks=8)
    assert facts is not None
    assert (facts.ranks, facts.loader_processes) == (8, 7)
    assert facts.loader_images_per_s == pytest.approx(7 / sum(facts.sample_seconds.values()))
    alone = measures.loader_facts(recipe, datasets, ranks=1)
    assert alone is not None
    assert alone.loader_processes == 63


def test_precision_and_compiling_may_differ_from_the_recipe(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[CLIP] = []
    monkeypatch.setattr(profile_subject, "Compiled", lambda fixed, varying: compiled.append([*fixed, *varying]))
    usual = profile_subject.load_profiled("mlip.yaml", "cpu")
    assert (usual.recipe.train.precision, usual.is_compiled, compiled) == ("fp32", False, [])
    asked = profile_subject.load_profiled("runs/small", "cpu", precision="bf16", is_compiled=True)
    assert (asked.recipe.train.precision, asked.is_compiled, compiled) == ("bf16", True, [asked.model.blocks()])
    with pytest.raises(UsageError, match="precision fp16: needs CUDA"):
        profile_subject.load_profiled("mlip.yaml", "cpu", precision="fp16")
    recipe = small_recipe()
    train = recipe.train.model_copy(update={"compile": True})
    write_recipe("compiled.yaml", recipe.model_copy(update={"train": train}))
    assert profile_subject.load_profiled("compiled.yaml", "cpu").is_compiled
    assert not profile_subject.load_profiled("compiled.yaml", "cpu", is_compiled=False).is_compiled


def test_compiling_without_a_compiler_names_the_option(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError) as error:
        profile_subject.load_profiled("mlip.yaml", "cpu", is_compiled=True)
    assert str(error.value) == (
        "compiling the blocks: needs a C++ compiler, no-such-compiler; apt install g++, or add --no-compile"
    )


@pytest.mark.slow
def test_a_run_keeps_its_profile_and_is_not_changed(run: ProfiledRun) -> None:
    assert run.result["target"] == "small, step 8"
    kept = run.folder / "evals" / "profile_step_0000008.json"
    assert json.loads(kept.read_text()) == run.result
    assert {"kind": "profile", "mlip_version": __version__, "step": 8}.items() <= run.result.items()
    assert run.result["measured_at"].endswith("+00:00")
    after = files_of(run.folder)
    assert after.keys() - run.before.keys() == {
        kept,
        run.folder / "report.html",
        run.folder / "pictures" / "profile.svg",
    }
    assert all(after[path] == content for path, content in run.before.items())


def test_loader_processes_share_the_work_beside_the_step(run: ProfiledRun) -> None:
    cost = run.result["data"]["sample_seconds"]
    assert list(cost) == ["read", "decode", "transform", "tokenize and collate"]
    rows = run.result["breakdown"][:4]
    assert [row["part"] for row in rows] == list(cost)
    assert all(row["seconds"] == pytest.approx(4 / 2 * cost[row["part"]]) for row in rows)
    assert {row["in_step"] for row in rows} == {False}
    assert run.result["data"]["loader_processes"] == 2
    assert run.result["data"]["loader_images_per_s"] == pytest.approx(2 / sum(cost.values()))


@pytest.mark.slow
def test_utilisation_equals_a_count_by_hand(plain_clip: dict[str, Any]) -> None:
    result = plain_clip
    patches, tokens, words, width, joint = 16, 17, 16, 32, 16
    image = patches * 3 * 8 * 8 * width + 4 * (tokens * 12 * width**2 + 2 * tokens**2 * width) + width * joint
    text = 2 * (words * 12 * width**2 + 2 * words**2 * width) + width * joint
    flops = 3 * 2 * 2 * (image + text)  # forward and twice as much backward, a batch of 2, 2 an addition and a product
    assert result["step_gflops"] == pytest.approx(flops / 1e9)
    [step] = [line for line in result["speed"] if line["part"] == "training step"]
    assert result["step_tflops"] == pytest.approx(flops / 1e12 / step["median_s"])
    [product] = result["matmul"]
    n = product["shape"][0]
    assert product["precision"] == "fp32"
    assert product["shape"] == [n, n, n]
    assert result["matmul_peak_tflops"] == pytest.approx(2 * n**3 / 1e12 / product["median_s"])
    assert result["mfu"] == pytest.approx(result["step_tflops"] / result["matmul_peak_tflops"])


@pytest.mark.slow
def test_micro_batches_smaller_than_the_batch_are_taken_as_in_training(
    from_recipe: dict[str, Any], plain_clip: dict[str, Any]
) -> None:
    for result, size in ((from_recipe, 3), (plain_clip, None)):
        assert result["micro_batch_size"] == size
        first_pass = [row for row in result["breakdown"] if row["part"] == "forward without graph"]
        assert len(first_pass) == (1 if size else 0)


def test_micro_batches_as_large_as_the_batch_are_measured_at_once(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_recipe("micro.yaml", by_micro_batches(4))
    profiled = profile_subject.load_profiled("micro.yaml", "cpu")
    batch = noise_batch(profiled.recipe, batch_size=4, num_tokens=9, device=CPU)
    with caplog.at_level("INFO", logger="mlip_cli"):
        assert measures.repeated_step(profiled, batch).micro_batch_size is None
    assert caplog.messages == [
        "the recipe's micro-batches of 4 are no smaller than this batch of 4, so it is measured at once"
    ]


def test_what_the_clocks_cost_is_compared_inside_rounds() -> None:
    def timing(*seconds: float) -> Timing:
        return Timing(seconds=seconds, median_s=0.0, speedup=1.0, speedup_interval=(1.0, 1.0))

    assert extra_share(timing(1.1, 11, 2.2, 3.3, 9), timing(1, 10, 2, 3, 1)) == pytest.approx(0.1)


class Stdout:
    """Where tables go, with an encoding."""

    def __init__(self, encoding: str) -> None:
        self.encoding = encoding


@pytest.mark.parametrize(
    ("encoding", "share", "bar"),
    [
        ("utf-8", 1.0, 24 * "█"),
        ("UTF8", 0.5, 12 * "█"),
        ("utf-8", 0.25 + 0.5 / 24, 6 * "█" + "▌"),
        ("utf-8", 3.0, 24 * "█"),
        ("utf-8", -0.1, ""),
        ("ascii", 0.5, 12 * "#"),
        ("iso8859-1", 0.01, ""),
    ],
)
def test_bars_are_of_characters_that_stdout_knows(
    monkeypatch: pytest.MonkeyPatch, encoding: str, share: float, bar: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Stdout(encoding))
        assert profiles.bar(share) == bar


@pytest.mark.slow
def test_tables_of_the_newest_run_fit_80_columns(
    place: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    make_dataset(Path("data/colors"), n=20)
    with caplog.at_level("INFO", logger="mlip_cli"):
        assert mlip("--batch-size", "2", "--rounds", "5") == 0
    said = "small, step 8: timing 5 rounds; the model gets random pictures and words, the loader real ones"
    assert said in caplog.messages
    tables, found, _ = capsys.readouterr().out.partition("\nlimit: ")
    assert found
    lines = tables.splitlines()
    assert max(map(len, lines)) <= 80, max(lines, key=len)
    assert any(line.startswith("unaccounted ") for line in lines)


def test_timed_training_steps_make_gradients_and_leave_the_weights_alone(place: Path) -> None:
    profiled = profile_subject.load_profiled("mlip.yaml", "cpu")
    before = {name: value.clone() for name, value in profiled.model.state_dict().items()}
    gradients: dict[str, bool] = {}
    for name, parameter in profiled.model.named_parameters():
        parameter.register_hook(lambda grad, name=name: gradients.update({name: bool(grad.abs().sum() > 0)}))
    batch = noise_batch(profiled.recipe, batch_size=4, num_tokens=9, device=CPU)
    RepeatedStep(profiled.model.train(), profiled.recipe, batch, profiled.device)()
    after = profiled.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {f"log_scales.{name}" for name in profiled.model.log_scales} <= gradients.keys()
    assert sum(gradients.values()) > 0.9 * len(list(profiled.model.parameters()))


def test_ctrl_c_says_that_nothing_was_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(measures, "speeds_of_towers", interrupted)
    with pytest.raises(Stopped, match=r"^interrupted; nothing was written$"):
        profile.profile("runs/small", batch_size=2, rounds=5, device="cpu", as_json=True)
    assert not Path("runs/small/evals").exists()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("runs/smal", "runs/smal: no such file and no shipped recipe; shipped: baselines/clip, "),
        ("openmojy", "openmojy: no such file and no shipped recipe; did you mean openmoji? shipped: "),
        ("empty", "empty: "),
    ],
)
def test_what_is_not_there(place: Path, capsys: pytest.CaptureFixture[str], target: str, message: str) -> None:
    Path("empty").mkdir()
    assert mlip(target) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}")
    assert said.endswith("; no run lies there either: the newest in runs/: small\n") == (target != "empty")


def test_a_batch_that_does_not_fit(place: Path) -> None:
    too_many = 10**12  # more than the command line takes
    with pytest.raises(RunError) as error:
        profile.profile("mlip.yaml", batch_size=too_many, rounds=5, device="cpu", as_json=False)
    assert str(error.value) == (
        "--batch-size: the device has no memory for 1,000,000,000,000 samples at once; "
        "set it to 500,000,000,000 or less"
    )


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("auto") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UsageError, match=r"^device cuda: this machine has 2 GPUs and no GPU for its rank 2; start 2$"):
        pick_device("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mlip("mlip.yaml", "--device", "cuda") == 2
    assert capsys.readouterr().err == "error: device cuda: PyTorch does not see one; use cpu, and ask mlip doctor why\n"
