"""Duplicates: a pure function of the table of all rows, equal to brute force; rejects name what they repeat."""

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from photographs_for_tests import encoded, photographs
from PIL import Image, ImageDraw
from sources_for_tests import contents, prepare, rejects, samples, texts, write_files, write_sidecars

from mlip_cli.data.prepare import near
from mlip_cli.data.prepare.duplicates import EVALUATION_ROW, EvaluationSet, drops, num_repeats, overlaps
from mlip_cli.data.prepare.filters import DEDUPES, MAX_RADIUS, Cleaning
from mlip_cli.data.prepare.near import FEWEST_BITS, near_among, near_earlier, says_something
from mlip_cli.data.prepare.reasons import SourceError
from mlip_cli.data.prepare.shards import PART_ROW
from mlip_cli.data.sources import records
from mlip_cli.data.sources.records import NO_SPLIT, SPLITS

few_values = st.integers(0, 3)
near_hashes = st.integers(0, 2**9 - 1).map(lambda low: 0x0F0F_3355_0F0F_3000 | low)
odd_hashes = st.sampled_from([0, 1, 2**64 - 1, 0b111, 0b1111])
rows_of = st.lists(
    st.tuples(few_values, few_values, near_hashes | odd_hashes, st.sampled_from([0, 1, 2, NO_SPLIT])), max_size=40
)


def table_of(rows: list[tuple[int, int, int, int]]) -> NDArray[np.void]:
    """sha256, pixels, perceptual and split of each row -> (n,) of PART_ROW."""
    table = np.zeros(len(rows), PART_ROW)
    for i, (sha256, pixels, perceptual, split) in enumerate(rows):
        table[i]["sha256"] = np.void(bytes([sha256]) * 16)
        table[i]["pixels"], table[i]["perceptual"], table[i]["split"] = pixels, perceptual, split
    return table


def expected(rows: list[tuple[int, int, int, int]], dedupe: str) -> list[str]:
    """The definition as it is written: an earlier row, dropped or not, of the rows that go to training."""
    words = []
    for j, (sha256, pixels, perceptual, split) in enumerate(rows):
        earlier = [row for row in rows[:j] if row[3] in (0, NO_SPLIT)] if split in (0, NO_SPLIT) else []
        if dedupe == "none":
            words.append("")
        elif any(row[0] == sha256 for row in earlier):
            words.append("duplicate: same bytes")
        elif dedupe != "bytes" and any(row[1] == pixels for row in earlier):
            words.append("duplicate: same pixels")
        elif dedupe.startswith("near") and any(
            (row[2] ^ perceptual).bit_count() <= int(dedupe[-1])
            and all(FEWEST_BITS <= hash.bit_count() <= 64 - FEWEST_BITS for hash in (row[2], perceptual))
            for row in earlier
        ):
            words.append("duplicate: looks the same")
        else:
            words.append("")
    return words


@pytest.mark.slow
@given(rows=rows_of, dedupe=st.sampled_from(DEDUPES))
@settings(max_examples=300, deadline=None)
def test_duplicates_are_those_of_the_definition(rows: list[tuple[int, int, int, int]], dedupe: str) -> None:
    table = table_of(rows)
    fate = drops(table, Cleaning(dedupe=dedupe))
    assert [fate.words[code] for code in fate.codes] == expected(rows, dedupe)
    for row, twin in enumerate(fate.twins.tolist()):
        assert (twin >= 0) == (fate.codes[row] > 0)
        assert twin < row
        if fate.codes[row] in (1, 2):
            field = ("sha256", "pixels")[fate.codes[row] - 1]
            assert table[field][row] == table[field][twin]


def some_hashes(kind: str, n: int) -> NDArray[np.uint64]:
    random = np.random.default_rng(n)
    if kind == "spread":
        hashes = random.integers(0, 2**64, n, dtype=np.uint64)
        flips = [np.uint64(1) << random.integers(0, 64, n // 2, dtype=np.uint64) for _ in range(3)]
        hashes[n - n // 2 :] = hashes[: n // 2] ^ flips[0] ^ flips[1] ^ flips[2]
        return hashes
    if kind == "crowd":
        return np.uint64(0x5A5A_00FF_5A5A_0000) ^ random.integers(0, 2**14, n, dtype=np.uint64)
    return random.choice(np.array([0, 2**64 - 1, 0xFF, 0x1], np.uint64), n)


@pytest.mark.parametrize("radius", range(MAX_RADIUS + 1))
@pytest.mark.parametrize("kind", ["spread", "crowd", "flat"])
@pytest.mark.parametrize("limits", [(near.CROWD, near.MOST_PAIRS), (4, 16)])
def test_near_hashes_are_those_of_brute_force(
    radius: int, kind: str, limits: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near, "CROWD", limits[0])
    monkeypatch.setattr(near, "MOST_PAIRS", limits[1])
    hashes = some_hashes(kind, 500)
    both = says_something(hashes)[:, None] & says_something(hashes)
    within = (np.bitwise_count(hashes[:, None] ^ hashes) <= radius) & both
    found = near_earlier(hashes, radius)
    has_one = np.flatnonzero(found >= 0)
    assert ((found >= 0) == np.tril(within, -1).any(1)).all()
    assert (found[has_one] < has_one).all()
    assert within[has_one, found[has_one]].all()
    own, others = hashes[:300], hashes[300:]
    among = near_among(own, others, radius)
    hits = among >= 0
    assert (hits == within[:300, 300:].any(1)).all()
    assert within[:300, 300:][hits, among[hits]].all()


@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_hashes(n: int) -> None:
    hashes = np.full(n, 0xFF00, np.uint64)
    assert near_earlier(hashes, 2).tolist() == [-1, 0][:n]
    assert near_among(hashes, hashes[:0], 2).tolist() == [-1] * n


def test_the_fate_of_a_row_does_not_depend_on_what_follows() -> None:
    hashes = some_hashes("crowd", 400)
    table = table_of([(i % 251, i, int(hash), 0) for i, hash in enumerate(hashes)])
    whole = drops(table, Cleaning(dedupe="near:2"))
    for n in (1, 100, 399):
        assert (drops(table[:n], Cleaning(dedupe="near:2")).codes == whole.codes[:n]).all()


def test_a_crowd_of_like_hashes_does_not_explode() -> None:
    """40,000 drawings on white: their hashes differ in 24 bits alone. All pairs would be 8e8."""
    random = np.random.default_rng(0)
    hashes = np.uint64(0x0000_3C3C_3C3C_0000) & random.integers(0, 2**64, 40_000, dtype=np.uint64)
    found = near_earlier(hashes, 3)
    distinct = np.unique(hashes[says_something(hashes)])
    assert (found < 0).sum() < len(distinct) < 40_000
    assert not (found[~says_something(hashes)] >= 0).any()


def test_own_splits_and_evaluation_sets_stay_out_of_training() -> None:
    train, validation, test = (SPLITS.index(split) for split in ("train", "validation", "test"))
    look = 0x0F0F_0F0F_0F0F_0F0F
    rows = [
        (1, 1, 0, train),
        (2, 2, 0, train),
        (1, 1, 0, validation),
        (3, 2, 0, test),
        (1, 1, 0, validation),
        (9, 9, 0, train),
        (8, 8, look ^ 7, train),
        (9, 9, 0, train),
    ]
    table = table_of(rows)
    kept = np.ones(len(table), bool)
    assert overlaps(table, kept) == {"validation": 1, "test": 1}
    assert num_repeats(table, kept) == 1
    known = np.zeros(2, EVALUATION_ROW)
    known["pixels"], known["perceptual"] = [7, 9], [look, 0]
    sets = [EvaluationSet("folder:x", known)]
    fate = drops(table, Cleaning(exclude=("validation", "folder:x")), sets)
    assert [fate.words[code] for code in fate.codes] == [
        *("in evaluation data: validation", "", "", "", ""),
        *("in evaluation data: folder:x", "", "in evaluation data: folder:x"),
    ]
    assert fate.twins.tolist() == [2, -1, -1, -1, -1, 1, -1, 1]
    near_too = drops(table, Cleaning(dedupe="near:3", exclude=("folder:x", "test")), sets)
    assert [near_too.words[code] for code in near_too.codes] == [
        *("", "in evaluation data: test", "", "", "", "in evaluation data: folder:x", "in evaluation data: folder:x"),
        "in evaluation data: folder:x",
    ]
    assert near_too.twins.tolist() == [-1, 3, -1, -1, -1, 1, 0, 1]


def copies(folder: Path) -> Path:
    """Eight photographs; of some the same bytes, the same pixels, JPEGs of them, smaller ones and a crop."""
    files: dict[str, bytes | str] = {}
    for i, photograph in enumerate(photographs(8)):
        files[f"{i}.png"], files[f"{i}.txt"] = encoded(photograph), f"photograph {i}"
    first, second, third = photographs(8)[:3]
    files |= {
        "1bytes.png": encoded(first),
        "1bytes.txt": "a copy",
        "2pixels.webp": encoded(second, "WEBP", lossless=True),
        "2pixels.txt": "same pixels",
        "3jpeg.jpg": encoded(third, "JPEG", quality=75),
        "3jpeg.txt": "a jpeg",
        "4small.png": encoded(first.resize((150, 120))),
        "4small.txt": "a small one",
        "5crop.png": encoded(first.crop((60, 60, 300, 240))),
        "5crop.txt": "a crop",
    }
    white, cross = Image.new("RGB", (90, 90), "white"), Image.new("RGB", (90, 90), "white")
    ImageDraw.Draw(cross).point((45, 45), "black")
    files |= {"6white.png": encoded(white), "6white.txt": "white", "7dot.png": encoded(cross), "7dot.txt": "a dot"}
    return write_files(folder, files)


FOUND = {
    "none": [],
    "bytes": [("1bytes.png", 0, "duplicate: same bytes", "as 0.png row 0")],
    "pixels": [("2pixels.webp", 0, "duplicate: same pixels", "as 1.png row 0")],
    "near:4": [
        ("3jpeg.jpg", 0, "duplicate: looks the same", "as 2.png row 0"),
        ("4small.png", 0, "duplicate: looks the same", "as 0.png row 0"),
    ],
}


@pytest.mark.slow
def test_copies_of_photographs_become_rejects_and_crops_and_flat_pictures_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = copies(tmp_path / "in")
    wanted = []
    for dedupe, more in FOUND.items():
        wanted = sorted([*wanted, *more])
        caplog.clear()
        with caplog.at_level("INFO", logger="mlip_cli"):
            summary = prepare(source, tmp_path / dedupe, dedupe=dedupe)
        assert rejects(tmp_path / dedupe) == wanted
        assert summary["pictures"] == 15 == summary["splits"]["train"]["num_samples"] + summary["rejects"]
        assert summary["cleaning"]["repeats"] == {"none": 2, "bytes": 1}.get(dedupe, 0)
        said = "2 samples repeat the picture of an earlier one; --dedupe pixels leaves them out"
        assert (said in caplog.messages) == (dedupe == "none")
    card = json.loads((tmp_path / "near:4" / "train" / "dataset.json").read_text())
    assert card["provenance"]["perceptual"] == "dhash 1"
    assert card["provenance"]["dedupe"] == "near:4"
    assert ["a crop"] in texts(tmp_path / "near:4")
    assert {("white",), ("a dot",)} <= {tuple(text) for text in texts(tmp_path / "near:4")}


@pytest.mark.slow
def test_dropped_rows_and_bytes_do_not_depend_on_workers_or_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork = multiprocessing.get_context("fork")  # spawned workers would load torch first
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: fork)
    source = copies(tmp_path / "in")
    evaluation = write_files(tmp_path / "eval", {"cat/x.png": encoded(photographs(8)[6]), "dog/y.png": b"damaged"})
    rules = {"dedupe": "near:4", "exclude": (f"folder:{evaluation}",), "min_words": 2, "holdout": 0.2}
    prepare(source, tmp_path / "one", workers=1, **rules)
    monkeypatch.setattr(records, "PART_ROWS", 4)
    prepare(source, tmp_path / "two", workers=2, **rules)
    prepare(source, tmp_path / "again", workers=1, **rules)
    two = contents(tmp_path / "two")
    assert two == contents(tmp_path / "again")
    assert sorted(rejects(tmp_path / "two")) == sorted(rejects(tmp_path / "one"))
    assert {name: two[name] for name in two if name.endswith(".tar")} == {
        name: content for name, content in contents(tmp_path / "one").items() if name.endswith(".tar")
    }


def test_a_picture_of_the_own_validation_split_in_training_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, *others = photographs(4)
    files = {f"train/{i}.png": encoded(other) for i, other in enumerate([first, *others])}
    files |= {"val/a.png": encoded(first), "val/b.webp": encoded(others[0], "WEBP", lossless=True)}
    texts_beside = {name.rpartition(".")[0] + ".txt": f"a picture {name}" for name in files}
    source = write_files(tmp_path / "in", {**files, **texts_beside})
    with caplog.at_level("INFO", logger="mlip_cli"):
        summary = prepare(source, tmp_path / "out", format="sidecar")
    assert summary["cleaning"] == {"repeats": 0, "in_validation": 2, "in_test": 0, "captions_left_out": 0}
    assert (
        "2 samples to train on have a picture of the source's own validation split; --exclude validation leaves them "
        "out"
    ) in caplog.messages
    with caplog.at_level("INFO", logger="mlip_cli"):
        summary = prepare(source, tmp_path / "clean", format="sidecar", exclude=("validation", "test"), dedupe="near:3")
    assert "--exclude test: the source has no pictures in a test split of its own" in caplog.messages
    assert rejects(tmp_path / "clean") == [
        ("train/0.png", 0, "in evaluation data: validation", "same bytes as val/a.png row 0"),
        ("train/1.png", 0, "in evaluation data: validation", "same pixels as val/b.webp row 0"),
    ]
    assert {name: split["num_samples"] for name, split in summary["splits"].items()} == {"train": 2, "validation": 2}
    assert summary["cleaning"]["in_validation"] == 0


def test_held_out_pictures_are_never_in_training_too(tmp_path: Path) -> None:
    source = write_sidecars(tmp_path / "in", 40)
    for i in range(40):
        (source / f"{i:05d}b.png").write_bytes((source / f"{i:05d}.png").read_bytes())
        (source / f"{i:05d}b.txt").write_text("a copy")
    summary = prepare(source, tmp_path / "out", holdout=0.3)
    assert summary["cleaning"] == {"repeats": 40, "in_validation": 0, "in_test": 0, "captions_left_out": 0}
    held, kept = (
        {sample["sha256"] for sample in samples(tmp_path / "out", split)} for split in ("validation", "train")
    )
    assert held
    assert not held & kept


def test_a_source_of_excluded_pictures_alone_keeps_nothing(tmp_path: Path) -> None:
    source = write_files(tmp_path / "in", {"a.png": encoded(photographs(1)[0]), "a.txt": "a"})
    evaluation = write_files(tmp_path / "eval", {"cat/x.png": encoded(photographs(1)[0])})
    with pytest.raises(SourceError, match="none of the 1 row became a sample: 1 x in evaluation data: folder:"):
        prepare(source, tmp_path / "out", exclude=(f"folder:{evaluation}",))
    assert not (tmp_path / "out").exists()


def test_flat_pictures_and_gradients_are_never_near() -> None:
    """All 0 or all 1 but for three bits: white pictures, and those that grow brighter from side to side."""
    plain = np.array([0, 0, 0b111, 0b111, 2**64 - 1, 2**64 - 1, 2**64 - 8], np.uint64)
    assert near_earlier(plain, 4).tolist() == [-1] * 7
    assert near_among(plain, plain, 4).tolist() == [-1] * 7
    assert near_earlier(np.array([0b1111, 0b1111], np.uint64), 0).tolist() == [-1, 0]
