"""The tables of all parts as one: what pass 2 needs of every row is held or read a column at a time.

Parts hold consecutive rows, so a row's part and its place there follow from its place among all. Where they do not, as
those of rows that are tried again, the order of all rows is held too.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mlip_cli.data.index import RECORD
from mlip_cli.data.prepare.shards import PART_ROW, sample_ends
from mlip_cli.data.prepare.workspace import PartResult
from mlip_cli.data.tar import BLOCK
from mlip_cli.errors import UsageError

MOST_ROWS = 2**31 - 1
"""Places of rows are held in 4 bytes."""
RECORD_AT: int = PART_ROW.fields["record"][1]  # type: ignore[index]


class Rows(Protocol):
    """Columns of rows by name, those of PART_ROW: an array of PART_ROW is one."""

    def __getitem__(self, name: str, /) -> NDArray[Any]:
        """(n,): one column."""

    def __len__(self) -> int:
        """How many rows there are."""


@dataclass(frozen=True)
class PartTables:
    """The rows that passed pass 1, in the order of the source, in the tables beside the tars of their parts."""

    tars: Sequence[Path]
    """(p,): in the order of their rows."""
    starts: NDArray[np.int64]
    """(p + 1,): place of the first row of each part in the tables one after another, and the number of all rows."""
    splits: NDArray[np.uint8]
    """(n,): as PART_ROW has them."""
    blocks: NDArray[np.uint32]
    """(n,): blocks of the tar that each sample takes."""
    order: NDArray[np.int32] | None = None
    """(n,): place of each row in the tables one after another; None: the same as among all rows."""

    def __len__(self) -> int:
        """How many rows there are."""
        return int(self.starts[-1])

    def __getitem__(self, name: str) -> NDArray[Any]:
        """(n,): one field of PART_ROW, read again each time, but for `split`."""
        if name == "split":
            return self.splits
        column = np.empty(len(self), PART_ROW[name])
        for part, table in enumerate(map(self._table, range(len(self.tars)))):
            column[self.starts[part] : self.starts[part + 1]] = table[name]
        return column if self.order is None else column[self.order]

    @cached_property
    def _counts(self) -> list[int]:
        return np.diff(self.starts).tolist()

    def parts(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Place in `tars` of the part that holds each row: (m,) -> (m,)."""
        return self.starts.searchsorted(self._places(rows), side="right") - 1

    def _places(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
        """Places of rows in the tables one after another: (m,) -> (m,)."""
        return rows if self.order is None else self.order[rows]

    def records(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.void]:
        """Where samples lie in the tars of their parts: (m,) -> (m,) of RECORD."""
        found = np.empty(len(rows), RECORD)
        places = self._places(rows)
        by_place = places.argsort(kind="stable")
        bounds = places[by_place].searchsorted(self.starts)
        for part in np.flatnonzero(np.diff(bounds)).tolist():
            own = by_place[bounds[part] : bounds[part + 1]]
            found[own] = self._table(part)["record"][places[own] - self.starts[part]]
        return found

    def place(self, row: int) -> tuple[Path, np.void]:
        """The tar that holds a row, and its record there, without reading the others."""
        place = row if self.order is None else int(self.order[row])
        part = int(self.starts.searchsorted(place, side="right")) - 1
        tar, count = self.tars[part], self._counts[part]
        with open(table_path(tar), "rb") as file:
            rows_left = count - (place - int(self.starts[part]))
            at = os.fstat(file.fileno()).st_size - rows_left * PART_ROW.itemsize
            content = os.pread(file.fileno(), RECORD.itemsize, at + RECORD_AT)
        return tar, np.frombuffer(content, RECORD)[0]

    def in_order_of_rows(self) -> "PartTables":
        """The same for parts whose rows lie between each other's."""
        order = self["row"].argsort(kind="stable").astype(np.int32)
        return replace(self, splits=self.splits[order], blocks=self.blocks[order], order=order)

    def _table(self, part: int) -> NDArray[np.void]:
        """The table of a part, which was found whole: its rows are the last bytes of the file."""
        path, count = table_path(self.tars[part]), self._counts[part]
        return np.fromfile(path, PART_ROW, count, offset=os.path.getsize(path) - count * PART_ROW.itemsize)


def table_path(tar: Path) -> Path:
    """part-000000.tar -> part-000000.npy"""
    return tar.with_suffix(".npy")


def tables_of(folder: Path, results: Sequence[PartResult]) -> PartTables:
    """The tables of the parts whose tars lie in `folder`, each read once.

    Raises:
        UsageError: a table is not whole, or there are more than MOST_ROWS rows.
    """
    counts = np.array([result.rows - sum(result.reasons.values()) for result in results], np.int64)
    out = folder.parents[1]
    if counts.sum() > MOST_ROWS:
        raise UsageError(f"{out}: {counts.sum():,} samples, at most {MOST_ROWS:,}; prepare the source in halves")
    firsts, lasts, splits, blocks = [], [], [], []
    tars = [folder / result.tar for result in results]
    for tar, count in zip(tars, counts.tolist(), strict=True):
        path = table_path(tar)
        try:
            table = np.load(path, allow_pickle=False)
            if table.dtype != PART_ROW or table.shape != (count,):
                raise ValueError(f"{table.shape} of {count} rows")
        except (ValueError, OSError, EOFError) as error:
            raise UsageError(f"{path}: damaged ({error}); remove {out} and prepare it again") from None
        firsts.append(int(table["row"][0]) if count else -1)
        lasts.append(int(table["row"][-1]) if count else -1)
        splits.append(table["split"].copy())
        ends = sample_ends(table["record"])
        blocks.append(((ends - table["record"]["offset"].astype(np.int64)) // BLOCK).astype(np.uint32))
    order = np.argsort(firsts, kind="stable")
    tables = PartTables(
        [tars[part] for part in order],
        np.concatenate([[0], np.cumsum(counts[order])]),
        np.concatenate([np.empty(0, np.uint8), *(splits[part] for part in order)]),
        np.concatenate([np.empty(0, np.uint32), *(blocks[part] for part in order)]),
    )
    if (np.array(firsts, np.int64)[order][1:] < np.maximum.accumulate(np.array(lasts, np.int64)[order])[:-1]).any():
        return tables.in_order_of_rows()
    return tables


def blocks(n: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover n."""
    return (slice(start, start + size) for start in range(0, n, size))
