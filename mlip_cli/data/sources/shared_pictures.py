"""Rows that name the same picture become one record with all their captions."""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from mlip_cli.data.sources.records import Caption, Picture, PictureBytes, Record, checked_captions, hash_of_text


@dataclass
class SharedPictures:
    """How many rows name each picture: 8 bytes a row while they are counted, 12 a picture then."""

    seen: "array[int]" = field(default_factory=lambda: array("Q"))
    hashes: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    """Hashes of the names of the pictures, sorted."""
    num_rows: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    """How many rows name each picture."""

    def add(self, record: Record) -> None:
        """Note a row that can be used."""
        self.seen.append(hash_of_text(record.same))

    def count(self) -> None:
        """Find out which pictures several rows name, after the last row."""
        hashes = np.frombuffer(self.seen, np.uint64)  # which keeps the array
        self.seen = array("Q")
        hashes.sort()
        is_first = np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)]
        if is_first.all():
            self.hashes, self.num_rows = hashes, np.ones(len(hashes), np.int32)
            return
        firsts = np.flatnonzero(is_first)
        self.num_rows = np.diff(firsts, append=len(hashes)).astype(np.int32)
        self.hashes = hashes[firsts]

    @property
    def num_pictures(self) -> int:
        """How many pictures the counted rows name."""
        return len(self.hashes)

    def fewest_and_most(self) -> tuple[int, int]:
        """The fewest and the most rows that name one picture; 0 and 0 if no row names one."""
        return (int(self.num_rows.min()), int(self.num_rows.max())) if len(self.num_rows) else (0, 0)

    def rows_of(self, name: str) -> int:
        """How many rows name this picture, by `same` of their records."""
        wanted = np.uint64(hash_of_text(name))  # an int below 2^63 would turn all hashes into floats, every time
        place = int(self.hashes.searchsorted(wanted))
        is_there = place < len(self.hashes) and self.hashes[place] == wanted
        return int(self.num_rows[place]) if is_there else 0

    def merged(self, records: Iterable[Record]) -> Iterator[Record]:
        """Records of the same rows, one a picture, in the order in which pictures have all their rows.

        A row that is a reject stays by itself. Memory holds the texts of the pictures whose rows are not complete, not
        their bytes: the last row has those.
        """
        if self.fewest_and_most()[1] <= 1:
            yield from records
            return
        waiting: dict[str, _Joined] = {}
        for record in records:
            num_rows = self.rows_of(record.same) if record.same and not record.reject else 1
            if num_rows <= 1:
                yield record
                continue
            if record.same not in waiting:
                waiting[record.same] = _Joined(record)
            joined = waiting[record.same]
            joined.add(record)
            if joined.num_rows == num_rows:
                yield waiting.pop(record.same).whole(record.picture)
        for joined in waiting.values():  # two pictures of one hash; one that lies in the rows becomes a reject
            yield joined.whole(joined.first.picture)


class _Joined:
    """What is needed of the rows of one picture until its last row."""

    __slots__ = ("captions", "first", "labels", "num_rows", "splits")

    def __init__(self, first: Record) -> None:
        kept = None if isinstance(first.picture, PictureBytes) else first.picture
        self.first, self.num_rows = replace(first, picture=kept, captions=()), 0
        self.captions: list[Caption] = []
        self.splits: tuple[str, ...] = ()
        self.labels: tuple[str, ...] = ()

    def add(self, row: Record) -> None:
        """Join a row, the first one too. What only some rows say is left out of `meta`."""
        self.num_rows += 1
        self.captions += row.captions
        self.splits = _with(self.splits, row.split)
        self.labels = _with(self.labels, row.label)
        meta = {key: value for key, value in self.first.meta.items() if row.meta.get(key) == value}
        if len(meta) < len(self.first.meta):
            self.first = replace(self.first, meta=meta)

    def whole(self, picture: Picture | None) -> Record:
        """The record of all rows."""
        joined = replace(
            self.first,
            picture=picture,
            captions=tuple(self.captions),
            split=min(self.splits, default=None),
            label=min(self.labels, default=None),
            num_rows=self.num_rows,
        )
        for what, found in (("split", self.splits), ("class", self.labels)):
            if len(found) > 1:
                values = " and ".join(sorted(found)[:3])
                detail = f"{joined.detail}: {values}"
                return replace(joined, reject=f"rows of one picture differ in {what}", detail=detail)
        return checked_captions(joined)


def _with(known: tuple[str, ...], value: str | None) -> tuple[str, ...]:
    return known if not value or value in known else (*known, value)
