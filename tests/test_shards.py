"""Strict reading of tars, and shards that every other reader agrees with."""

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from numpy.typing import NDArray

from mlip_cli.data.index import checksum, index_path, read_records
from mlip_cli.data.prepare import shards
from mlip_cli.data.prepare.fates import decided
from mlip_cli.data.prepare.filters import AS_IT_IS
from mlip_cli.data.prepare.finish import write_shards
from mlip_cli.data.prepare.part_tables import table_path
from mlip_cli.data.prepare.pixels import encode
from mlip_cli.data.prepare.plan import plan_of
from mlip_cli.data.prepare.shards import PART_ROW, sample_parts, tar_writer, verify_tar, write_card
from mlip_cli.data.prepare.workspace import PartResult
from mlip_cli.data.sources.records import SPLITS, json_bytes
from mlip_cli.data.tar import DamagedTarError, read_members
from mlip_cli.errors import RunError

LONG_NAME = "folder/" * 30 + "picture-ä.jpg"


def write_tar(path: Path, format: int) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in ((LONG_NAME, b"x" * 1000), ("empty.txt", b""), ("a.b.json", b"{}" * 300)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for kind, name in ((tarfile.SYMTYPE, "link.jpg"), (tarfile.LNKTYPE, "hard.jpg"), (tarfile.DIRTYPE, "d")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    return path


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_are_those_that_tarfile_finds(tmp_path: Path, format: int) -> None:
    path = write_tar(tmp_path / "x.tar", format)
    ours = [(m.name.rstrip("/"), m.header_offset, m.offset, m.size, m.is_file) for m in read_members(path)]
    with tarfile.open(path) as tar:
        theirs = [(m.name, m.offset, m.offset_data, m.size, m.isreg()) for m in tar]
    assert ours == theirs
    assert ours[0][0] == LONG_NAME
    assert [is_file for *_, is_file in ours] == [True, True, True, False, False, False]


def test_ustar_prefix_makes_the_name_whole(tmp_path: Path) -> None:
    name = "p" * 80 + "/" + "n" * 90
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo(name))
    assert [member.name for member in read_members(tmp_path / "x.tar")] == [name]


def damaged(path: Path) -> str:
    with pytest.raises(DamagedTarError) as error:
        list(read_members(path))
    return str(error.value).removeprefix(f"{path}: ")


def test_every_cut_is_found_and_located(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "x.tar", tarfile.USTAR_FORMAT if len(LONG_NAME) < 100 else tarfile.GNU_FORMAT)
    content = whole.read_bytes()
    last = list(read_members(whole))[-1]
    cut = tmp_path / "cut.tar"
    for length in range(0, last.header_offset + 512 + 1, 256):
        cut.write_bytes(content[:length])
        assert f"cut at byte {length}" in damaged(cut)


def test_damage_is_named_with_its_place(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", tarfile.GNU_FORMAT)
    content = bytearray(path.read_bytes())
    third = list(read_members(path))[2].header_offset
    content[third + 3] ^= 1
    path.write_bytes(content)
    assert damaged(path) == f"no tar header at byte {third}: its checksum is wrong"
    path.write_bytes(b"not a tar" * 100)
    assert damaged(path) == "no tar header at byte 0: b'a tarnot' is not a number"
    path.write_bytes(write_tar(path, tarfile.GNU_FORMAT).read_bytes() * 2)
    assert "more data after the end-of-archive block" in damaged(path)
    path.write_bytes(b"")
    assert damaged(path) == "cut at byte 0: no end-of-archive block"


def sample(i: int) -> dict[str, Any]:
    from PIL import Image

    is_jpeg = i % 3 == 0
    image = encode(Image.new("RGB", (10 + i, 8), (i, 0, 0)), is_jpeg=is_jpeg)
    fields = {
        "captions": [{"text": f"caption\n {j}", "weight": 1.0} for j in range(1 + i % 2)],
        "class": "even" if i % 2 == 0 else None,
        "width": 10 + i,
        "height": 8,
        "original_width": 100,
        "original_height": 80,
    }
    return sample_parts(f"{i:09d}", image=image, format="jpg" if is_jpeg else "webp", fields=fields)


@dataclass(frozen=True)
class StoredSamples:
    """A part: its tar, and the place of each sample there."""

    tar: Path
    records: NDArray[np.void]


def write_split(
    folder: Path, split: str, parts: Sequence[StoredSamples], *, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """All samples of some parts become one split. Returns its card."""
    results = []
    for number, part in enumerate(parts):
        table = np.zeros(len(part.records), PART_ROW)
        table["record"], table["row"], table["split"] = part.records, 1_000 * number, SPLITS.index(split)
        np.save(table_path(part.tar), table)
        results.append(PartResult(number, len(table), part.tar.name, {}))
    plan = plan_of(parts[0].tar.parent, results, holdout=0, decide=partial(decided, cleaning=AS_IT_IS, sets=[]))
    written = write_shards(folder.parent, plan, plan.shards())
    return write_card(folder, split, written[split], provenance=provenance)


def make_parts(folder: Path, n: int, *, part: int, num_tokens: Sequence[int] | None = None) -> list[StoredSamples]:
    """Sample `i` counts `i` tokens unless told otherwise."""
    tokens, stored = list(range(n) if num_tokens is None else num_tokens), []
    for start in range(0, n, part):
        tar, end = folder / f"part-{start}.tar", min(n, start + part)
        with tar_writer(tar) as writer:
            for i in range(start, end):
                writer.write(sample(i))
        stored.append(StoredSamples(tar, verify_tar(tar, tokens[start:end]).records))
    return stored


def test_shards_equal_what_webdataset_writes_and_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_SAMPLES", 8)
    card = write_split(tmp_path / "train", "train", make_parts(tmp_path, 20, part=7), provenance={"tool": "test"})
    assert [shard["n"] for shard in card["shards"]] == [8, 8, 4]
    with webdataset.TarWriter(str(tmp_path / "direct.tar"), mtime=0, encoder=False) as writer:
        for i in range(8, 16):
            writer.write(sample(i))
    second = tmp_path / "train" / "train-000001.tar"
    assert second.read_bytes() == (tmp_path / "direct.tar").read_bytes()
    urls = sorted(str(path) for path in (tmp_path / "train").glob("*.tar"))
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [entry["__key__"] for entry in read] == [f"{i:09d}" for i in range(20)]
    assert all(entry["txt"] == b"caption 0" for entry in read)
    assert read[3]["jpg"] == sample(3)["jpg"]


def test_index_is_tarfiles_own_view(tmp_path: Path) -> None:
    card = write_split(tmp_path / "test", "test", make_parts(tmp_path, 9, part=4), provenance={})
    path = tmp_path / "test" / "test-000000.tar"
    _, records = read_records(index_path(path))
    with tarfile.open(path) as tar:
        members = {member.name: member for member in tar}
        for i, record in enumerate(records):
            format = ("jpg", "png", "webp")[record["format"]]
            parts = {
                "image": members[f"{i:09d}.{format}"],
                "txt": members[f"{i:09d}.txt"],
                "json": members[f"{i:09d}.json"],
            }
            assert record["offset"] == min(member.offset for member in parts.values())
            for name, member in parts.items():
                assert record["offset"] + record[f"{name}_offset"] == member.offset_data
                assert record[f"{name}_size"] == member.size
            read = (parts["image"], parts["json"])
            end = max(member.offset_data + member.size for member in read)
            assert record["crc32"] == checksum(record, path.read_bytes()[int(record["offset"]) : end])
            assert (record["num_captions"], record["num_tokens"]) == (1 + i % 2, i)
    content = path.read_bytes()
    assert card["shards"] == [
        {"name": path.name, "n": 9, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    ]
    assert card["fingerprint"] == hashlib.sha256(json_bytes(card["shards"])).hexdigest()
    assert json.loads((tmp_path / "test" / "dataset.json").read_bytes()) == card
    assert json.loads((tmp_path / "test" / "sizes.json").read_bytes()) == {path.name: 9}


def test_card_counts(tmp_path: Path) -> None:
    parts = make_parts(tmp_path, 6, part=6, num_tokens=[5, 6, 7, 8, 77, 78])
    statistics = write_split(tmp_path / "train", "train", parts, provenance={})["statistics"]
    assert statistics["width"] == {"min": 10, "median": 12.5, "mean": 12.5, "max": 15}
    assert statistics["longest_caption_tokens"]["max"] == 78
    assert statistics["share_over_77_tokens"] == round(1 / 6, 6)
    assert statistics["formats"] == {"jpg": 2, "webp": 4}
    assert statistics["classes"] == {"even": 3}
    assert statistics["captions"]["mean"] == 1.5


def test_shards_end_at_their_size_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 10_000)
    card = write_split(tmp_path / "train", "train", make_parts(tmp_path, 10, part=4), provenance={})
    assert [shard["n"] for shard in card["shards"]] == [3, 3, 3, 1]


def test_verification_sees_what_is_not_as_it_was_written(tmp_path: Path) -> None:
    (part,) = make_parts(tmp_path, 3, part=3)
    record = part.records[1]
    content = part.tar.read_bytes()

    def with_byte(at: int) -> Path:
        changed = bytearray(content)
        changed[at] ^= 0xFF
        path = tmp_path / "changed.tar"
        path.write_bytes(changed)
        return path

    picture = int(record["offset"] + record["image_offset"])
    with pytest.raises(RunError, match=r"000000001\.json or its picture is damaged"):
        verify_tar(with_byte(picture + 8), [1, 1, 1])
    with pytest.raises(RunError, match=r"000000001\.json or its picture is damaged"):
        verify_tar(with_byte(int(record["offset"] + record["json_offset"])), [1, 1, 1])
    with pytest.raises(RunError, match=r"no tar header"):
        verify_tar(with_byte(int(record["offset"])), [1, 1, 1])
    with pytest.raises(RunError, match=r"it has 3 of 4 samples"):
        verify_tar(part.tar, [1, 1, 1, 1])
    with pytest.raises(RunError, match=r"sample '000000002' is not what was written"):
        verify_tar(part.tar, [1, 1])


def test_no_sample_is_a_whole_tar_too(tmp_path: Path) -> None:
    with tar_writer(tmp_path / "none.tar"):
        pass
    verified = verify_tar(tmp_path / "none.tar", np.zeros(0, np.uint16))
    assert len(verified.records) == 0
