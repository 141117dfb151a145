"""Rows that name the same picture become one record with all their captions."""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from mlip_cli.data.sources.records import Record, checked_captions, hash_of_text


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

        A row that is a reject stays by itself. Memory holds the pictures whose rows are not complete.
        """
        if self.fewest_and_most()[1] <= 1:
            yield from records
            return
        waiting: dict[str, list[Record]] = {}
        for record in records:
            num_rows = self.rows_of(record.same) if record.same and not record.reject else 1
            if num_rows <= 1:
                yield record
                continue
            rows = waiting.setdefault(record.same, [])
            if rows:
                rows[-1] = replace(rows[-1], picture=None)  # the last row has it too, and bytes take room
            rows.append(record)
            if len(rows) == num_rows:
                yield _one(waiting.pop(record.same))
        yield from map(_one, waiting.values())  # two pictures of one hash


def _one(rows: list[Record]) -> Record:
    """One record of rows that name one picture. What only some of them say of it is left out of `meta`."""
    first, last = rows[0], rows[-1]
    splits = {row.split for row in rows if row.split}
    labels = {row.label for row in rows if row.label}
    merged = replace(
        first,
        picture=last.picture,
        captions=tuple(caption for row in rows for caption in row.captions),
        split=min(splits, default=None),
        label=min(labels, default=None),
        meta={key: value for key, value in first.meta.items() if all(row.meta.get(key) == value for row in rows)},
        num_rows=len(rows),
    )
    for what, found in (("split", splits), ("class", labels)):
        if len(found) > 1:
            values = " and ".join(sorted(found)[:3])
            return replace(merged, reject=f"rows of one picture differ in {what}", detail=f"{first.detail}: {values}")
    return checked_captions(merged)
