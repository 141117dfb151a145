"""Write samples to tars, index finished tars, and make a folder of shards with its card."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlip_cli.data.index import (
    FORMATS,
    RECORD,
    check_size,
    checksum,
    index_path,
    place_of,
    place_parts,
    read_checked,
    write_index,
)
from mlip_cli.data.prepare.statistics import ShardStatistics, merged, statistics_of
from mlip_cli.data.sources.records import json_bytes
from mlip_cli.data.tar import BLOCK, Member, read_members
from mlip_cli.errors import RunError
from mlip_cli.files import atomic_path, write_json

if TYPE_CHECKING:
    from webdataset.writer import TarWriter

SHARD_SAMPLES = 10_000
SHARD_BYTES = 512 << 20
TAR_RECORD = 20 * BLOCK
"""Tars are padded to a multiple of this."""

KEY = re.compile(r"[0-9a-z_-]+")
FIRST_BYTES = {"jpg": (0, b"\xff\xd8\xff"), "png": (0, b"\x89PNG"), "webp": (8, b"WEBP")}
"""Format of a stored picture -> a place in its head, and the bytes that stand there."""
PART_ROW = np.dtype(
    [
        ("row", "<u8"),  # place in the whole source, the number in the key
        ("record", RECORD),  # in the part's tar
        ("sha256", "V16"),  # the first half of that of the source's bytes
        ("pixels", "<u8"),  # `hash_pixels`
        ("perceptual", "<u8"),  # `hash_look`, or 0 where nothing is compared by it
        ("split", "u1"),  # place in SPLITS; 255: the source says none
    ]
)
"""A sample of a part."""


@contextmanager
def tar_writer(path: Path) -> Iterator["TarWriter"]:
    """Write samples to a tar at `path`: the same bytes every time."""
    from webdataset.writer import TarWriter

    with open(path, "wb") as file, TarWriter(file, mtime=0, encoder=False) as writer:
        yield writer


def sample_parts(key: str, *, image: bytes, format: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A sample for `TarWriter`: KEY.json, KEY.txt (first caption, on one line) and the picture."""
    text = " ".join(fields["captions"][0]["text"].split())
    return {"__key__": key, format: image, "json": json_bytes(fields), "txt": text.encode()}


@dataclass(frozen=True)
class VerifiedTar:
    """A written tar, read again."""

    records: NDArray[np.void]
    """(n,) of RECORD."""
    num_bytes: int
    sha256: str


def verify_tar(path: Path, num_tokens: Sequence[int] | NDArray[np.uint16]) -> VerifiedTar:
    """Read a tar of ours from the disk again and index it. `num_tokens` is (n,): tokens of each longest caption.

    Raises:
        RunError: it does not hold what was written: whole samples of picture, text and JSON with keys of their own.
    """
    records = np.zeros(len(num_tokens), RECORD)
    records["num_tokens"] = num_tokens
    keys: set[str] = set()
    with open(path, "rb") as file:
        for key, members in groupby(read_members(path), key=lambda member: member.name.rpartition(".")[0]):
            parts = {member.name.rpartition(".")[2]: member for member in members}
            if not KEY.fullmatch(key) or key in keys or len(keys) == len(records):
                raise RunError(f"{path}: read again, its sample {key!r} is not what was written; is the disk sound?")
            _index_sample(path, file.fileno(), records[len(keys)], parts)
            keys.add(key)
        num_bytes = os.fstat(file.fileno()).st_size
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if len(keys) != len(records):
        raise RunError(f"{path}: read again, it has {len(keys)} of {len(records)} samples; is the disk sound?")
    return VerifiedTar(records, num_bytes, sha256)


def _index_sample(path: Path, descriptor: int, record: np.void, parts: Mapping[str, Member]) -> None:
    """Fill `record` except for its tokens."""
    format = next((known for known in FORMATS if known in parts), "")
    if set(parts) != {"json", "txt", format}:
        raise RunError(f"{path}: read again, a sample has the parts {sorted(parts)}; is the disk sound?")
    place_parts(record, {"image": parts[format], "txt": parts["txt"], "json": parts["json"]})
    at, first_bytes = FIRST_BYTES[format]
    head = os.pread(descriptor, 16, parts[format].offset)
    try:
        fields: dict[str, Any] = json.loads(os.pread(descriptor, parts["json"].size, parts["json"].offset))
    except ValueError:
        fields = {}
    if not fields or head[at : at + len(first_bytes)] != first_bytes:
        raise RunError(f"{path}: read again, {parts['json'].name} or its picture is damaged; is the disk sound?")
    record["format"], record["num_captions"] = FORMATS.index(format), len(fields["captions"])
    place = place_of(record, is_prepared=True)
    record["crc32"] = checksum(record, os.pread(descriptor, place.end - place.start, place.start))


COPIED = ("image_size", "txt_size", "json_size", "format", "num_captions", "num_tokens")
"""Fields of a record that are the same in the part and in the shard."""


def write_shard(path: Path, tars: Sequence[Path], records: NDArray[np.void]) -> VerifiedTar:
    """Copy samples from parts into a shard, verify it, and index it last. A finished shard is kept and read again.

    Args:
        tars: (n,): the tar of the part that holds each sample.
        records: (n,) of RECORD: the place of each sample there.

    Raises:
        RunError: the disk does not keep what is written, or a part is gone or has changed.
    """
    num_tokens = records["num_tokens"]
    if is_finished(path, records):
        return verify_tar(path, num_tokens)
    with atomic_path(path) as temporary:
        _copy_samples(temporary, tars, records)
        verified = verify_tar(temporary, num_tokens)
    write_index(path, verified.records, tar_bytes=verified.num_bytes, sha256=verified.sha256)
    return verified


def is_finished(path: Path, records: NDArray[np.void]) -> bool:
    """Whether a shard and its index, which is written after it, are there and hold samples of just these sizes."""
    try:
        header, written = read_checked(index_path(path))
        check_size(path, header)
    except RunError:
        return False
    return len(written) == len(records) and all((written[name] == records[name]).all() for name in COPIED)


@dataclass
class WrittenSplit:
    """The shards of a split that are written so far, in order."""

    shards: list[dict[str, Any]]
    """name, n, bytes and sha256 of each, as dataset.json lists them."""
    statistics: ShardStatistics

    @classmethod
    def first(cls, path: Path, tar: VerifiedTar) -> "WrittenSplit":
        """A split of one shard."""
        listed = {"name": path.name, "n": len(tar.records), "bytes": tar.num_bytes, "sha256": tar.sha256}
        return cls([listed], statistics_of(path, tar.records))

    def add(self, other: "WrittenSplit") -> None:
        """Put other shards behind these."""
        self.shards += other.shards
        self.statistics = merged([self.statistics, other.statistics])


def write_card(folder: Path, split: str, written: WrittenSplit, *, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Write dataset.json and sizes.json of a folder whose shards are written.

    Returns:
        The card that dataset.json holds.
    """
    card = {
        "split": split,
        "num_samples": sum(shard["n"] for shard in written.shards),
        "num_bytes": sum(shard["bytes"] for shard in written.shards),
        "fingerprint": hashlib.sha256(json_bytes(written.shards)).hexdigest(),
        "shards": written.shards,
        "statistics": written.statistics.as_json(),
        "provenance": provenance,
    }
    write_json(folder / "sizes.json", {shard["name"]: shard["n"] for shard in written.shards})
    write_json(folder / "dataset.json", card)
    return card


def shard_bounds(sizes: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Start and end of shards of at most SHARD_SAMPLES samples and about SHARD_BYTES; `sizes` is (n,) bytes."""
    ends = np.cumsum(sizes)
    start = 0
    while start < len(sizes):
        before = int(ends[start - 1]) if start else 0
        fitting = int(np.searchsorted(ends, before + SHARD_BYTES, side="right"))
        end = max(start + 1, min(fitting, start + SHARD_SAMPLES))
        yield start, end
        start = end


def sample_ends(records: NDArray[np.void]) -> NDArray[np.int64]:
    """Byte after the last padded member of each sample."""
    ends = np.zeros(len(records), np.int64)
    for part in ("image", "txt", "json"):
        np.maximum(ends, records[f"{part}_offset"].astype(np.int64) + records[f"{part}_size"], out=ends)
    return records["offset"].astype(np.int64) + (ends + BLOCK - 1) // BLOCK * BLOCK


def _copy_samples(path: Path, tars: Sequence[Path], records: NDArray[np.void]) -> None:
    """Copy headers and bytes of each sample from its tar as they are; end the archive as `tarfile` does."""
    spans = zip(tars, records, sample_ends(records).tolist(), strict=True)
    with open(path, "wb") as out:
        for tar, of_tar in groupby(spans, key=lambda span: span[0]):
            with open_part(tar) as descriptor:
                for _, record, end in of_tar:
                    place = place_of(record, is_prepared=True)
                    content = os.pread(descriptor, end - place.start, place.start)
                    if checksum(record, content[: place.end - place.start]) != place.crc32:
                        raise RunError(f"{tar}: changed since it was written; {start_again(tar)}; is the disk sound?")
                    out.write(content)
        end = out.tell() + 2 * BLOCK
        out.write(bytes(2 * BLOCK + -end % TAR_RECORD))


def start_again(tar: Path) -> str:
    """What helps where a file of the part with this tar is damaged."""
    return f"remove {str(tar).partition('/.prepare/')[0]}, start again"


@contextmanager
def open_part(tar: Path) -> Iterator[int]:
    """A descriptor of a part's tar.

    Raises:
        RunError: it is gone.
    """
    try:
        descriptor = os.open(tar, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise RunError(f"{tar}: is gone, and samples of it are in no shard yet; {start_again(tar)}") from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)
