"""The plan of pass 2: which samples are kept, and which shard each goes to.

It follows from the tables of the parts alone, so every run makes the same plan and nothing of it is written down. All
that is held has a fixed number of bytes a row; where a sample lies is read again when its shard is written.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlip_cli.data.prepare.fates import Fates
from mlip_cli.data.prepare.part_tables import PartTables, Rows, tables_of
from mlip_cli.data.prepare.shards import shard_bounds
from mlip_cli.data.prepare.workspace import PartResult
from mlip_cli.data.sources.records import MAX_HELD_OUT, NO_SPLIT, SPLITS
from mlip_cli.data.tar import BLOCK

DROPPED = 255
"""In the place of a split: the sample goes to no shard."""

Decide = Callable[[Rows], Fates]
"""Rows in the order of the source -> what becomes of each."""


@dataclass(frozen=True)
class PlannedShard:
    """A shard and its samples."""

    split: str
    number: int
    rows: NDArray[np.int32]
    """(m,): their places among all rows, in order."""

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:06d}.tar"


@dataclass(frozen=True)
class Plan:
    """All rows that passed pass 1, in the order of the source, and what becomes of them."""

    tables: PartTables
    fates: Fates
    splits: NDArray[np.uint8]
    """(n,): places in SPLITS, or DROPPED."""

    def shards(self) -> list[PlannedShard]:
        """The shards, in the order in which they are written: by their first rows.

        When a shard is written, all samples before its first row lie in finished shards. So at most one shard of each
        split holds samples of parts that are still there.
        """
        found: list[PlannedShard] = []
        for code, split in enumerate(SPLITS):
            rows = np.flatnonzero(self.splits == code).astype(np.int32)
            sizes = np.multiply(self.tables.blocks[rows], BLOCK, dtype=np.int64)
            bounds = enumerate(shard_bounds(sizes))
            found += [PlannedShard(split, number, rows[start:end]) for number, (start, end) in bounds]
        return sorted(found, key=lambda shard: int(shard.rows[0]))

    def last_uses(self, shards: Sequence[PlannedShard]) -> NDArray[np.int64]:
        """(parts,): the place among `shards` of the last one that holds samples of a part; -1 where none does."""
        last = np.full(len(self.tables.tars), -1, np.int64)
        for number, shard in enumerate(shards):
            last[self.tables.parts(shard.rows)] = number
        return last

    def is_held_out(self) -> bool:
        """True if we drew validation, because the source has no splits."""
        validation = SPLITS.index("validation")
        return bool(((self.splits == validation) & (self.tables.splits != validation)).any())


def plan_of(folder: Path, results: Sequence[PartResult], *, holdout: float, decide: Decide) -> Plan:
    """The plan for the parts whose tables lie in `folder`.

    Raises:
        UsageError: a table is not whole.
    """
    tables = tables_of(folder, results)
    fates = decide(tables)
    is_kept = fates.drops.kept
    splits = np.full(len(tables), DROPPED, np.uint8)
    splits[is_kept] = assign_splits(tables["pixels"][is_kept], tables.splits[is_kept], holdout=holdout)
    return Plan(tables, fates, splits)


def assign_splits(pixels: NDArray[np.uint64], given: NDArray[np.uint8], *, holdout: float) -> NDArray[np.uint8]:
    """Place in SPLITS of each sample: those two fields of PART_ROW, (n,) and (n,) -> (n,).

    Splits of the source are kept. If it has neither validation nor test, the samples whose pixel hash lies in the
    lowest `holdout` of all hashes become validation, at most 5,000. Equal pixels stay together, and adding data never
    moves a sample from one side to the other (until the cap is reached).
    """
    splits = given.copy()
    splits[splits == NO_SPLIT] = SPLITS.index("train")
    if (splits != SPLITS.index("train")).any():
        return splits
    below = pixels < np.uint64(int(holdout * 2.0**64))
    if below.sum() > MAX_HELD_OUT:
        below = pixels < np.sort(pixels[below])[MAX_HELD_OUT]
    splits[below] = SPLITS.index("validation")
    return splits
