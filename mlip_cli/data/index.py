"""SHARD.idx, the sidecar that makes a sample one `pread`.

Little endian: a header of 56 bytes, then one record of 40 bytes a sample, in the order of the tar.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from mlip_cli.errors import RunError, UsageError
from mlip_cli.files import write_bytes

MAGIC = b"MLIPIDX1"
FORMATS = ("jpg", "png", "webp")
CURE = "prepare the data again (mlip prepare-data)"

HEADER = np.dtype([("magic", "S8"), ("n", "<u4"), ("crc32", "<u4"), ("tar_bytes", "<u8"), ("sha256", "V32")])
RECORD = np.dtype(
    [
        ("offset", "<u8"),  # of the sample's first tar header
        ("image_offset", "<u4"),  # of the bytes, from there; likewise below
        ("image_size", "<u4"),
        ("txt_offset", "<u4"),
        ("txt_size", "<u4"),
        ("json_offset", "<u4"),
        ("json_size", "<u4"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("format", "u1"),  # place in FORMATS
        ("num_captions", "u1"),
        ("num_tokens", "<u2"),  # CLIP tokens of the longest caption, BOS and EOS included, before any cut
    ]
)
assert HEADER.itemsize == 56
assert RECORD.itemsize == 40


def index_path(shard: Path) -> Path:
    """train-000000.tar -> train-000000.idx"""
    return shard.with_suffix(".idx")


def write_index(shard: Path, records: np.ndarray, *, tar_bytes: int, sha256: str) -> None:
    """Write the index beside `shard`; `sha256` (hex) and `tar_bytes` are those of the tar."""
    assert records.dtype == RECORD
    header = np.zeros(1, HEADER)
    header["magic"], header["n"], header["tar_bytes"] = MAGIC, len(records), tar_bytes
    header["crc32"] = zlib.crc32(records.tobytes())
    header["sha256"] = np.void(bytes.fromhex(sha256))
    write_bytes(index_path(shard), header.tobytes() + records.tobytes())


def read_index(shard: Path) -> np.ndarray:
    """Records of `shard` as a memory map (n,) of RECORD.

    Raises:
        RunError: no index, a damaged one, or a tar of another size than the index was made for.
    """
    header, records = read_records(index_path(shard))
    try:
        size = shard.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"{shard}: the shard is missing although its index is there; {CURE}") from None
    if size != int(header["tar_bytes"]):
        raise RunError(
            f"{shard}: {size} bytes where the index says {int(header['tar_bytes'])}; "
            f"the shard was cut or changed: {CURE}"
        )
    return records


def check_records(path: Path) -> None:
    """See that the records of an index are those that were written.

    Raises:
        RunError: a bit of them has changed.
    """
    header, records = read_records(path)
    stated = int(header["crc32"])
    if stated and zlib.crc32(records.tobytes()) != stated:  # 0: written before there were checksums
        raise RunError(f"{path}: damaged, its checksum is wrong; {CURE}")


def read_records(path: Path) -> tuple[np.void, np.ndarray]:
    """HEADER of an index and its records, whether its shard is there or not.

    Raises:
        RunError: no index, or a damaged one.
    """
    try:
        return _read_records(path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):  # also one that goes while it is read
        raise RunError(f"{path}: no index for {path.with_suffix('.tar').name}; {CURE}") from None


def _read_records(path: Path) -> tuple[np.void, np.ndarray]:
    size = path.stat().st_size
    header = np.fromfile(path, HEADER, count=1)
    if len(header) == 0 or header["magic"][0] != MAGIC:
        raise RunError(f"{path}: not an index of mlip; {CURE}")
    n = int(header["n"][0])
    if size != HEADER.itemsize + n * RECORD.itemsize:
        raise RunError(f"{path}: {size} bytes where {n} samples need {HEADER.itemsize + n * RECORD.itemsize}; {CURE}")
    if n == 0:
        return header[0], np.zeros(0, RECORD)
    return header[0], np.memmap(path, RECORD, mode="r", offset=HEADER.itemsize, shape=(n,))


def parse_card(content: bytes, *, place: str, folder: str) -> dict[str, Any]:
    """The card of `folder` from the bytes of its dataset.json at `place`.

    Raises:
        UsageError: it is no card, or one of no samples.
    """
    try:
        card = json.loads(content)
        shards = [(shard["name"], int(shard["n"])) for shard in card["shards"]]
        fingerprint = card["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{place}: not written by mlip prepare-data ({error!r}); prepare the data again") from error
    if not fingerprint or sum(n for _, n in shards) == 0:
        raise UsageError(f"{folder}: the data set holds no samples; prepare it again (mlip prepare-data)")
    return dict(card)
