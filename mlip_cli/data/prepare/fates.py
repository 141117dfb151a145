"""What the finisher does with rows that `drops` leaves out: they become rejects that name the picture they repeat."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlip_cli.data.prepare.duplicates import HOW, Drops, EvaluationSet, drops, num_repeats, overlaps
from mlip_cli.data.prepare.filters import OWN_SPLITS, Cleaning
from mlip_cli.data.sources.records import SPLITS
from mlip_cli.paths import escaped
from mlip_cli.terminal.output import warn


@dataclass(frozen=True)
class Fates:
    """The fate of all rows of the parts, in the order of the source."""

    table: NDArray[np.void]
    """(n,) of PART_ROW."""
    starts: NDArray[np.int64]
    """Place of the first row of each part."""
    drops: Drops
    sets: tuple[EvaluationSet, ...]
    cleaning: Cleaning

    def by_part(self, values: NDArray[Any]) -> list[NDArray[Any]]:
        """Values of all rows, cut into those of each part."""
        return np.split(values, self.starts[1:])

    def reasons(self) -> Counter[str]:
        """Number of dropped rows by reason."""
        counts = np.bincount(self.drops.codes, minlength=len(self.drops.words)).tolist()
        return Counter({word: n for word, n in zip(self.drops.words[1:], counts[1:], strict=True) if n})

    def found(self) -> dict[str, int]:
        """Equal pictures among the rows that are kept."""
        kept = self.table[self.drops.kept]
        return {"repeats": num_repeats(kept), **{f"in_{split}": n for split, n in overlaps(kept).items()}}


def decided(tables: Sequence[NDArray[np.void]], cleaning: Cleaning, sets: Sequence[EvaluationSet]) -> Fates:
    """Say which rows of the parts' tables, each (n,) of PART_ROW, are kept."""
    table = np.concatenate(tables)
    starts = np.cumsum([0, *map(len, tables[:-1])])
    for split in set(cleaning.exclude) & set(OWN_SPLITS):
        if not (table["split"] == SPLITS.index(split)).any():
            warn(f"--exclude {split}: the source has no pictures in a {split} split of its own")
    return Fates(table, starts, drops(table, cleaning, sets), tuple(sets), cleaning)


def dropped_rejects(fates: Fates, tars: Sequence[Path], part: int) -> Iterator[dict[str, Any]]:
    """file, row, reason and detail of the rows of a part that are dropped, in order. `tars` are those of all parts."""
    starts = fates.starts

    def source_of(row: int) -> dict[str, Any]:
        own = int(np.searchsorted(starts, row, side="right")) - 1
        return _source_in(tars[own], fates.table["record"][row])

    end = starts[part + 1] if part + 1 < len(starts) else len(fates.table)
    for row in (np.flatnonzero(fates.drops.codes[starts[part] : end]) + starts[part]).tolist():
        own, code, twin = source_of(row), int(fates.drops.codes[row]), int(fates.drops.twins[row])
        number = fates.drops.set_of(row)
        name = fates.cleaning.exclude[number] if number is not None else None
        if name is None or name in OWN_SPLITS:
            other = source_of(twin)
            twin_name = f"{escaped(other['file'])} row {other['row']}"
        else:
            rows = next(known.rows for known in fates.sets if known.name == name)
            twin_name = rows["name"][twin].decode(errors="replace")
        how = f"{HOW[fates.drops.how[row]]} as " if name is not None else "as "
        yield {
            "file": escaped(own["file"]),
            "row": own["row"],
            "reason": fates.drops.words[code],
            "detail": f"{how}{twin_name}",
        }


def _source_in(tar: Path, record: np.void) -> dict[str, Any]:
    """`source` of KEY.json of a sample: file and row."""
    with open(tar, "rb") as file:
        at = int(record["offset"]) + int(record["json_offset"])
        fields: dict[str, Any] = json.loads(os.pread(file.fileno(), int(record["json_size"]), at))
    source: dict[str, Any] = fields["source"]
    return source
