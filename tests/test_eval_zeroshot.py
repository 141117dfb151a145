"""`mlip eval-zeroshot` from run folders to tables: real models, real shards, stored results, one line for mistakes."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import make_run, small_model, small_recipe
from PIL import Image
from results_for_tests import zeroshot_result
from shards_for_tests import index_shard, make_dataset

from mlip_cli.commands import eval_zeroshot as command
from mlip_cli.data.prepare.shards import sample_parts, tar_writer
from mlip_cli.data.tokenizer import Tokenizer
from mlip_cli.errors import RunError, Stopped, UsageError
from mlip_cli.evaluate import evaluators
from mlip_cli.evaluate.datasets.benchmark import Benchmark
from mlip_cli.evaluate.datasets.find import find_benchmark
from mlip_cli.evaluate.datasets.open import OPENMOJI_GROUPS, open_benchmark
from mlip_cli.evaluate.datasets.pictures import batches
from mlip_cli.evaluate.evaluators import retrieval_words, training_evaluators, zeroshot_words
from mlip_cli.evaluate.statistics import Interval, mcnemar
from mlip_cli.evaluate.stored import EvaluatedCheckpoint, Measured
from mlip_cli.evaluate.validation import validation_pairs
from mlip_cli.evaluate.zeroshot import class_embeddings, normalized
from mlip_cli.files import write_json
from mlip_cli.recipe.config import Data
from mlip_cli.report.scores import ZeroshotRow, zeroshot_tables
from mlip_cli.report.write import rebuild_if_older
from mlip_cli.runs.checkpoint import save_checkpoint
from mlip_cli.runs.folder import Run
from mlip_cli.runs.loading import at_rate, load_run


def make_openmoji(folder: Path, n: int = 30) -> None:
    """Shards with groups and names as of OpenMoji; the first two pictures are equal."""
    folder.mkdir(parents=True)
    path = folder / "test-000000.tar"
    with tar_writer(path) as writer:
        for i in range(n):
            file = io.BytesIO()
            Image.new("RGB", (32, 32), (7 * max(i, 1), 255 - 8 * max(i, 1), 40)).save(file, "WEBP", lossless=True)
            name, group = f"thing {i}", OPENMOJI_GROUPS[i % 9]
            fields = {
                "captions": [{"text": name, "weight": 1.0}, {"text": f"{name}, {group}", "weight": 1.0}],
                "class": group,
                **dict.fromkeys(("width", "height", "original_width", "original_height"), 32),
                "meta": {"name": name},
            }
            writer.write(sample_parts(f"{i:09d}", image=file.getvalue(), format="webp", fields=fields))
    shards = [index_shard(path, [12] * n)]
    write_json(folder / "dataset.json", {"num_samples": n, "fingerprint": shards[0]["sha256"], "shards": shards})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CLIP run, an MLIP run and data."""
    folder = tmp_path_factory.mktemp("zeroshot")
    make_run(folder / "runs" / "clip", small_recipe(mlip=False))
    make_run(folder / "runs" / "mlip", small_recipe())
    for split in ("test", "combinations"):
        make_openmoji(folder / "data" / "openmoji" / split)
    make_dataset(folder / "data" / "colors", n=40)
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to write into, as the current folder; no pages are drawn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "rebuild_if_older", lambda _: None)
    monkeypatch.delenv("MLIP_DATA", raising=False)
    return shutil.copytree(made, tmp_path, dirs_exist_ok=True)


def evaluate(
    *runs: str,
    datasets: list[str],
    rates: tuple[float, ...] = (),
    as_json: bool = True,
) -> None:
    common: dict[str, Any] = {
        "task": "zeroshot",
        "data_root": None,
        "batch_size": 16,
        "device": "cpu",
        "as_json": as_json,
    }
    command.eval_zeroshot(runs, datasets=datasets, merge_rates=rates, **common)


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    out = capsys.readouterr().out
    return json.loads(out, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


@pytest.mark.slow
def test_runs_and_rates_on_openmoji(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate("runs/clip", "runs/mlip", datasets=["openmoji"], rates=(0.0, 0.5))
    results = printed(capsys)["results"]
    assert [(r["run"], r["merge_rate"]) for r in results] == [("clip", 0), ("clip", 0.5), ("mlip", 0), ("mlip", 0.5)]
    assert [r["merge_method"] for r in results] == [None, "guided", None, "guided"]
    for result in results:
        assert (result["n"], result["num_classes"], result["step"]) == (30, 9, 8)
        assert result["chance"] == pytest.approx(1 / 9)
        assert result["names"]["num_candidates"] == 30
        assert result["names"]["r1_chance"] == pytest.approx((28 * 1 + 2 * 2) / 30 / 30)
        assert result["images_per_s"] > 0
        assert result["passed_over"] == {"counts": {}, "first": {}}
        assert ("spatial_plus_frequency" in result) == ("frequency" in result) == (result["run"] == "mlip")
    assert "compared_to_first" not in results[0]
    assert 0 <= results[3]["compared_to_first"]["name_r1"]["p"] <= 1


@pytest.mark.slow
def test_combinations_are_retrieved_both_ways(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate("runs/clip", "runs/mlip", datasets=["openmoji_combinations"], rates=(0.5,))
    result = printed(capsys)["results"][1]
    run = load_run("runs/mlip", device="cpu")
    encoder = at_rate(run.model, 0.5)
    pictures = open_benchmark(find_benchmark("openmoji_combinations", root=place / "data"))
    assert pictures.class_names == tuple(sorted(f"thing {i}" for i in range(30)))
    [(images, _)] = batches(pictures, range(1), data=Data(train=(), image_size=32), batch_size=30, read_ahead=True)
    with torch.no_grad():
        tokens = [
            run.tokenizer.encode([f"{start}{name}" for name in pictures.class_names]) for start in ("", "an emoji of ")
        ]
        texts = sum(normalized(encoder.encode_text(own), "text") for own in tokens)
        places = (texts @ normalized(encoder.encode_image(images), "image").T).argsort(1, descending=True)
    own = [
        {i for i in range(30) if f"thing {max(i, 1)}" == f"thing {max(int(name[6:]), 1)}"}
        for name in pictures.class_names
    ]
    for k in (1, 5):
        hits = [bool(right & set(found[:k].tolist())) for right, found in zip(own, places, strict=True)]
        assert result["pictures"][f"r{k}"] == pytest.approx(sum(hits) / 30)
    assert result["pictures"]["r5_chance"] == pytest.approx((28 * 5 / 30 + 2 * (1 - 25 * 24 / 30 / 29)) / 30)
    assert set(result["compared_to_first"]) == {
        "first",
        "acc1",
        *(f"{w}_r{k}" for w in ("name", "picture") for k in (1, 5)),
    }
    evaluate("runs/clip", "runs/mlip", datasets=["openmoji_combinations"], rates=(0.5,), as_json=False)
    out = capsys.readouterr().out
    assert "openmoji_combinations: text to image" in out
    assert "openmoji_combinations: image to text" in out
    assert "mean recall" not in out
    assert "30 pictures, 30 names: chance R@1 3.6 %, R@5 17.6 %" in out


@pytest.mark.slow
def test_scores_are_those_of_a_plain_computation(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate("runs/mlip", datasets=["shards:data/colors"], rates=(0.5,))
    [result] = printed(capsys)["results"]
    run = load_run("runs/mlip", device="cpu")
    encoder = at_rate(run.model, 0.5)
    pictures = open_benchmark(find_benchmark("shards:data/colors", root=place))
    [(images, labels)] = batches(pictures, range(1), data=Data(train=(), image_size=32), batch_size=40, read_ahead=True)
    with torch.no_grad():
        classes = class_embeddings(
            pictures.class_names,
            pictures.templates,
            tokenize=run.tokenizer.encode,  # padded to the context length, unlike what the command does
            encode_text=encoder.encode_text,
            device="cpu",
        )
        features = encoder.image_features(images)
        spatial, frequency = normalized(features.spatial, "image"), normalized(features.frequency, "image")
    for scores, feature in ((result, spatial), (result["spatial_plus_frequency"], spatial + frequency)):
        right = (feature @ classes.T).argmax(1) == labels
        assert scores["acc1"] == pytest.approx(right.float().mean().item())


@pytest.mark.slow
def test_what_is_measured_is_on_the_page_and_read_without_torch(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "rebuild_if_older", rebuild_if_older)
    evaluate("runs/clip", datasets=["openmoji"], as_json=False)
    assert "<h3>openmoji</h3>" in Path("runs/clip/report.html").read_text("utf-8")
    first = capsys.readouterr().out
    code = (
        "import sys; from mlip_cli.commands.eval_zeroshot import eval_zeroshot\n"
        "eval_zeroshot(['runs/clip'], task='zeroshot', datasets=['openmoji'], merge_rates=[], data_root=None,"
        " batch_size=16, device='cpu', as_json=False)\n"
        "heavy = {'torch', 'numpy', 'webdataset', 'open_clip', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    again = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert again.stdout == first


@pytest.mark.slow
def test_other_data_weights_or_rates_are_measured_anew(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("runs/clip/evals")
    evaluate("runs/clip", datasets=["openmoji"], rates=(0.0,))
    [path] = folder.iterdir()
    assert path.name.startswith("openmoji-step_0000008-rate_0-")
    evaluate("runs/clip", datasets=["openmoji"], rates=(0.0, 0.25))
    assert len(list(folder.iterdir())) == 2
    other = small_model(small_recipe(mlip=False), dtype=torch.float32, seed=5)
    save_checkpoint(Path("runs/clip/checkpoints"), step=8, weights=other.state_dict(), state={"step": 8})
    evaluate("runs/clip", datasets=["openmoji"], rates=(0.0,))
    assert len(list(folder.iterdir())) == 3
    capsys.readouterr()


@pytest.mark.slow
def test_tables_are_narrow_and_say_what_was_measured(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate("runs/clip", "runs/mlip", datasets=["openmoji", "shards:data/colors"], rates=(0.5,), as_json=False)
    lines = capsys.readouterr().out.splitlines()
    tables = [line for line in lines if line.startswith(("run  ", "  1", "  2"))]
    assert len(tables) == 3 * (1 + 1 + 3)
    assert max(map(len, tables)) <= 80
    assert lines[0] == "openmoji"
    assert " ".join(lines[1].split()) == "run true rate feature mean recall % top-1 % images/s"
    assert [line.split()[:3] for line in lines[2:6]] == [
        ["1", "0.500", "spatial"], ["2", "0.500", "spatial"], ["2", "0.500", "frequency"], ["2", "0.500", "sum"],
    ]  # fmt: skip
    assert lines[6] == (
        "30 pictures of concepts that training did not see, 9 classes: chance 11.1 %; in brackets: 95 % intervals"
    )
    assert any(line.startswith("30 names: chance R@1 3.6 %, R@5 ") for line in lines)
    assert "40 pictures, 8 classes: chance 12.5 %; in brackets: 95 % intervals" in lines
    assert "top-5" not in "".join(lines)  # five of eight say little
    assert lines[-2:] == [
        "run 1: clip at step 8 (last checkpoint), in fp32",
        "run 2: mlip at step 8 (last checkpoint), in fp32",
    ]


def test_top_5_stands_beside_its_chance_where_there_are_many_classes() -> None:
    many = zeroshot_tables("many", [ZeroshotRow(zeroshot_result(num_classes=20, chance=0.05))])
    assert [list(table.columns) for table in many] == [
        ["true rate", "mean recall %", "top-1 %", "images/s"], ["true rate", "top-5 %"],
    ]  # fmt: skip
    assert many[0].notes == ["50,000 pictures, 20 classes: chance 5.0 %, of top-5 25.0 %; in brackets: 95 % intervals"]
    assert [str(cell) for cell in many[1].rows[0]] == ["0.000", "34.4 (31.0-38.4)"]
    [few] = zeroshot_tables("few", [ZeroshotRow(zeroshot_result(num_classes=19, chance=1 / 19))])
    assert few.notes == ["50,000 pictures, 19 classes: chance 5.3 %; in brackets: 95 % intervals"]


def test_words_of_evaluators_name_what_they_count() -> None:
    scores = {"mean_per_class_recall": 0.5, "chance": 0.25, "acc1": 0.5, "n": 1234}
    scores["mean_per_class_recall_interval"] = Interval(0.25, 0.75)
    assert zeroshot_words(scores) == "mean recall 50.0 % (chance 25.0), top-1 50.0 %; 1,234 pictures"
    scores["mean_per_class_recall_interval"] = Interval(0.2, 0.24)
    assert "top-1 50.0 %, below chance: are the class names right?; 1,234 pictures" in zeroshot_words(scores)
    way = {f"r{k}{of}": 0.1 for k in (1, 5, 10) for of in ("", "_chance")}
    words = retrieval_words({"image_to_text": {**way, "n": 161}, "text_to_image": {**way, "n": 1}})
    assert re.findall(r"; (.*?)\)", words) == ["161 pictures", "1 caption"]


def test_one_run_needs_no_number_and_shows_the_true_rate(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate("runs/clip", datasets=["openmoji"], rates=(0.3,), as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:4] == ["true", "rate", "mean", "recall"]
    true_rate = f"{at_rate(load_run('runs/clip', device='cpu').model, 0.3).plan.rate:.3f}"
    assert lines[2].startswith(f"{true_rate} (asked 0.3)  ")
    assert lines[-1] == "measured: clip at step 8 (last checkpoint), in fp32"
    [path] = Path("runs/clip/evals").iterdir()
    stored = json.loads(path.read_text())
    assert stored["kind"] == "zeroshot"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'{"n": 30, ', "Expecting property name enclosed in double quotes: line 1 column 11 (char 10)"),
        (b"[1]", "not a JSON object"),
        (b"{}", "kind: None instead of 'zeroshot'"),
        (b'{"kind": "zeroshot"}', "step is missing"),
        (None, "predicted is missing"),
        (b"\xff", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
    ],
)
def test_a_damaged_result_is_measured_again(
    place: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, content: bytes | None, why: str
) -> None:
    evaluate("runs/clip", datasets=["openmoji"])
    first = printed(capsys)["results"][0]
    [path] = Path("runs/clip/evals").iterdir()
    lacking = {key: value for key, value in json.loads(path.read_bytes()).items() if key != "predicted"}
    path.write_bytes(json.dumps(lacking).encode() if content is None else content)
    caplog.clear()
    with caplog.at_level("WARNING", logger="mlip_cli"):
        evaluate("runs/clip", datasets=["openmoji"])
    assert caplog.messages == [f"{path}: damaged ({why}); measured again"]
    assert json.loads(path.read_text())["acc1"] == first["acc1"]


@pytest.mark.parametrize(("tower", "n"), [("image", 30), ("text", 18)])
def test_damaged_weights_are_one_line_and_leave_no_result(place: Path, tower: str, n: int) -> None:
    weights = small_model(small_recipe(mlip=False), dtype=torch.float32).state_dict()
    weights[f"{tower}_projection.weight"][0, 0] = float("nan")
    save_checkpoint(Path("runs/clip/checkpoints"), step=8, weights=weights, state={"step": 8})
    with pytest.raises(RunError) as error:
        evaluate("runs/clip", datasets=["openmoji"])
    assert str(error.value) == (
        f"openmoji: clip: {n} of {n} {tower} features are not finite; the weights of this checkpoint are damaged; "
        "name an earlier one"
    )
    assert not Path("runs/clip/evals").exists()


@pytest.mark.slow
def test_an_earlier_checkpoint_and_runs_of_one_name(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(place / "more" / "clip", small_recipe(mlip=False), seed=1)
    weights = small_model(small_recipe(mlip=False), dtype=torch.float32, seed=2).state_dict()
    save_checkpoint(Path("more/clip/checkpoints"), step=12, weights=weights, state={"step": 12})
    evaluate("runs/clip", "more/clip/checkpoints/step_0000008", datasets=["openmoji"], as_json=False)
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "run 1: runs/clip at step 8 (last checkpoint), in fp32",
        "run 2: more/clip/step_0000008 at step 8 (earlier checkpoint), in fp32",
    ]


@pytest.mark.slow
def test_the_recipe_names_the_data_sets(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(place / "runs" / "named", small_recipe(evaluate={"zeroshot": ["shards:data/colors"]}))
    evaluate("runs/named", datasets=[])
    [result] = printed(capsys)["results"]
    assert result["dataset"] == "shards:data/colors"
    assert result["merge_rate"] is None
    assert result["true_merge_rate"] == 0.5
    with pytest.raises(UsageError) as error:
        evaluate("runs/clip", datasets=[])
    message = "no data set: the recipe's evaluate.zeroshot is empty; name one, as in --dataset openmoji"
    assert str(error.value) == message


def test_a_failed_data_set_is_a_row_and_not_the_end(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunError) as error:
        evaluate("runs/clip", datasets=["imagenet", "openmoji"])
    assert str(error.value) == "1 of 2 data sets could not be evaluated: imagenet"
    found = printed(capsys)
    assert [result["dataset"] for result in found["results"]] == ["openmoji"]
    assert found["failed"][0]["dataset"] == "imagenet"
    shard = Path("data/colors/train-000001.tar")
    shard.write_bytes(shard.read_bytes()[:-5000])
    with pytest.raises(RunError, match="1 of 2"):
        evaluate("runs/clip", datasets=["shards:data/colors", "openmoji"], as_json=False)
    assert "shards:data/colors: not evaluated" in capsys.readouterr().out.splitlines()


def test_ctrl_c_says_that_finished_data_sets_are_kept(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = evaluators.measure_runs

    def interrupted(benchmark: Benchmark, *rest: Any, **more: Any) -> Any:
        if benchmark.name == "openmoji":
            raise KeyboardInterrupt
        return whole(benchmark, *rest, **more)

    monkeypatch.setattr(evaluators, "measure_runs", interrupted)
    with pytest.raises(Stopped) as stop:
        evaluate("runs/clip", datasets=["shards:data/colors", "openmoji"])
    kept = "interrupted; results of finished data sets are kept; repeat the command to continue"
    assert (str(stop.value), stop.value.exit_code) == (kept, 130)
    [path] = Path("runs/clip/evals").iterdir()
    assert path.name.startswith("shards_data_colors-")
    assert capsys.readouterr().out == ""


def test_a_reason_names_its_data_set_once(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RunError):
        evaluate("runs/clip", datasets=["shards:gone", "openmoji"])
    assert caplog.messages[-1] == (
        "shards:gone: not evaluated: no such folder; name one that mlip prepare-data wrote, such as OUT/test"
    )


def test_nothing_but_wrong_usage_is_wrong_usage(place: Path) -> None:
    with pytest.raises(UsageError) as error:
        evaluate("runs/clip", datasets=["imagenet", "cifar10"])
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == ["imagenet", "cifar10"]
    Path("runs/clip/checkpoints/other").mkdir()
    for name in ("newer", "newest"):
        make_run(Path("runs") / name, small_recipe(mlip=False))
    with pytest.raises(UsageError) as error:
        evaluate("runs/none", datasets=["openmoji"])
    assert str(error.value) == "runs/none: no such run or checkpoint; the newest in runs/: newest, newer, mlip"
    for target in (
        "data",
        "runs/clip/checkpoints/other",
        "runs/clip/checkpoints/step_0000008/state.pt",
    ):
        with pytest.raises(UsageError) as error:
            evaluate(target, datasets=["openmoji"])
        assert str(error.value) == (
            f"{target}: not a run folder (no recipe.yaml) and not a checkpoint of one; name RUN, "
            "RUN/checkpoints/step_NUMBER, open_clip:ARCH:FILE, or a folder with open_clip_config.json or config.json"
        )
    Path("runs/a b").mkdir()
    Path("runs/a b/recipe.yaml").write_bytes(Path("runs/clip/recipe.yaml").read_bytes())
    with pytest.raises(UsageError) as error:
        evaluate("runs/a b", datasets=["openmoji"])
    assert str(error.value) == (
        "runs/a b: it holds no complete checkpoint; continue it with "
        "mlip pretrain 'runs/a b/recipe.yaml' --out 'runs/a b' --resume"
    )
    with pytest.raises(UsageError, match=r"merge rate 0\.9"):
        evaluate("runs/clip", datasets=["openmoji"], rates=(0.9,))
    Path("runs/clip/checkpoints/step_0000008/model.safetensors").write_text("no weights")
    with pytest.raises(UsageError, match=r"model\.safetensors: not a whole safetensors file"):
        evaluate("runs/clip", datasets=["openmoji"])
    assert not Path("runs/clip/evals").exists()


def test_comparison_is_paired() -> None:
    checkpoint = EvaluatedCheckpoint("a", Run(Path("runs/a")), Path("step_0000240"), is_last=True, sha256="")
    first = Measured(checkpoint, zeroshot_result(right={"acc1": "1100110011"}))
    other = Measured(checkpoint, zeroshot_result(rate=0.5, right={"acc1": "1000010011"}))
    assert "compared_to_first" not in first.to_json(first)
    found = other.to_json(first)["compared_to_first"]
    assert found["first"] == {"run": "a", "merge_rate": 0.0}
    assert found["acc1"] == {"difference": -0.2, "won": 0, "lost": 2, "p": mcnemar(2, 0)}


@pytest.mark.slow
def test_training_evaluators_measure_what_the_command_measures(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate("runs/mlip", datasets=["openmoji"])
    [result] = printed(capsys)["results"]
    names = ["openmoji", "openmoji_combinations"]
    recipe = small_recipe(mlip=True, data={"validation": "data/openmoji/test"}, evaluate={"zeroshot": names})
    model = at_rate(load_run("runs/mlip", device="cpu").model, None)
    tokenizer = Tokenizer(16)
    evaluators = training_evaluators(recipe, tokenizer, validation_pairs(recipe, tokenizer, device="cpu"))
    found = {evaluator.name: evaluator.measure(model, lambda _: None) for evaluator in evaluators}
    measures = found["validation"].values | found["openmoji"].values
    assert measures["openmoji_mean_recall"] == pytest.approx(result["mean_per_class_recall"])
    assert measures["openmoji_name_r5"] == pytest.approx(result["names"]["r5"])
    assert measures["openmoji_picture_r5"] == pytest.approx(result["pictures"]["r5"])
    asked = found["openmoji_combinations"]
    assert set(asked.values) == {f"openmoji_combinations_{way}_r{k}" for way in ("picture", "name") for k in (1, 5)}
    assert asked.words.startswith("picture R@1 ")
    assert {f"validation_{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)} < set(measures)
    for path in Path("data/openmoji/test").glob("*.tar"):
        path.unlink()  # decoded pictures are kept: a second evaluation reads nothing
    assert {evaluator.name: evaluator.measure(model, lambda _: None) for evaluator in evaluators} == found
    recipe = small_recipe(data={"validation": "data/none"})
    with pytest.raises(UsageError, match="data/none: no such folder"):
        validation_pairs(recipe, Tokenizer(16), device="cpu")
