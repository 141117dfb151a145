"""Vectors of pictures in files: made once, read through a memory map, searched exactly.

A folder holds the vectors of one collection of pictures by one model, in any number of files. A file is never changed:
new vectors are a new file, which appears under its name when it is whole, and is named by its content. So a search that
is interrupted keeps what is whole, and two searches at once do not disturb each other.

A file is little endian: a header of 64 bytes, n keys of 8 bytes, then n vectors of fp32. At half precision the order of
near neighbours would not be that of the cosines.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlip_cli.files import atomic_path
from mlip_cli.terminal.output import plural, warn

MAGIC = b"MLIPVEC1"
HEADER = np.dtype(
    [("magic", "S8"), ("n", "<u4"), ("dim", "<u4"), ("crc_keys", "<u4"), ("crc_vectors", "<u4"), ("unused", "V40")]
)
assert HEADER.itemsize == 64
ENDING = ".vectors"

CHECKED_BYTES = 256 << 20
"""So many bytes of vectors are compared with their checksums at each search, in a quarter of a second. Of more, only
headers, lengths and keys are; cosines that are not in [-1, 1] still show some damage."""
CHUNK_ROWS = 16_384
MOST_FILES = 64
"""More files, or more rows that belong to no picture than rows that do, are written anew as one."""
ROUNDING = 1e-4
"""No cosine in fp32 is so far from the true one: candidates so near the last place are compared again in fp64."""


class DamagedVectorsError(Exception):
    """A file whose bytes are not those that were written."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(reason)
        self.path = path


@dataclass(frozen=True)
class Nearest:
    """The pictures nearest to a query, the nearest first."""

    items: NDArray[np.int64]
    """Places among the keys that were searched."""
    cosines: NDArray[np.float64]


@dataclass(frozen=True)
class _File:
    path: Path
    keys: NDArray[np.uint64]
    vectors: NDArray[np.float32]


@dataclass
class VectorFiles:
    """The files of one folder. Vectors have length 1 and `dim` numbers."""

    folder: Path
    dim: int
    _files: list[_File] = field(default_factory=list)

    def open(self) -> None:
        """Look at the files that are there now. A damaged file is deleted, with a warning."""
        self._files = []
        room = CHECKED_BYTES
        for path in self._paths():
            try:
                room -= path.stat().st_size
                self._files.append(_opened(path, self.dim, with_vectors=room >= 0))
            except DamagedVectorsError as error:
                self._drop(error)
            except FileNotFoundError:  # another search has just written it anew in a larger one
                continue

    def missing(self, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The places of the keys that have no vector: (n,) -> (m,), ascending."""
        is_there = np.zeros(len(keys), bool)
        for rows in self._items(keys):
            is_there[rows[rows >= 0]] = True
        return np.flatnonzero(~is_there)

    def add(self, keys: NDArray[np.uint64], vectors: NDArray[np.float32]) -> None:
        """Write vectors: (n,), (n, dim). Where the disk does not take them they are kept for this search.

        Raises:
            OSError: the disk took nothing; the vectors are kept all the same.
        """
        assert vectors.shape == (len(keys), self.dim), f"{vectors.shape} for {len(keys)} keys"
        try:
            path = _write(self.folder, self.dim, [(keys, vectors)])
        except OSError:
            self._files.append(_File(self.folder, keys, vectors))
            raise
        try:
            self._files.append(_opened(path, self.dim, with_vectors=False))
        except FileNotFoundError:  # another search has just written it anew in a larger one
            self._files.append(_File(self.folder, keys, vectors))

    def search(self, queries: NDArray[np.float32], keys: NDArray[np.uint64], *, k: int) -> list[Nearest]:
        """The k nearest of the pictures with these keys to each query: (Q, dim), (n,) -> Q results, exact.

        Of equal cosines the earlier picture comes first. Pictures without a vector are left out.

        Raises:
            DamagedVectorsError: a file is damaged. It is deleted, so that its vectors are missing from now on.
        """
        found = [_Candidates(k) for _ in queries]
        for own, rows in zip(self._files, self._items(keys), strict=True):
            try:
                _collect(found, queries, own, rows)
            except DamagedVectorsError as error:
                self._drop(error)
                self._files.remove(own)
                raise
        return [candidates.nearest(query) for candidates, query in zip(found, queries, strict=True)]

    def tidy(self, keys: NDArray[np.uint64]) -> None:
        """Write the vectors of these keys as one file, if there are many files, or more vectors of other pictures.

        Raises:
            OSError: the disk took nothing; the files stay as they are.
        """
        stored = [own for own in self._files if own.path != self.folder]
        items = self._items(keys)
        num_rows, num_used = sum(len(own.keys) for own in stored), sum(int((rows >= 0).sum()) for rows in items)
        if not stored or (len(stored) <= MOST_FILES and num_rows <= 2 * num_used):
            return
        parts = [
            (own.keys[rows >= 0], own.vectors[rows >= 0])
            for own, rows in zip(self._files, items, strict=True)
            if (rows >= 0).any()
        ]
        path = _write(self.folder, self.dim, parts) if parts else None
        for own in stored:
            if own.path != path:
                own.path.unlink(missing_ok=True)
        self.open()

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob(f"*{ENDING}"))

    def _items(self, keys: NDArray[np.uint64]) -> list[NDArray[np.int64]]:
        """For each file the place among `keys` of each of its rows; -1: there is none, or an earlier row has it."""
        place = _Places(keys)
        taken = np.zeros(len(keys), bool)
        items = []
        for own in self._files:
            rows = place.of(own.keys)
            rows[(rows >= 0) & taken[rows]] = -1
            taken[rows[rows >= 0]] = True
            items.append(rows)
        return items

    def _drop(self, error: DamagedVectorsError) -> None:
        warn(f"{error.path}: damaged ({error}); deleted, and its pictures are encoded again")
        error.path.unlink(missing_ok=True)


class _Places:
    """Where keys stand in an array of keys."""

    def __init__(self, keys: NDArray[np.uint64]) -> None:
        self.keys = keys
        self._order: NDArray[np.int64] | None = None

    def of(self, wanted: NDArray[np.uint64]) -> NDArray[np.int64]:
        """(n,) -> (n,), -1 for a key that is not there. Keys in the order in which they were written need no sort."""
        start = next(iter(np.flatnonzero(self.keys == wanted[0]).tolist()), None)
        if start is not None and np.array_equal(self.keys[start : start + len(wanted)], wanted):
            return np.arange(start, start + len(wanted))
        if not len(self.keys):
            return np.full(len(wanted), -1)
        if self._order is None:
            self._order = np.argsort(self.keys, kind="stable")
        found = self._order[np.minimum(self.keys.searchsorted(wanted, sorter=self._order), len(self.keys) - 1)]
        return np.where(self.keys[found] == wanted, found, -1)


class _Candidates:
    """Rows that may be among the k nearest to one query."""

    def __init__(self, k: int) -> None:
        self.k = k
        self._scores: NDArray[np.float32] = np.zeros(0, np.float32)
        self._items: NDArray[np.int64] = np.zeros(0, np.int64)
        self._vectors: NDArray[np.float32] | None = None

    @property
    def floor(self) -> float:
        """Rows below this cosine are not among the nearest."""
        if len(self._scores) < self.k:
            return -np.inf
        return float(np.partition(self._scores, -self.k)[-self.k]) - ROUNDING

    def take(self, scores: NDArray[np.float32], items: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
        """Keep the rows of a chunk that may count: (n,), (n,), (n, dim)."""
        rows = np.flatnonzero((scores >= self.floor) & (items >= 0))
        if len(rows) > self.k:
            least = np.partition(scores[rows], -self.k)[-self.k] - ROUNDING
            rows = rows[scores[rows] >= least]
        if not len(rows):
            return
        own = vectors[rows]
        self._scores = np.concatenate([self._scores, scores[rows]])
        self._items = np.concatenate([self._items, items[rows]])
        self._vectors = own if self._vectors is None else np.concatenate([self._vectors, own])
        kept = self._scores >= self.floor
        self._scores, self._items, self._vectors = self._scores[kept], self._items[kept], self._vectors[kept]

    def nearest(self, query: NDArray[np.float32]) -> Nearest:
        """The k nearest, by their cosines in fp64."""
        if self._vectors is None:
            return Nearest(np.zeros(0, np.int64), np.zeros(0))
        cosines = self._vectors.astype(np.float64) @ query.astype(np.float64)
        best = np.lexsort((self._items, -cosines))[: self.k]
        return Nearest(self._items[best], cosines[best])


def _collect(found: Sequence[_Candidates], queries: NDArray[np.float32], own: _File, items: NDArray[np.int64]) -> None:
    """Compare the rows of a file with all queries, chunk by chunk: each byte is read once."""
    for start in range(0, len(items), CHUNK_ROWS):
        chunk, part = own.vectors[start : start + CHUNK_ROWS], items[start : start + CHUNK_ROWS]
        if (part < 0).all():
            continue
        scores = queries @ chunk.T
        if not np.abs(scores).max() <= 1 + ROUNDING:  # also false for NaN
            raise DamagedVectorsError(own.path, "a cosine is not in [-1, 1]")
        for candidates, row in zip(found, scores, strict=True):
            candidates.take(row, part, chunk)


def _opened(path: Path, dim: int, *, with_vectors: bool) -> _File:
    """A file once its length, header and checksums are found to be right.

    Raises:
        DamagedVectorsError: they are not. FileNotFoundError: there is no file.
    """
    size, header = path.stat().st_size, np.fromfile(path, HEADER, count=1)
    if len(header) == 0 or header["magic"][0] != MAGIC or header["dim"][0] != dim or header["n"][0] == 0:
        raise DamagedVectorsError(path, "its header is wrong")
    n = int(header["n"][0])
    needed = HEADER.itemsize + n * (8 + 4 * dim)
    if size != needed:
        raise DamagedVectorsError(path, f"{size:,} bytes where {plural(n, 'vector')} need {needed:,}")
    keys = np.fromfile(path, "<u8", count=n, offset=HEADER.itemsize)
    vectors = np.memmap(path, "<f4", mode="r", offset=HEADER.itemsize + 8 * n, shape=(n, dim))
    if zlib.crc32(keys.tobytes()) != header["crc_keys"][0]:
        raise DamagedVectorsError(path, "the checksum of its keys is wrong")
    if with_vectors and zlib.crc32(vectors.data) != header["crc_vectors"][0]:
        raise DamagedVectorsError(path, "the checksum of its vectors is wrong")
    return _File(path, keys, vectors)


def _write(folder: Path, dim: int, parts: Sequence[tuple[NDArray[np.uint64], NDArray[np.float32]]]) -> Path:
    """Write one file of all parts; its path."""
    header = np.zeros(1, HEADER)
    keys = np.concatenate([own for own, _ in parts]).astype("<u8")
    crc = 0
    for chunk in _chunks(parts):
        crc = zlib.crc32(chunk, crc)
    header["magic"], header["n"], header["dim"] = MAGIC, len(keys), dim
    header["crc_keys"], header["crc_vectors"] = zlib.crc32(keys.tobytes()), crc
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{header['crc_keys'][0]:08x}{crc:08x}{ENDING}"
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(header.tobytes())
        file.write(keys.tobytes())
        for chunk in _chunks(parts):
            file.write(chunk)
    return path


def _chunks(parts: Sequence[tuple[NDArray[np.uint64], NDArray[np.float32]]]) -> Iterator[bytes]:
    for _, vectors in parts:
        for start in range(0, len(vectors), CHUNK_ROWS):
            yield np.ascontiguousarray(vectors[start : start + CHUNK_ROWS], dtype="<f4").tobytes()
