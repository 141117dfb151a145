"""A set of ids of rows, 16 bytes each: DataComp's .npy of pairs of 64 bits, or a text with an id a line."""

import re
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError

import numpy as np
from numpy.typing import NDArray

from mlip_cli.data.sources.records import hash_of_text
from mlip_cli.data.sources.text_tables import opened_text
from mlip_cli.errors import UsageError
from mlip_cli.paths import escaped

UID_COLUMNS = ("uid", "key", "id")
"""The column that --uids asks is the first of these."""
NPY = b"\x93NUMPY"
LONGEST_UID = 4_096
HEXADECIMAL = re.compile("[0-9a-fA-F]{32}")
LOW = (1 << 64) - 1


@dataclass(frozen=True)
class Uids:
    """The ids, sorted, each as the high and the low half of 128 bits."""

    path: Path
    high: memoryview
    low: memoryview
    met: bytearray
    """For each id, whether a row had it."""

    def __len__(self) -> int:
        return len(self.met)

    def __contains__(self, uid: str) -> bool:
        high, low = divmod(_number(uid), 1 << 64)
        place = bisect_left(self.high, high)
        while place < len(self.met) and self.high[place] == high:
            if self.low[place] == low:
                self.met[place] = 1
                return True
            place += 1
        return False

    def unmet(self) -> str | None:
        """A warning if no row had some of the ids."""
        num_unmet = self.met.count(0)
        if not num_unmet:
            return None
        return f"--uids {escaped(str(self.path))}: no row has {num_unmet:,} of its {len(self):,} uids"


def read_uids(path: Path) -> Uids:
    """The ids of a file.

    Raises:
        UsageError: it cannot be read, is of another kind, or holds no ids.
    """
    try:
        with open(path, "rb") as file:
            is_array = file.read(len(NPY)) == NPY
    except OSError as error:
        raise UsageError(f"--uids {escaped(str(path))}: cannot be read ({error.strerror})") from None
    high, low = _of_array(path) if is_array else _of_text(path)
    if not len(high):
        raise UsageError(f"--uids {escaped(str(path))}: holds no uids")
    order = np.lexsort((low, high))
    high, low = high[order], low[order]
    is_new = np.ones(len(high), bool)
    is_new[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    high, low = high[is_new], low[is_new]
    return Uids(path, high.data, low.data, bytearray(len(high)))


def _of_array(path: Path) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OverflowError, TokenError, EOFError, OSError) as error:
        raise UsageError(f"--uids {escaped(str(path))}: not a whole .npy of numbers ({error})") from None
    if found.ndim != 1 or found.dtype.names is None or [found.dtype[i] for i in range(len(found.dtype))] != ["u8"] * 2:
        raise UsageError(
            f"--uids {escaped(str(path))}: an array of {found.dtype} and shape {found.shape}; DataComp's are of u8,u8 "
            "and shape (n,); or write a text with a uid a line"
        )
    first, second = found.dtype.names
    return np.array(found[first], np.uint64), np.array(found[second], np.uint64)


def _of_text(path: Path) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    high, low = array("Q"), array("Q")
    for uid in _lines(path):
        number = _number(uid)
        high.append(number >> 64)
        low.append(number & LOW)
    return np.frombuffer(high, np.uint64), np.frombuffer(low, np.uint64)


def _lines(path: Path) -> Iterator[str]:
    with opened_text(path) as file:
        while line := file.readline(LONGEST_UID + 2):
            if len(line) > LONGEST_UID:
                raise UsageError(f"--uids {escaped(str(path))}: not a text with a uid a line: a line is very long")
            if "\0" in line:
                raise UsageError(
                    f"--uids {escaped(str(path))}: neither a .npy nor a text with a uid a line: it has NULs"
                )
            if uid := line.strip():
                yield uid


def _number(uid: str) -> int:
    """128 bits: those of 32 hexadecimal digits, as DataComp's uids are, or a hash of another text."""
    if HEXADECIMAL.fullmatch(uid):
        return int(uid, 16)
    return hash_of_text(uid, num_bytes=16)
