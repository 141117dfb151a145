"""The plan of pass 2: which samples are kept, and which shard each goes to.

It follows from the tables of the parts alone, so every run makes the same plan and nothing of it is written down. All
that is held has a fixed number of bytes a row.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlip_cli.data.prepare.fates import Fates
from mlip_cli.data.prepare.shards import PART_ROW, sample_ends, shard_bounds
from mlip_cli.data.prepare.workspace import PartResult
from mlip_cli.data.sources.records import MAX_HELD_OUT, NO_SPLIT, SPLITS
from mlip_cli.errors import UsageError

DROPPED = 255
"""In the place of a split: the sample goes to no shard."""
BLOCK_ROWS = 1 << 16
"""Rows at a time, where numbers of all rows are computed by way of longer ones."""


Decide = Callable[[NDArray[np.void]], Fates]
"""(n,) of PART_ROW, in the order of the source -> what becomes of each row."""


@dataclass(frozen=True)
class PlannedShard:
    """A shard and its samples."""

    split: str
    number: int
    rows: NDArray[np.int64]
    """(m,): their places in the table, in order."""

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:06d}.tar"


@dataclass(frozen=True)
class Plan:
    """All rows that passed pass 1, in the order of the source, and what becomes of them."""

    table: NDArray[np.void]
    """(n,) of PART_ROW."""
    parts: NDArray[np.uint32]
    """(n,): place of each row's part among the results."""
    fates: Fates
    splits: NDArray[np.uint8]
    """(n,): places in SPLITS, or DROPPED."""

    def shards(self) -> list[PlannedShard]:
        """The shards, in the order in which they are written: by their first rows.

        When a shard is written, all samples before its first row lie in finished shards. So at most one shard of each
        split holds samples of parts that are still there.
        """
        found: list[PlannedShard] = []
        sizes = self._sizes()
        for code, split in enumerate(SPLITS):
            rows = np.flatnonzero(self.splits == code)
            bounds = enumerate(shard_bounds(sizes[rows]))
            found += [PlannedShard(split, number, rows[start:end]) for number, (start, end) in bounds]
        return sorted(found, key=lambda shard: int(shard.rows[0]))

    def _sizes(self) -> NDArray[np.int64]:
        """(n,): bytes of each sample in a tar."""
        sizes = np.empty(len(self.table), np.int64)
        for block in blocks(len(sizes), BLOCK_ROWS):
            records = self.table["record"][block]
            sizes[block] = sample_ends(records) - records["offset"].astype(np.int64)
        return sizes

    def last_uses(self, shards: Sequence[PlannedShard], num_parts: int) -> NDArray[np.int64]:
        """(num_parts,): the place among `shards` of the last one that holds samples of a part; -1 where none does."""
        last = np.full(num_parts, -1, np.int64)
        for number, shard in enumerate(shards):
            last[self.parts[shard.rows]] = number
        return last

    def is_held_out(self) -> bool:
        """True if we drew validation, because the source has no splits."""
        validation = SPLITS.index("validation")
        return bool(((self.splits == validation) & (self.table["split"] != validation)).any())


def plan_of(folder: Path, results: Sequence[PartResult], *, holdout: float, decide: Decide) -> Plan:
    """The plan for the parts whose tables lie in `folder`.

    Raises:
        UsageError: a table is not whole.
    """
    table, parts = _loaded(folder, results)
    fates = decide(table)
    is_kept = fates.drops.kept
    kept = np.empty(int(is_kept.sum()), [("pixels", "<u8"), ("split", "u1")])
    for name in ("pixels", "split"):
        kept[name] = table[name][is_kept]
    splits = np.full(len(table), DROPPED, np.uint8)
    splits[is_kept] = assign_splits(kept, holdout=holdout)
    return Plan(table, parts, fates, splits)


def _loaded(folder: Path, results: Sequence[PartResult]) -> tuple[NDArray[np.void], NDArray[np.uint32]]:
    """The rows of all tables in the order of the source, and the place of each row's part among `results`."""
    counts = [result.rows - sum(result.reasons.values()) for result in results]
    table = np.empty(sum(counts), PART_ROW)
    start = 0
    for result, count in zip(results, counts, strict=True):
        path = (folder / result.tar).with_suffix(".npy")
        try:
            rows = np.load(path, allow_pickle=False)
            if rows.dtype != PART_ROW or rows.shape != (count,):
                raise ValueError(f"{rows.shape} of other fields, or of another number of rows than {count:,}")
            table[start : start + count] = rows
        except (ValueError, OSError, EOFError) as error:
            out = folder.parents[1]
            raise UsageError(f"{path}: damaged ({error}); remove {out} and prepare it again") from None
        start += count
    parts = np.repeat(np.arange(len(counts), dtype=np.uint32), counts)
    rows = table["row"]
    if (rows[1:] < rows[:-1]).any():
        order = np.argsort(rows, kind="stable")
        return table[order], parts[order]
    return table, parts


def assign_splits(table: NDArray[np.void], *, holdout: float) -> NDArray[np.uint8]:
    """Place in SPLITS of each sample: (n,) of PART_ROW -> (n,). Of its fields, `pixels` and `split` are read.

    Splits of the source are kept. If it has neither validation nor test, the samples whose pixel hash lies in the
    lowest `holdout` of all hashes become validation, at most 5,000. Equal pixels stay together, and adding data never
    moves a sample from one side to the other (until the cap is reached).
    """
    splits = table["split"].copy()
    splits[splits == NO_SPLIT] = SPLITS.index("train")
    if has_own_splits(table):
        return splits
    hashes = table["pixels"]
    below = hashes < np.uint64(int(holdout * 2.0**64))
    if below.sum() > MAX_HELD_OUT:
        below = hashes < np.sort(hashes)[MAX_HELD_OUT]
    splits[below] = SPLITS.index("validation")
    return splits


def has_own_splits(table: NDArray[np.void]) -> bool:
    """True when a sample (of PART_ROW) comes from a validation or test split of the source."""
    return bool(((table["split"] != NO_SPLIT) & (table["split"] != SPLITS.index("train"))).any())


def blocks(n: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover n."""
    return (slice(start, start + size) for start in range(0, n, size))
