"""Damaged tars in prepare-data: refused, or used up to the damage, and tars that change during the work."""

import bz2
import gzip
import lzma
import os
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from sources_for_tests import contents, picture, prepare, rejects, samples, texts, write_sidecars, write_tar

from mlip_cli.data.prepare import assemble
from mlip_cli.errors import RunError, UsageError

COMPRESS = {".tar": bytes, ".tar.gz": gzip.compress, ".tar.bz2": bz2.compress, ".tar.xz": lzma.compress}


def pairs(first: int, n: int) -> dict[str, bytes | str]:
    """Members of samples of pictures and their numbers."""
    members: dict[str, bytes | str] = {}
    for i in range(first, first + n):
        members |= {f"{i:05d}.png": picture(i), f"{i:05d}.txt": f"picture number {i}"}
    return members


def write_tars(folder: Path, *, num_tars: int = 3, each: int = 5) -> Path:
    """Tars of `each` samples."""
    for i in range(num_tars):
        write_tar(folder / f"{i:04d}.tar", pairs(each * i, each))
    return folder


def sources(out: Path) -> dict[tuple[str, int], str]:
    """File and row -> caption of each sample."""
    return {(own["source"]["file"], own["source"]["row"]): own["txt"] for own in samples(out)}


def test_a_damaged_tar_of_three_costs_its_rest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, whole = write_tars(tmp_path / "in"), tmp_path / "whole"
    prepare(source, whole)
    tar = source / "0001.tar"
    os.truncate(tar, 512 * 11)  # five members of two blocks, and the header of the sixth, the text of the third sample
    damage = "cut at byte 5632: the member at byte 5120 needs 16 bytes, 0 are there"
    with pytest.raises(RunError, match=rf"^{tar}: {damage}$"):
        prepare(source, tmp_path / "out")
    with caplog.at_level("INFO"):
        done = prepare(source, tmp_path / "out", damaged="use-start")
    words = f"{damage}; 2 samples before it are used"
    assert rejects(tmp_path / "out") == [("0001.tar", 2, "tar damaged", words)]
    expected = {
        place: text for place, text in sources(whole).items() if place < ("0001.tar", 2) or place[0] > "0001.tar"
    }
    assert sources(tmp_path / "out") == expected
    assert len(expected) == 12
    assert (done["rows"], done["rejects"], done["pictures"]) == (13, 1, 13)
    assert done["reasons"] == {"tar damaged": 1}
    assert done["passed_over"] == {"ends of damaged tars": 1}
    assert f"{tar}: {words}" in [line.getMessage() for line in caplog.records if line.levelname == "WARNING"]
    assert f"not read: 1 end of damaged tars (first: 0001.tar: {words})" in caplog.messages
    assert "  1 x tar damaged" in caplog.messages


def test_the_option_is_remembered_where_it_was_given(tmp_path: Path) -> None:
    source, out = write_tars(tmp_path / "in"), tmp_path / "out"
    assert "damaged" not in prepare(source, out)["request"]
    with pytest.raises(UsageError, match=r"\(damaged none, now use-start\); remove it or name another folder$"):
        prepare(source, out, damaged="use-start")
    assert prepare(source, tmp_path / "other", damaged="use-start")["request"]["damaged"] == "use-start"
    with pytest.raises(UsageError, match=r"\(damaged use-start, now none\); remove it or name another folder$"):
        prepare(source, tmp_path / "other")
    assert contents(out) == contents(tmp_path / "other") | {
        name: own for name, own in contents(out).items() if name.endswith("dataset.json")
    }


def test_whole_tars_give_the_same_samples_with_either_rule(tmp_path: Path) -> None:
    source = write_tars(tmp_path / "in")
    prepare(source, tmp_path / "a")
    prepare(source, tmp_path / "b", damaged="use-start")
    assert texts(tmp_path / "a") == texts(tmp_path / "b")
    assert rejects(tmp_path / "b") == []


def test_what_the_option_is_not_for(tmp_path: Path) -> None:
    tars, folder = write_tars(tmp_path / "tars", num_tars=1), write_sidecars(tmp_path / "in", 2)
    with pytest.raises(UsageError, match=r"^--damaged skip: no such rule; use refuse or use-start$"):
        prepare(tars, tmp_path / "out", damaged="skip")
    with pytest.raises(UsageError, match=rf"^--damaged: for tars only, and {folder} is read as sidecar$"):
        prepare(folder, tmp_path / "out", damaged="use-start")


def test_more_damaged_tars_than_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_tars(tmp_path / "in", num_tars=13, each=2)
    for i in range(12):
        os.truncate(source / f"{i:04d}.tar", 512 * 8 + 100)
    done = prepare(source, tmp_path / "out", damaged="use-start")
    assert done["reasons"] == {"tar damaged": 12}
    named = [line for line in caplog.messages if line.endswith("1 sample before it are used")]
    assert len(named) == 10
    assert f"{source}: 2 more tars are damaged, 12 of 13" in caplog.messages


@pytest.mark.parametrize("ending", list(COMPRESS))
def test_wherever_a_tar_is_damaged_its_samples_before_are_right(ending: str, tmp_path: Path) -> None:
    """Cut, or with a byte changed: samples are a first part of the right ones, and in = samples + rejects."""
    generator = random.Random(7)
    plain = write_tar(tmp_path / "plain.tar", pairs(0, 60)).read_bytes()
    packed = COMPRESS[ending](plain)
    numbers = []
    for number in range(12):
        folder = tmp_path / f"{number}"
        content, at = bytearray(packed), generator.randrange(len(packed) // 4, len(packed) - 40)
        if number % 2:
            content[at] ^= 0x5A
        else:
            del content[at:]
        write_tar(folder / "1.tar", pairs(100, 70))
        (folder / f"0{ending}").write_bytes(content)
        done = prepare(folder, folder.with_suffix(".out"), damaged="use-start")
        lost = [own for own in rejects(folder.with_suffix(".out")) if own[2] == "tar damaged"]
        assert done["pictures"] == done["splits"]["train"]["num_samples"] + done["rejects"]
        found = {place: text for place, text in sources(folder.with_suffix(".out")).items() if place[0] != "1.tar"}
        if not lost:
            assert ending == ".tar"  # a byte in a picture, a text or a name: tars have no checksums of those
            continue
        [(file, row, _, detail)] = lost
        assert file == f"0{ending}"
        assert detail.endswith(f"; {row} samples before it are used")
        numbers.append(row)
        assert not (row and number % 2 and ending != ".tar" and "damaged" in detail)  # a byte is wrong somewhere before
        assert all(text == f"picture number {own}" for (_, own), text in found.items())
        assert done["rows"] == 70 + row + 1
    assert len(set(numbers)) > 3 or ending == ".tar.bz2"  # so small a one is one block, all or nothing


def changed_during_work(monkeypatch: pytest.MonkeyPatch, change: Callable[[], None]) -> None:
    """Do `change` when the rows are counted and the work begins."""
    run_parallel = assemble.run_parallel

    def changed(*arguments: Any, **options: Any) -> Iterator[Any]:
        change()
        yield from run_parallel(*arguments, **options)

    monkeypatch.setattr(assemble, "run_parallel", changed)


@pytest.mark.parametrize("damaged", ["refuse", "use-start"])
@pytest.mark.parametrize("what", ["shrinks", "grows", "goes", "is touched"])
def test_a_tar_that_changes_during_the_work_is_named(
    damaged: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_tars(tmp_path / "in"), tmp_path / "out"
    tar = source / "0002.tar"
    changes: Mapping[str, Callable[[], None]] = {
        "shrinks": lambda: os.truncate(tar, 3000),
        "grows": lambda: tar.write_bytes(tar.read_bytes() + bytes(10240)),
        "goes": tar.unlink,
        "is touched": lambda: os.utime(tar, (1, 1)),
    }
    changed_during_work(monkeypatch, changes[what])
    words = rf"^{tar}: has changed since it was first read; start again when nothing writes to it$"
    with pytest.raises(RunError, match=words):
        prepare(source, out, damaged=damaged)
    assert not (out / "prepared.json").exists()


def test_pictures_that_vanish_during_the_work_are_rejects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_sidecars(tmp_path / "in", 6), tmp_path / "out"

    def change() -> None:
        (source / "00001.png").unlink()
        (source / "00003.txt").unlink()

    changed_during_work(monkeypatch, change)
    done = prepare(source, out)
    assert [own[0::2] for own in rejects(out)] == [("00001.png", "picture missing"), ("00003.png", "no caption")]
    assert (done["rows"], done["rejects"], done["splits"]["train"]["num_samples"]) == (6, 2, 4)


def test_an_earlier_request_without_the_option_is_still_the_same(tmp_path: Path) -> None:
    source, out = write_tars(tmp_path / "in", num_tars=1), tmp_path / "out"
    done = prepare(source, out)
    assert prepare(source, out, damaged="refuse") == done
