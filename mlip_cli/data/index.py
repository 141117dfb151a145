"""SHARD.idx, the index that makes reading a sample one `pread`, and dataset.json, the card of a folder of shards.

An index is little endian: a header of 56 bytes, then one record of 40 bytes a sample, in the order of the tar.
Indexes of the first format hold width and height in the place of `crc32`. They are read, but not all damage shows.
"""

import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlip_cli.data.tar import BLOCK, Member
from mlip_cli.errors import RunError, UsageError
from mlip_cli.files import parse_object, write_bytes

INDEX_MAGIC = b"MLIPIDX2"
WITHOUT_CHECKSUMS = b"MLIPIDX1"
"""Of indexes that were written before samples had checksums."""
FORMATS = ("jpg", "png", "webp")
MAX_TOKENS = 65_535
"""The most that a record can hold; longer captions are recorded as this long."""
CURE = "prepare the data again (mlip prepare-data)"

HEADER = np.dtype([("magic", "S8"), ("n", "<u4"), ("crc32", "<u4"), ("tar_bytes", "<u8"), ("sha256", "V32")])
RECORD = np.dtype(
    [
        ("offset", "<u8"),  # of the first tar header of the sample
        ("image_offset", "<u4"),  # from there; of the bytes, but in a tar not ours of the first header; likewise below
        ("image_size", "<u4"),  # 0: the sample has no such part; likewise below
        ("txt_offset", "<u4"),
        ("txt_size", "<u4"),
        ("json_offset", "<u4"),
        ("json_size", "<u4"),
        ("crc32", "<u4"),  # see `checksum`; 0 for tars that mlip did not write
        ("format", "u1"),  # place in FORMATS; 0 for tars that mlip did not write
        ("num_captions", "u1"),
        ("num_tokens", "<u2"),  # CLIP tokens of the longest caption, BOS and EOS included, before any cut
    ]
)
CRC_AT: int = RECORD.fields["crc32"][1]  # type: ignore[index]
assert HEADER.itemsize == 56
assert RECORD.itemsize == 40


def index_path(shard: Path) -> Path:
    """train-000000.tar -> train-000000.idx"""
    return shard.with_suffix(".idx")


def place_parts(record: np.void, members: Mapping[str, Member], *, by_header: bool = False) -> None:
    """Write into a record where the parts of its sample lie: their bytes, or the first header of each.

    Raises:
        ValueError: a part ends 4 GiB or more behind the start of the sample.
    """
    record["offset"] = start = min(member.header_offset for member in members.values())
    for part, member in members.items():
        if member.offset + member.size - start >= 2**32:
            raise ValueError("larger than 4 GiB")
        record[f"{part}_offset"] = (member.header_offset if by_header else member.offset) - start
        record[f"{part}_size"] = member.size


class Place(NamedTuple):
    """Where a record says that its sample lies."""

    start: int
    """Byte of the tar at which the first header of the sample begins."""
    end: int
    """Byte behind the last part that is read."""
    parts: dict[str, tuple[int, int]]
    """Part -> the byte of the tar at which its first header begins, and the number of its bytes."""
    crc32: int
    format: int
    """Of the picture: its place in FORMATS, if the index is not damaged."""


def place_of(record: np.void, *, is_prepared: bool) -> Place:
    """Read all fields of a record at once. Field by field, numpy takes several times as long.

    Args:
        is_prepared: mlip wrote the tar. Each part has one header, and KEY.txt is not read: KEY.json repeats it.
    """
    start, image, image_size, txt, txt_size, json_at, json_size, crc32, format, *_ = record.item()
    at = start - BLOCK if is_prepared else start
    read = {"image": (at + image, image_size), "json": (at + json_at, json_size)}
    if not is_prepared:
        read["txt"] = at + txt, txt_size
    parts = {part: place for part, place in read.items() if place[1]}
    end = max((header + size for header, size in parts.values()), default=start)
    return Place(start, end + BLOCK, parts, crc32, format)


def checksum(record: np.void, content: bytes) -> int:
    """crc32 of a record but for its own checksum, and then of the bytes of the tar from `start` to `end` of its place.

    So it knows which bytes are the picture and which the captions, not only that all are there.
    """
    own = record.tobytes()
    return zlib.crc32(content, zlib.crc32(own[:CRC_AT] + own[CRC_AT + 4 :]))


def write_index(shard: Path, records: np.ndarray, *, tar_bytes: int, sha256: str) -> None:
    """Write the index beside `shard`; `sha256` (hex) and `tar_bytes` are those of the tar."""
    assert records.dtype == RECORD
    header = np.zeros(1, HEADER)
    header["magic"], header["n"], header["tar_bytes"] = INDEX_MAGIC, len(records), tar_bytes
    header["crc32"] = zlib.crc32(records.tobytes())
    header["sha256"] = np.void(bytes.fromhex(sha256))
    write_bytes(index_path(shard), header.tobytes() + records.tobytes())


def read_checked(index: Path) -> tuple[np.void, np.ndarray]:
    """As `read_records`, once the checksum of the records is found to be right.

    Raises:
        RunError: no index, or a damaged one.
    """
    header, records = read_records(index)
    stated = int(header["crc32"])
    if stated and zlib.crc32(records.tobytes()) != stated:  # 0: written before there were checksums
        raise RunError(f"{index}: damaged: its checksum is wrong; {CURE}")
    return header, records


def has_checksums(header: np.void) -> bool:
    """Whether the samples of the index have checksums."""
    return bool(header["magic"] == INDEX_MAGIC)


def check_is_named(index: Path, header: np.void, shard: Mapping[str, Any]) -> None:
    """Check that an index is the one that a shard of dataset.json means, as far as both say.

    Raises:
        RunError: it belongs to another shard.
    """
    own = {"n": int(header["n"]), "bytes": int(header["tar_bytes"]), "sha256": bytes(header["sha256"]).hex()}
    names = {"n": "samples", "bytes": "bytes", "sha256": "as sha256 of the shard"}
    for name, words in names.items():
        if name in shard and shard[name] != own[name]:
            raise RunError(f"{index}: {own[name]} {words} where dataset.json says {shard[name]}; {CURE}")


def check_size(tar: Path, header: np.void) -> None:
    """Check that the tar has the length that the header of its index says.

    Raises:
        RunError: it is missing, or shorter or longer.
    """
    try:
        size = tar.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"{tar}: the shard is missing although its index is there; {CURE}") from None
    if size != int(header["tar_bytes"]):
        raise RunError(
            f"{tar}: {size} bytes where the index says {int(header['tar_bytes'])}; the shard was cut or changed: {CURE}"
        )


def read_records(path: Path) -> tuple[np.void, np.ndarray]:
    """HEADER of an index and its records (n,) of RECORD, as a memory map; the tar need not be there.

    Raises:
        RunError: no index, or a damaged one.
    """
    try:
        with open(path, "rb") as file:  # once: on a network disk every open is a question to its server
            size, header = os.fstat(file.fileno()).st_size, np.fromfile(file, HEADER, count=1)
            if len(header) == 0 or header["magic"][0] not in (INDEX_MAGIC, WITHOUT_CHECKSUMS):
                raise RunError(f"{path}: not an index of mlip; {CURE}")
            n = int(header["n"][0])
            needed = HEADER.itemsize + n * RECORD.itemsize
            if size != needed:
                raise RunError(f"{path}: {size} bytes where {n} samples need {needed}; {CURE}")
            if n == 0:
                return header[0], np.zeros(0, RECORD)
            return header[0], np.memmap(file, RECORD, mode="r", offset=HEADER.itemsize, shape=(n,))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise RunError(f"{path}: no index for {path.with_suffix('.tar').name}; {CURE}") from None


def parse_card(content: bytes, *, place: str, folder: str) -> dict[str, Any]:
    """The card of `folder` from the bytes of its dataset.json at `place`.

    Raises:
        UsageError: it is not a card of mlip, or its data set holds no samples.
    """
    try:
        card = parse_object(content)
        shards = [(shard["name"], int(shard["n"])) for shard in card["shards"]]
        fingerprint = card["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{place}: not written by mlip prepare-data ({error!r}); prepare the data again") from error
    if not fingerprint or sum(n for _, n in shards) == 0:
        raise UsageError(f"{folder}: the data set holds no samples; prepare it again (mlip prepare-data)")
    return card
