"""`mlip prepare-data --check`: whole data passes, and every damage is told with its file, beside all others."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_for_tests import mlip
from sources_for_tests import picture, prepare, write_files, write_sidecars, write_tar

from mlip_cli.data.index import HEADER
from mlip_cli.data.prepare import shards
from mlip_cli.data.prepare.check import Problem, check
from mlip_cli.data.tar import read_members
from mlip_cli.errors import UsageError

SHARD = "train/train-000001.tar"
INDEX = "train/train-000001.idx"
WRONG_SHA256 = "its sha256 is not that which dataset.json says: its bytes were changed"
WRONG_CHECKSUM = "sample 000000010: its bytes are not those that mlip prepare-data wrote: its checksum is wrong"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data with two splits, three shards and one reject."""
    folder = tmp_path_factory.mktemp("check")
    source = write_sidecars(folder / "in/train", 20).parent
    write_files(source, {"test/a.png": picture(100), "test/a.txt": "a test", "train/z.png": "none", "train/z.txt": "z"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_SAMPLES", 8)
        prepare(source, folder / "out", size=8)
    return folder / "out"


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "out"))


def problems(folder: Path) -> list[tuple[str, str]]:
    return [(own.file, own.what) for own in check(folder, num_workers=1).problems]


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)


def member_at(tar: Path, name: str) -> int:
    return next(member.offset for member in read_members(tar) if member.name == name)


def change(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_bytes())
    edit(value)
    path.write_text(json.dumps(value))


def test_whole_data_is_one_line(whole: Path) -> None:
    ended = mlip("prepare-data", "--check", str(whole))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == f"{whole}: whole: 2 splits, 4 shards, 21 samples, 90.0 KiB\n"
    ended = mlip("prepare-data", "--check", str(whole / "train"), "--json", "--workers", "1")
    assert json.loads(ended.stdout) == {
        "folder": str(whole / "train"),
        "num_splits": 1,
        "num_shards": 3,
        "num_samples": 20,
        "num_bytes": sum(path.stat().st_size for path in (whole / "train").glob("*.tar")),
        "problems": [],
    }


def test_several_processes_find_the_same(out: Path) -> None:
    flip(out / SHARD, member_at(out / SHARD, "000000010.json") + 20)
    (out / "train/train-000002.idx").unlink()
    assert check(out, num_workers=2) == check(out, num_workers=1)


@pytest.mark.parametrize("name", ["png", "json"])
def test_a_changed_byte_names_its_sample(out: Path, name: str) -> None:
    endings = {member.name.rpartition(".")[2] for member in read_members(out / SHARD)}
    name = name if name in endings else "webp" if "webp" in endings else "jpg"
    flip(out / SHARD, member_at(out / SHARD, f"000000010.{name}") + 40)
    found = problems(out)
    assert found[:2] == [(SHARD, WRONG_SHA256), (SHARD, WRONG_CHECKSUM)]
    ended = mlip("prepare-data", "--check", str(out))
    assert ended.returncode == 1
    assert ended.stdout.splitlines()[:2] == [f"{SHARD}: {WRONG_SHA256}", f"{SHARD}: {WRONG_CHECKSUM}"]
    what = f"{len(found)} problems in 1 file; copy these files again, or prepare the data again"
    assert ended.stderr == f"error: {out}: {what}\n"


def test_every_problem_is_told_not_only_the_first(out: Path) -> None:
    flip(out / SHARD, member_at(out / SHARD, "000000010.json") + 20)
    flip(out / INDEX, HEADER.itemsize + 3)
    (out / "train/train-000002.idx").unlink()
    (out / "test/test-000000.tar").unlink()
    (out / "train/sizes.json").unlink()
    write_tar(out / "train/other.tar", {"x.jpg": "x"})
    write_tar(out / "other.tar", {"x.jpg": "x"})
    change(out / "test/dataset.json", lambda card: card.update(num_samples=2))
    assert problems(out) == [
        ("prepared.json", "num_samples of test is 1 where test/dataset.json says 2"),
        ("other.tar", "does not belong here: shards lie in the folders of splits"),
        ("train/sizes.json", "missing"),
        ("train/other.tar", "does not belong here: dataset.json does not name it"),
        (INDEX, "damaged: its checksum is wrong"),
        (SHARD, WRONG_SHA256),
        (SHARD, "sample 000000010: its .json is damaged: it holds no captions and sizes of a picture"),
        ("train/train-000002.idx", "missing"),
        ("test/dataset.json", "num_samples is 2, but its shards have 1"),
        ("test/test-000000.tar", "missing"),
    ]


def test_a_cut_tar(out: Path) -> None:
    size = (out / SHARD).stat().st_size
    at = member_at(out / SHARD, "000000014.json")
    (out / SHARD).write_bytes((out / SHARD).read_bytes()[:at])
    found = problems(out)
    assert found[:2] == [
        (SHARD, f"{at:,} bytes where dataset.json says {size:,}: it was cut or changed"),
        (SHARD, WRONG_SHA256),
    ]
    assert found[2][1].startswith(f"cut at byte {at}: the member at byte {at - 512} needs ")
    assert found[3] == (SHARD, "3 samples (number 5, number 6, number 7): it lies behind the end of the tar")
    assert len(found) == 4


def test_swapped_shards(out: Path) -> None:
    other = "train/train-000000.tar"
    (out / SHARD).rename(out / "x")
    (out / other).rename(out / SHARD)
    (out / "x").rename(out / other)
    assert problems(out) == [
        (other, "holds the bytes of train-000001.tar"),
        (SHARD, "holds the bytes of train-000000.tar"),
    ]


def test_swapped_indexes(out: Path) -> None:
    (out / INDEX).rename(out / "x")
    (out / "train/train-000000.idx").rename(out / INDEX)
    (out / "x").rename(out / "train/train-000000.idx")
    found = problems(out)
    assert {file for file, _ in found} == {INDEX, "train/train-000000.idx", SHARD, "train/train-000000.tar"}
    assert any("as sha256 of the shard where dataset.json says" in what for _, what in found)


def test_texts_of_another_sample(out: Path) -> None:
    content = bytearray((out / SHARD).read_bytes())
    at, other = (member_at(out / SHARD, f"0000000{n}.txt") for n in (12, 13))
    size = len("picture number 11")
    content[at : at + size], content[other : other + size] = content[other : other + size], content[at : at + size]
    (out / SHARD).write_bytes(content)
    assert any(
        what == "2 samples (000000012, 000000013): its .txt is not the first caption of its .json"
        for _, what in problems(out)
    )


@pytest.mark.parametrize(
    ("file", "edit", "expected"),
    [
        ("train/dataset.json", lambda card: card.update(num_bytes=7), "num_bytes is 7, but its shards have "),
        ("train/dataset.json", lambda card: card["shards"][0].update(n=9), "its fingerprint is not that of its shards"),
        ("train/dataset.json", lambda card: card.update(fingerprint="0"), "its fingerprint is not that of its shards"),
        ("train/dataset.json", lambda card: card["shards"][0].update(name="../x.tar"), "damaged: it does not describe"),
        ("train/dataset.json", lambda card: card.pop("shards"), "damaged: it does not describe shards"),
        ("train/sizes.json", lambda sizes: sizes.update({"train-000000.tar": 3}), "its samples of each shard are not "),
        ("prepared.json", lambda summary: summary.update(rejects=2), "22 pictures in, but 21 samples, 2 rejects out"),
        ("prepared.json", lambda summary: summary.pop("splits"), "damaged: mlip prepare-data did not write it"),
        ("prepared.json", lambda summary: summary["splits"].pop("test"), ""),
    ],
)
def test_a_changed_count_is_told(out: Path, file: str, edit: Callable[[dict[str, Any]], Any], expected: str) -> None:
    change(out / file, edit)
    found = problems(out)
    assert any(name == file and expected in what for name, what in found) or (
        not expected and ("test", "a split that prepared.json does not name") in found
    ), found


def test_damaged_rejects(out: Path) -> None:
    path = out / "rejects.parquet"
    pq.write_table(pa.table({"file": ["a", "b"]}), path)
    assert problems(out) == [("rejects.parquet", "2 rows where prepared.json says 1 reject")]
    path.write_bytes(path.read_bytes()[:-9])
    ((file, what),) = problems(out)
    assert (file, what[:8]) == ("rejects.parquet", "damaged:")
    path.unlink()
    assert problems(out) == [("rejects.parquet", "missing")]


def test_any_changed_byte_of_a_shard_or_an_index_is_found(out: Path) -> None:
    generator = random.Random(0)
    for file in (SHARD, INDEX):
        content = (out / file).read_bytes()
        places = [*range(HEADER.itemsize)] if file == INDEX else []
        for at in places + [generator.randrange(len(content)) for _ in range(40)]:
            flip(out / file, at)
            found = check(out / "train", num_workers=1).problems
            assert any(problem.file in (Path(file).name, Path(SHARD).name) for problem in found), at
            (out / file).write_bytes(content)


def test_cards_that_are_gone(out: Path) -> None:
    (out / "train/dataset.json").unlink()
    flip(out / SHARD, member_at(out / SHARD, "000000010.json") + 20)
    assert problems(out) == [
        ("train/dataset.json", "missing"),
        (SHARD, "its sha256 is not that which the index says: its bytes were changed"),
        (SHARD, WRONG_CHECKSUM),
        (SHARD, "sample 000000010: its .json is damaged: it holds no captions and sizes of a picture"),
    ]
    (out / "prepared.json").unlink()
    assert problems(out) == [("prepared.json", "missing")]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no dataset.json; prepare it"),
        ({"0.tar": "x"}, "tars without index; prepare them: mlip prepare-data "),
        ({".prepare/request.json": "{}"}, "half prepared; run its mlip prepare-data again, which goes on"),
    ],
)
def test_what_is_not_prepared_data_is_one_line(tmp_path: Path, files: dict[str, str], message: str) -> None:
    write_files(tmp_path / "in", files).mkdir(exist_ok=True)
    with pytest.raises(UsageError) as error:
        check(tmp_path / "in", num_workers=1)
    assert str(error.value).startswith(f"{tmp_path / 'in'}: {message}")
    with pytest.raises(UsageError) as error:
        check(tmp_path / "none", num_workers=1)
    cure = "name what mlip prepare-data wrote, OUT or one split of it"
    assert str(error.value) == f"--check {tmp_path / 'none'}: no such folder; {cure}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "mlip prepare-data: missing argument 'SOURCE'; try mlip prepare-data --help"),
        (["in"], "mlip prepare-data: missing argument 'OUT'; try mlip prepare-data --help"),
        (["in", "out", "--check", "dir"], "--check dir: checks what was prepared before; leave out SOURCE, OUT"),
        (["--limit", "9", "--check", "dir"], "--check dir: checks what was prepared before; leave out --limit"),
    ],
)
def test_either_source_and_out_or_check(words: list[str], message: str) -> None:
    ended = mlip("prepare-data", *words)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", f"error: {message}\n")


def test_problems_are_json_too(out: Path) -> None:
    (out / INDEX).unlink()
    ended = mlip("prepare-data", "--check", str(out), "--json", "--workers", "1")
    assert ended.returncode == 1
    assert json.loads(ended.stdout)["problems"] == [{"file": INDEX, "what": "missing"}]
    assert check(out, num_workers=1).problems == (Problem(INDEX, "missing"),)
