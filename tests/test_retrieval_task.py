"""`mlip eval-zeroshot --task retrieval`: the numbers by hand, stored and compared; and the data sets it reads."""

import json
import shutil
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from models_for_tests import make_run, small_recipe
from results_for_tests import retrieval_result
from shards_for_tests import make_dataset
from sources_for_tests import picture, write_files, write_sidecars, write_tar
from torch.nn.functional import normalize

from mlip_cli.commands import eval_zeroshot as command
from mlip_cli.data.open import open_prepared
from mlip_cli.data.transforms import evaluation_transform
from mlip_cli.errors import RunError, UsageError
from mlip_cli.evaluate.datasets.pairs import find_pair_data
from mlip_cli.evaluate.datasets.pictures import read_picture
from mlip_cli.evaluate.merge_points import sweep_points
from mlip_cli.evaluate.results import PairedTest
from mlip_cli.evaluate.sweep import retrieval
from mlip_cli.evaluate.validation import validation_pairs
from mlip_cli.runs.loading import load_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs with the same validation pairs, whose captions repeat and come in threes."""
    folder = tmp_path_factory.mktemp("retrieval")
    pairs = make_dataset(folder / "pairs", n=40, captions=3)
    for name, mlip in (("clip", False), ("mlip", True)):
        make_run(folder / "runs" / name, small_recipe(mlip=mlip, data={"validation": [str(pairs)]}))
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to write into, as the current folder."""
    shutil.copytree(made / "runs", tmp_path / "runs")
    (tmp_path / "pairs").symlink_to(made / "pairs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "rebuild_if_older", lambda _: None)
    monkeypatch.delenv("MLIP_DATA", raising=False)
    return tmp_path


def evaluate(*runs: str, datasets: tuple[str, ...] = (), rates: tuple[float, ...] = (), as_json: bool = True) -> None:
    command.eval_zeroshot(
        runs,
        task="retrieval",
        datasets=datasets,
        merge_rates=rates,
        data_root=None,
        batch_size=16,
        device="cpu",
        as_json=as_json,
    )


def results(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return json.loads(capsys.readouterr().out)["results"]


def by_hand(run: str, pairs: Path, rate: float) -> dict[str, list[int]]:
    """Rank of the first right answer of each query, from 1, by plain loops. Ties count against the model."""
    loaded, dataset = load_run(run, device="cpu"), open_prepared(pairs)
    samples = [dataset.read(id) for id in range(dataset.num_samples)]
    texts = sorted({own.text for sample in samples for own in sample.captions}, key=lambda text: (len(text), text))
    pixels = [evaluation_transform(read_picture(own.image, where=""), size=32) for own in samples]
    with torch.no_grad():
        images = normalize(loaded.model.encode_image(torch.stack(pixels), loaded.model.merge_plan(rate)), dim=-1)
        cosines = images @ normalize(loaded.model.encode_text(loaded.tokenizer.encode(texts)), dim=-1).T
    right = [[text in {own.text for own in sample.captions} for text in texts] for sample in samples]
    return {
        "image_to_text": places(cosines.tolist(), right),
        "text_to_image": places(cosines.T.tolist(), transposed(right)),
    }


def transposed(rows: list[list[bool]]) -> list[list[bool]]:
    return [list(column) for column in zip(*rows, strict=True)]


def places(scores: list[list[float]], right: list[list[bool]]) -> list[int]:
    found = []
    for row, own in zip(scores, right, strict=True):
        best = max(score for score, is_right in zip(row, own, strict=True) if is_right)
        found.append(1 + sum(s >= best for s, is_right in zip(row, own, strict=True) if not is_right))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_numbers_are_those_by_hand(place: Path, capsys: pytest.CaptureFixture[str], rate: float) -> None:
    evaluate("runs/mlip", rates=(rate,))
    [result] = results(capsys)
    assert (result["dataset"], result["n"], result["kind"]) == ("validation", 40, "retrieval")
    for way, own in by_hand("runs/mlip", place / "pairs", rate).items():
        assert result["median_rank"][way] == median(own)
        assert result[way]["n"] == len(own)
        for k in (1, 5, 10):
            assert result[way][f"r{k}"] == sum(rank <= k for rank in own) / len(own)
            low, high = result[way][f"r{k}_interval"]
            assert 0 <= low <= result[way][f"r{k}"] <= high <= 1
    assert not {"right", "picture_of_text"} & result.keys()


@pytest.mark.slow
def test_rows_are_stored_reused_and_compared(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate("runs/clip", "runs/mlip", rates=(0.0, 0.5))
    first = results(capsys)
    assert [(own["run"], own["merge_rate"]) for own in first] == [
        ("clip", 0),
        ("clip", 0.5),
        ("mlip", 0),
        ("mlip", 0.5),
    ]
    assert "compared_to_first" not in first[0]
    test = first[2]["compared_to_first"]
    assert test["first"] == {"run": "clip", "merge_rate": 0}
    own, other = (row["text_to_image"]["r5"] for row in (first[2], first[0]))
    assert test["text_to_image_r5"]["difference"] == pytest.approx(own - other)
    assert {path.name.split("-")[0] for path in (place / "runs/mlip/evals").glob("*.json")} == {"retrieval"}
    monkeypatch.setattr("mlip_cli.evaluate.stored._load", lambda rows: pytest.fail("measured again"))
    evaluate("runs/clip", "runs/mlip", rates=(0.0, 0.5))
    assert results(capsys) == first
    evaluate("runs/clip", "runs/mlip", rates=(0.0, 0.5), as_json=False)
    out = capsys.readouterr().out
    assert "validation: image to text\nrun  true rate" in out
    assert "validation: beside the first row" in out
    assert "where captions of a picture count together" in out


@pytest.mark.slow
def test_a_sweep_finds_the_same(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate("runs/mlip", datasets=(f"shards:{place / 'pairs'}",), rates=(0.0, 0.5))
    found = results(capsys)
    loaded = load_run("runs/mlip", device="cpu")
    pairs = validation_pairs(loaded.recipe, loaded.tokenizer, device="cpu")
    assert pairs is not None
    swept = retrieval(pairs, sweep_points(loaded, [0.5], []))
    for point, own in zip(swept.points, found, strict=True):
        assert point.text_to_image.r1 == own["text_to_image"]["r1"]
        assert point.image_to_text.r10_interval == tuple(own["image_to_text"]["r10_interval"])
    tests = {name: vars(test) for name, test in swept.points[1].paired.items()}
    assert {name: test for name, test in found[1]["compared_to_first"].items() if name != "first"} == tests


def test_captions_of_a_picture_count_together_in_tests() -> None:
    """One of two pictures wins with all its captions: by single captions this would look certain."""
    first, other = (
        retrieval_result(right={"text_to_image_r5": right, "image_to_text_r5": "01"})
        for right in ("0" * 20, "1" * 10 + "0" * 10)
    )
    assert other.test_against(first, "text_to_image_r5") == PairedTest(difference=0.5, won=10, lost=0, p=1.0)
    assert other.test_against(first, "image_to_text_r5").p == 1


def test_zero_shot_results_of_the_same_data_have_files_of_their_own(place: Path) -> None:
    from mlip_cli.evaluate.datasets.find import find_benchmark
    from mlip_cli.evaluate.stored import RETRIEVAL, Measurement, find_checkpoints

    [checkpoint] = find_checkpoints(["runs/clip"])
    data = find_benchmark("shards:pairs")
    zeroshot, retrieved = (
        Measurement(checkpoint, data, 0.0, 16, "cpu"),
        Measurement(checkpoint, data, 0.0, 16, "cpu", RETRIEVAL),
    )
    assert zeroshot.path != retrieved.path


# data sets -----------------------------------------------------------------------------------------------------------


def karpathy(root: Path, name: str) -> Path:
    """The layout of Flickr30k or COCO with Karpathy's splits: six test pictures of five captions, and others."""
    folder = root / name
    images = []
    for number in range(9):
        split = "test" if number < 6 else ("restval", "train", "val")[number - 6]
        file = {"filename": f"{number}.jpg"} | ({"filepath": "val2014"} if name == "coco" else {})
        sentences = [{"raw": f"caption {i} of picture {number}", "tokens": ["caption"]} for i in range(5)]
        images.append({**file, "imgid": number, "split": split, "sentences": sentences, "sentids": list(range(5))})
    pictures = "val2014" if name == "coco" else "flickr30k-images"
    write_files(
        folder,
        {
            f"dataset_{name}.json": json.dumps({"images": images, "dataset": name}),
            **{f"{pictures}/{number}.jpg": picture(number, "JPEG") for number in range(9)},
        },
    )
    return folder


@pytest.mark.parametrize("name", ["flickr30k", "coco"])
def test_karpathys_test_split_is_measured(name: str, tmp_path: Path) -> None:
    karpathy(tmp_path, name)
    data = find_pair_data(name, root=tmp_path, recipes=[])
    [pairs] = data.open()
    assert pairs.num_samples == 6
    samples = [pairs.read(id) for id in range(6)]
    assert [len(own.captions) for own in samples] == [5] * 6
    for number, own in enumerate(samples):
        assert own.captions[2].text == f"caption 2 of picture {number}"
        assert own.image == picture(number, "JPEG")
    assert data.fingerprint == find_pair_data(name, root=tmp_path, recipes=[]).fingerprint


@pytest.mark.slow
def test_flickr30k_is_measured_from_the_command_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    karpathy(place / "data", "flickr30k")
    evaluate("runs/clip", datasets=("flickr30k",))
    [result] = results(capsys)
    assert (result["n"], result["num_texts"], result["text_to_image"]["n"]) == (6, 30, 30)
    assert result["text_to_image"]["r1_chance"] == pytest.approx(1 / 6)


def test_a_missing_picture_of_the_split_is_named(tmp_path: Path) -> None:
    folder = karpathy(tmp_path, "flickr30k")
    (folder / "flickr30k-images/3.jpg").unlink()
    with pytest.raises(RunError) as error:
        find_pair_data("flickr30k", root=tmp_path, recipes=[]).open()
    assert str(error.value).startswith(
        "flickr30k: 1 of 6 pairs cannot be used (dataset_flickr30k.json, row 3: picture missing: 3.jpg: no such file"
    )
    (folder / "flickr30k-images/8.jpg").unlink()  # not of the split
    write_files(folder, {"flickr30k-images/3.jpg": picture(3, "JPEG")})
    assert find_pair_data("flickr30k", root=tmp_path, recipes=[]).open()[0].num_samples == 6


def test_a_folder_with_texts_is_pairs(tmp_path: Path) -> None:
    write_sidecars(tmp_path / "mine", 7)
    [pairs] = find_pair_data(f"pairs:{tmp_path / 'mine'}", root=None, recipes=[]).open()
    assert pairs.num_samples == 7


def test_web_shards_of_clip_benchmark_are_pairs(tmp_path: Path) -> None:
    """As clip_benchmark_export_wds writes a data set of captions: a text with a caption a line beside each picture."""
    members: dict[str, bytes | str] = {}
    for i in range(4):
        members |= {f"{i:07d}.png": picture(i), f"{i:07d}.txt": "\n".join(f"caption {n} of {i}" for n in range(5))}
    write_tar(tmp_path / "wds_flickr30k/test/0.tar", members)
    [pairs] = find_pair_data(f"pairs:{tmp_path / 'wds_flickr30k/test'}", root=None, recipes=[]).open()
    assert [[own.text for own in pairs.read(i).captions] for i in range(4)] == [
        [f"caption {n} of {i}" for n in range(5)] for i in range(4)
    ]
    assert [pairs.read(i).image for i in range(4)] == [picture(i) for i in range(4)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "flickr30k",
            "flickr30k: no dataset_flickr30k.json in {root}/flickr30k; put the file of Karpathy's splits there",
        ),
        ("pairs:", "pairs:: no such file or folder; write pairs:PATH"),
        ("pairs:nowhere", "pairs:nowhere: no such file or folder; write pairs:PATH"),
        ("digits", "unknown data set 'digits' for retrieval; use validation, shards:PATH, pairs:PATH"),
        ("shards:nowhere", "shards:nowhere: no such folder"),
        ("validation", "validation: no recipe of these runs has data.validation; use shards:PATH"),
    ],
)
def test_data_that_is_not_there(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        find_pair_data(name, root=tmp_path, recipes=[small_recipe()])
    assert str(error.value).startswith(message.format(root=tmp_path))


def test_validation_must_be_the_same_for_all_runs() -> None:
    recipes = [small_recipe(data={"validation": [name]}) for name in ("a", "b")]
    with pytest.raises(UsageError) as error:
        find_pair_data("validation", root=None, recipes=recipes)
    assert str(error.value) == (
        "validation: the runs have different data.validation; name one for all, as in --dataset shards:a"
    )
