"""`mlip average`: exact sums of weights, measured once, and written as a run that every command reads."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import make_run, small_recipe
from pages_for_tests import without_curves
from PIL import Image
from shards_for_tests import make_dataset
from torch import Tensor
from typer.testing import CliRunner

from mlip_cli.cli import app
from mlip_cli.commands.average import average
from mlip_cli.commands.eval_zeroshot import eval_zeroshot
from mlip_cli.commands.pretrain import pretrain
from mlip_cli.errors import RunError, UsageError
from mlip_cli.evaluate import stored_averages
from mlip_cli.evaluate.average_results import AnsweredPoint, AveragedData, AverageResult, best_point
from mlip_cli.runs.average import AveragedEncoder, averaged, check_same_tensors, load_mixture
from mlip_cli.runs.checkpoint import load_weights, save_checkpoint
from mlip_cli.runs.find import find_checkpoint
from mlip_cli.runs.folder import ORIGIN, STATE, Run, newest_run, whole_checkpoints
from mlip_cli.runs.loading import load_run

SETS = ["folder:classes", "folder:others"]


def random_weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    floats = {name: torch.randn(50, 20, generator=generator) for name in ("a", "b")}
    return floats | {"steps": torch.tensor([3, 4]), "same": torch.linspace(-1, 1, 99), "zero": torch.tensor([-0.0])}


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor


def test_the_ends_are_the_runs_to_the_bit_and_shared_tensors_stay() -> None:
    start, tuned = random_weights(0), random_weights(1)
    for point, expected in (((1.0, 0.0), start), ((0.0, 1.0), tuned)):
        found = averaged([start, tuned], point)
        assert all(torch.equal(bits(found[name]), bits(expected[name])) for name in expected)
        assert all(found[name].data_ptr() != expected[name].data_ptr() for name in expected)
    for share in (0.1, 0.3, 0.7):
        found = averaged([start, tuned], (1 - share, share))
        assert torch.equal(found["same"], start["same"])
        assert torch.equal(found["steps"], start["steps"])


def test_averages_are_those_of_double_precision() -> None:
    runs = [random_weights(seed) for seed in range(4)]
    for shares in ((0.7, 0.3, 0.0, 0.0), (0.25,) * 4):
        found = averaged(runs, shares)
        for name in ("a", "b"):
            expected = sum(share * own[name].double() for share, own in zip(shares, runs, strict=True))
            assert found[name].dtype == torch.float32
            torch.testing.assert_close(found[name].double(), expected, rtol=0, atol=5e-7)


def test_half_precision_is_averaged_in_fp32() -> None:
    small = {"a": torch.tensor([1.0], dtype=torch.float16)}, {"a": torch.tensor([1.001], dtype=torch.float16)}
    expected = (small[0]["a"].float() + small[1]["a"].float()) / 2
    assert torch.equal(averaged(small, (0.5, 0.5))["a"], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"a": torch.tensor([[float("nan")]])},
            "b: a is not finite: the weights are damaged; name an earlier checkpoint",
        ),
        ({"a": torch.zeros(50, 3)}, "b: a is 50 x 3, and 50 x 20 in a; average runs of one architecture"),
        (
            {"more": torch.zeros(1)},
            "b: other tensors than a: 1 are in one of them alone, such as more in b; average runs whose recipes have "
            "the same model and losses",
        ),
        (
            {"steps": torch.tensor([3, 5])},
            "b: steps holds whole numbers that differ from those in a, and whole numbers have no average; average runs "
            "that agree in them",
        ),
    ],
)  # fmt: skip
def test_weights_without_an_average_are_refused(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        check_same_tensors({"a": random_weights(0), "b": random_weights(1) | change})
    assert str(refused.value) == message


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs of one recipe, one of another width, and two data sets of class folders."""
    folder = tmp_path_factory.mktemp("averages")
    for number, classes in enumerate(("classes", "others")):
        for shade, name in enumerate(("red", "green", "blue")):
            (folder / classes / name).mkdir(parents=True)
            for place in range(8):
                colour = tuple((40 * place + 90 * (own == shade) + 13 * number) % 256 for own in range(3))
                Image.new("RGB", (32, 32), colour).save(folder / classes / name / f"{place}.png")
    data = make_dataset(folder / "train", n=24)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        recipe = small_recipe(
            mlip=False, train=str(data), data={"validation": str(data), "num_workers": 0}, evaluate={"zeroshot": SETS}
        )
        for seed, name in enumerate(("start", "tuned", "third")):
            make_run(folder / "runs" / name, recipe, seed=seed)
        wide = small_recipe(mlip=False, model={"embed_dim": 24})
        make_run(folder / "runs" / "wide", wide)
        make_run(folder / "runs" / "twin", recipe, seed=0)
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The runs and data sets in the current folder."""
    copied = shutil.copytree(made, tmp_path / "place")
    monkeypatch.chdir(copied)
    without_curves(monkeypatch)
    return copied


COMMON: dict[str, Any] = {"data_root": None, "batch_size": 5, "device": "cpu", "as_json": True}
NOTHING: dict[str, Any] = {"weights": None, "datasets": [], "choose": None, "out": None}


def call(*runs: str, **options: Any) -> None:
    average(list(runs), **COMMON | NOTHING | options)


def result_in(folder: str) -> AverageResult:
    [path] = Path(folder, "evals").glob("average-*.json")
    return AverageResult.read(path)


@pytest.mark.slow
def test_the_ends_answer_as_their_runs_and_nothing_is_measured_twice(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call("runs/start", "runs/tuned", weights=[0.5])
    first = json.loads(capsys.readouterr().out)
    options = {key: COMMON[key] for key in ("data_root", "batch_size", "device", "as_json")}
    eval_zeroshot(["runs/start", "runs/tuned"], datasets=SETS, merge_rates=[], task="zeroshot", **options)
    scores = json.loads(capsys.readouterr().out)["results"]
    for data in first["datasets"]:
        alone = [own["acc1"] for own in scores if own["dataset"] == data["dataset"]]
        assert [point["value"] for point in data["points"]][::2] == alone
        assert [point["coefficients"] for point in data["points"]] == [[1, 0], [0.5, 0.5], [0, 1]]

    opened = stored_averages.Averages._open
    asked: list[int] = []

    def counted(self: stored_averages.Averages) -> Any:
        asked.append(1)
        return opened(self)

    monkeypatch.setattr(stored_averages.Averages, "_open", counted)
    call("runs/start", "runs/tuned", weights=[0.5])
    assert json.loads(capsys.readouterr().out) == first
    assert asked == []
    call("runs/start", "runs/tuned", weights=[0.25, 0.5])
    more = json.loads(capsys.readouterr().out)["datasets"][0]["points"]
    assert len(asked) == 2  # one missing point on each of two data sets
    assert [point["coefficients"][1] for point in more] == [0, 0.25, 0.5, 1]
    assert [more[0], more[2], more[3]] == first["datasets"][0]["points"]
    for data in ("classes", "others"):
        Image.new("RGB", (32, 32)).save(Path(data, "red", "new.png"))
    call("runs/start", "runs/tuned", weights=[0.5])
    assert len(asked) == 4  # other data


@pytest.mark.slow
def test_an_encoder_of_an_average_is_the_written_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("runs/start", "runs/tuned", weights=[0.25], choose="0.25", out=Path("runs/mixed"))
    _, mixture = load_mixture({name: find_checkpoint(f"runs/{name}")[1] for name in ("start", "tuned")}, device="cpu")
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    encoders = {share: AveragedEncoder(mixture, (1 - share, share)) for share in (0.0, 0.25, 1.0)}
    for _ in range(2):  # they take turns
        for share, run in ((0.0, "start"), (0.25, "mixed"), (1.0, "tuned")):
            expected = load_run(f"runs/{run}", device="cpu").model
            texts = load_run(f"runs/{run}", device="cpu").tokenizer.encode(["a red disc", "a bar"])
            own = encoders[share]
            assert torch.equal(own.encode_image(images), expected.encode_image(images, expected.plan))
            assert torch.equal(own.encode_text(texts), expected.encode_text(texts))


@pytest.mark.slow
def test_every_command_reads_the_written_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mlip_cli.commands.merge_sweep import merge_sweep
    from mlip_cli.commands.profile import profile
    from mlip_cli.commands.report import report

    call("runs/start", "runs/tuned", weights=[0.5], choose="best:folder:others", out=Path("runs/mixed"))
    said = json.loads(capsys.readouterr().out)
    run, checkpoint = find_checkpoint("runs/mixed")
    assert (checkpoint / ORIGIN).is_file()
    assert not (checkpoint / STATE).exists()
    assert whole_checkpoints(run.checkpoints) == [checkpoint]
    assert newest_run().folder == run.folder
    origin = json.loads((checkpoint / ORIGIN).read_text())
    assert [own["coefficient"] for own in origin["runs"]] == said["chosen"]
    assert origin["kind"] == "average"
    assert (run.recipe.read_bytes(), run.read_stamp().end_reason) == (
        Path("runs/tuned/recipe.yaml").read_bytes(),
        "averaged",
    )
    weights = [load_weights(find_checkpoint(f"runs/{name}")[1]) for name in ("start", "tuned")]
    expected, found = averaged(weights, tuple(said["chosen"])), load_weights(checkpoint)
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    options = {"data_root": None, "device": "cpu", "as_json": True, "batch_size": 5}
    capsys.readouterr()
    eval_zeroshot(["runs/mixed"], datasets=SETS, merge_rates=[], task="zeroshot", **options)
    scores = {own["dataset"]: own["acc1"] for own in json.loads(capsys.readouterr().out)["results"]}
    for data in said["datasets"]:
        [point] = [own for own in data["points"] if own["coefficients"] == said["chosen"]]
        assert scores[data["dataset"]] == point["value"]
    merge_sweep("runs/mixed", rates=[0.3], methods=[], datasets=SETS[:1], rounds=5, num_pictures=0, **options)
    profile("runs/mixed", batch_size=2, rounds=5, device="cpu", as_json=True)
    capsys.readouterr()
    report(["runs/mixed"], out=None, as_json=True)
    page = (run.folder / "report.html").read_text()
    assert "No training in this folder." in page
    shares = [
        f"{share:.3g} of {name} at step 8" for share, name in zip(said["chosen"], ("start", "tuned"), strict=True)
    ]
    assert f"Its weights are an average: {', '.join(shares)}." in page
    assert "<h2>Averages of weights</h2>" in page
    assert (run.pictures / "average.svg").is_file()
    assert (Path("runs/tuned/pictures/average.svg")).is_file()
    recipe = "runs/tuned/recipe.yaml"
    whole: dict[str, Any] = {"dry_run": False, "as_json": True}
    pretrain(recipe, ["model.init=runs/mixed", "train.steps=1"], out=Path("runs/on"), resume=False, **whole)
    with pytest.raises(UsageError) as refused:
        pretrain(recipe, [], out=Path("runs/mixed"), resume=True, **whole)
    assert str(refused.value) == (
        "--resume runs/mixed: its weights were not trained here and have no optimiser state; start a new run from them "
        "with model.init=runs/mixed"
    )


@pytest.mark.slow
def test_a_resume_without_a_name_passes_an_average_over(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("runs/start", "runs/tuned", weights=[0.5], out=Path("runs/mixed"))
    for name in ("start", "tuned", "third", "twin", "wide"):
        shutil.rmtree(Path("runs", name))
    pretrain("runs/mixed/recipe.yaml", [], out=None, resume=True, dry_run=False, as_json=False)
    assert Path("runs", "latest").read_text().startswith("recipe-")


def test_weights_averaged_over_steps_are_the_ones_that_count(place: Path) -> None:
    run = Run(Path("runs/tuned"))
    raw = load_weights(find_checkpoint("runs/third")[1])
    over_steps = load_weights(find_checkpoint("runs/tuned")[1])
    shutil.rmtree(run.checkpoints)
    save_checkpoint(run.checkpoints, step=8, weights=over_steps, state={"step": 8}, training_weights=raw)
    call("runs/start", "runs/tuned", datasets=SETS[:1], weights=[], choose="1", out=Path("runs/mixed"))
    found = load_weights(find_checkpoint("runs/mixed")[1])
    assert all(torch.equal(found[name], over_steps[name]) for name in over_steps)


@pytest.mark.slow
def test_a_soup_is_measured_beside_its_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("runs/start", "runs/tuned", "runs/third", out=Path("runs/soup"))
    [data, _] = json.loads(capsys.readouterr().out)["datasets"]
    third = 1 / 3
    assert [point["coefficients"] for point in data["points"]] == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [third] * 3]
    weights = [load_weights(find_checkpoint(f"runs/{name}")[1]) for name in ("start", "tuned", "third")]
    found = load_weights(find_checkpoint("runs/soup")[1])
    for name in found:
        torch.testing.assert_close(found[name], sum(own[name] for own in weights) / 3)
    average(["runs/start", "runs/tuned", "runs/third"], **COMMON | NOTHING | {"as_json": False})
    table = capsys.readouterr().out
    assert re.search(r"^run +top-1 % +the soup beside it, points +p$", table, re.MULTILINE)
    assert "soup: the mean of the weights of start at step 8, tuned at step 8 and third at step 8" in table


@pytest.mark.slow
def test_the_validation_set_is_measured_both_ways(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("runs/start", "runs/tuned", datasets=["validation", "folder:classes"], weights=[])
    found = json.loads(capsys.readouterr().out)["datasets"]
    assert [(own["dataset"], own["measure"]) for own in found] == [
        ("validation", "image_to_text_r5"),
        ("validation", "text_to_image_r5"),
        ("folder:classes", "acc1"),
    ]
    charts = sorted(path.name for path in Path("runs/tuned/pictures").iterdir())
    assert charts == ["average.svg"]  # the classes against the first of the two ways


def test_a_data_set_that_fails_is_a_row_and_the_others_are_kept(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RunError) as failed:
        call("runs/start", "runs/tuned", datasets=["folder:gone", "folder:classes"], weights=[], as_json=False)
    assert str(failed.value).startswith("1 of 2 data sets could not be measured: folder:gone: ")
    assert "folder:gone: not evaluated" in capsys.readouterr().out
    assert [own.dataset for own in result_in("runs/tuned").datasets] == ["folder:classes"]


def test_the_best_point_is_the_nearest_to_the_start_among_equals() -> None:
    points = [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)]

    def data(*right: str) -> AveragedData:
        answered = [AnsweredPoint(coefficients=own, right=text) for own, text in zip(points, right, strict=True)]
        return AveragedData(dataset="d", fingerprint="f", measure="acc1", chance=0.5, points=answered)

    assert best_point([data("01", "11", "11")], points[::-1]) == (0.5, 0.5)
    assert best_point([data("10", "00", "00"), data("0000", "1110", "1111")], points) == (0.0, 1.0)


MISTAKES: list[tuple[list[str], dict[str, Any], str]] = [
    (["start"], {}, "average: name two runs or more, the start first: mlip average START TUNED"),
    (["start", "twin"], {}, "twin: the same weights as start; name each run once"),
    (["start", "gone"], {}, "runs/gone: no such run or checkpoint; the newest in runs/: twin, wide, third"),
    (["start", "tuned"], {"out": Path("runs/wide")}, "--out runs/wide: exists already; name another folder"),
    (["start", "tuned"], {"choose": "0.5"}, "--choose 0.5: says which average --out writes; add --out RUN"),
    (
        ["start", "tuned"],
        {"choose": "2", "out": Path("x")},
        "--choose 2: not a weight from 0 to 1 and not best:DATASET",
    ),
    (
        ["start", "tuned"],
        {"choose": "best:digits", "out": Path("x")},
        "--choose best:digits: not one of the data sets that are measured: folder:classes, folder:others",
    ),
    (
        ["start", "tuned", "third"],
        {"weights": [0.5]},
        "--weights: is for two runs; three or more are averaged uniformly; leave it out",
    ),
    (
        ["start", "tuned", "third"],
        {"choose": "0.5", "out": Path("x")},
        "--choose 0.5: three or more runs have one average, the uniform one; leave it out",
    ),
    (
        ["start", "squashed"],
        {},
        "runs/squashed: another architecture than runs/start: data.resize squash (in runs/start crop); average a run "
        "with one that was tuned from it: mlip pretrain RECIPE model.init=runs/start",
    ),
    (
        ["start", "wide"],
        {},
        "runs/wide: another architecture than runs/start: model.embed_dim 24 (in runs/start 16); average a run with "
        "one that was tuned from it: mlip pretrain RECIPE model.init=runs/start",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("runs", "options", "message"), MISTAKES)
def test_mistakes_are_named_before_torch_is_needed(
    place: Path, monkeypatch: pytest.MonkeyPatch, runs: list[str], options: dict[str, Any], message: str
) -> None:
    if "squashed" in runs:
        shutil.copytree("runs/third", "runs/squashed")
        recipe = Path("runs/squashed/recipe.yaml")
        recipe.write_text(recipe.read_text().replace("resize: crop", "resize: squash"))
    monkeypatch.setattr(stored_averages.Averages, "_open", lambda self: pytest.fail("the weights were loaded"))
    with pytest.raises(UsageError) as refused:
        call(*(f"runs/{name}" for name in runs), **options)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0:1", "'0:1' is not START:END:STEP; write 0:1:0.1"),
        ("0:1:0", "'0:1:0' is not a range of up to 1,000 steps; write 0:1:0.1"),
        ("1:0:0.1", "'1:0:0.1' is not a range of up to 1,000 steps; write 0:1:0.1"),
        ("0:1:1e-9", "'0:1:1e-9' is not a range of up to 1,000 steps; write 0:1:0.1"),
        ("0,1.5", "'0,1.5' leaves [0, 1]; a weight is the share of the second run"),
        ("nan", "'nan' leaves [0, 1]; a weight is the share of the second run"),
        ("a,b", "'a,b' is not START:END:STEP and not a list; write 0:1:0.1 or 0,0.3,1"),
    ],
)
def test_weights_that_are_none_are_named(text: str, message: str) -> None:
    from mlip_cli.terminal.values import split_weights

    with pytest.raises(Exception) as refused:  # noqa: PT011 typer's own
        split_weights(text)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0:1:0.25", [0, 0.25, 0.5, 0.75, 1]), ("0:1:0.1", [number / 10 for number in range(11)]), ("0.3,1", [0.3, 1])],
)
def test_weights_are_read(text: str, expected: list[float]) -> None:
    from mlip_cli.terminal.values import split_weights

    assert split_weights(text) == expected


def test_the_command_line_takes_runs_and_weights(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = CliRunner().invoke(
        app, ["average", "runs/start", "runs/tuned", "--weights", "0:1:0.5", "--dataset", "folder:classes", "--json"]
    )
    assert done.exit_code == 0, done.output
    assert [point.coefficients[1] for point in result_in("runs/tuned").datasets[0].points] == [0, 0.5, 1]


def test_nothing_is_left_of_a_run_that_could_not_be_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlip_cli.runs import average as runs_average

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs_average, "save_checkpoint", full)
    with pytest.raises(RunError, match="runs/mixed: No space left on device; make room and repeat the command"):
        call("runs/start", "runs/tuned", datasets=SETS[:1], weights=[], out=Path("runs/mixed"))
    assert sorted(path.name for path in Path("runs").iterdir()) == ["start", "third", "tuned", "twin", "wide"]
    assert len(result_in("runs/tuned").datasets) == 1


def test_an_average_is_announced_before_scores_that_could_not_be_stored(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evals = Path("runs/tuned/evals")
    shutil.rmtree(evals, ignore_errors=True)
    evals.write_text("a file in its place")
    with caplog.at_level("INFO", logger="mlip_cli"), pytest.raises(RunError, match="printed, but not stored"):
        call("runs/start", "runs/tuned", datasets=SETS[:1], weights=[], out=Path("runs/mixed"))
    assert "weight 0.5: written to runs/mixed" in caplog.messages
    assert Path("runs/mixed/report.html").is_file()


def test_tokenizers_are_compared_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizers = {"one": "{}", "same": "{}", "other": '{"version": "1.0"}'}
    recipes = {}
    for name, content in tokenizers.items():
        file = Path(name, "tokenizer.json")
        tokenizer = {"file": str(file.absolute()), "pad_id": 0}
        text = {"width": 32, "depth": 2, "num_heads": 2, "tokenizer": tokenizer}
        recipes[name] = small_recipe(mlip=False, model={"text": text})
        make_run(Path(name), small_recipe(mlip=False))
        file.write_text(content)
    stored_averages.check_same_form({name: recipes[name] for name in ("one", "same")})
    with pytest.raises(UsageError) as refused:
        stored_averages.check_same_form(recipes)
    assert str(refused.value) == (
        "other: its tokenizer.json is not that of one; average a run with one that was tuned from it: mlip pretrain "
        "RECIPE model.init=one"
    )
