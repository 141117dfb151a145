"""What becomes of the rows that passed pass 1, and what is told about those that are dropped."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlip_cli.data.prepare.duplicates import HOW, Drops, EvaluationSet, drops, num_repeats, overlaps
from mlip_cli.data.prepare.filters import OWN_SPLITS, Cleaning
from mlip_cli.data.prepare.part_tables import Rows
from mlip_cli.data.sources.records import SPLITS
from mlip_cli.terminal.output import warn


@dataclass(frozen=True)
class Fates:
    """The fate of all rows, in the order of the source."""

    drops: Drops
    found: dict[str, int]
    """Equal pictures among the rows that are kept: see `Summary.cleaning`."""
    sets: tuple[EvaluationSet, ...]
    cleaning: Cleaning

    def by_reason(self) -> dict[str, int]:
        """Number of dropped rows by reason."""
        counts = np.bincount(self.drops.codes, minlength=len(self.drops.words)).tolist()
        return {word: n for word, n in zip(self.drops.words[1:], counts[1:], strict=True) if n}

    def _excluded_by(self, row: int) -> str | None:
        """What --exclude names, and a dropped row is in."""
        number = self.drops.set_of(row)
        return None if number is None else self.cleaning.exclude[number]

    def twin_in_set(self, row: int) -> str | None:
        """The picture of an evaluation set that a dropped row repeats; None: it repeats another row."""
        name = self._excluded_by(row)
        if name is None or name in OWN_SPLITS:
            return None
        rows = next(known.rows for known in self.sets if known.name == name)
        return str(rows["name"][self.drops.twins[row]].decode(errors="replace"))

    def how(self, row: int) -> str:
        """How a dropped row repeats its twin, where the reason does not say it."""
        return "" if self._excluded_by(row) is None else f"{HOW[self.drops.how[row]]} "


def decided(rows: Rows, cleaning: Cleaning, sets: Sequence[EvaluationSet]) -> Fates:
    """Say which rows, in the order of the source, are kept."""
    for split in set(cleaning.exclude) & set(OWN_SPLITS):
        if not (rows["split"] == SPLITS.index(split)).any():
            warn(f"--exclude {split}: the source has no pictures in a {split} split of its own")
    dropped = drops(rows, cleaning, sets)
    kept = dropped.kept
    found = {"repeats": num_repeats(rows, kept), **{f"in_{split}": n for split, n in overlaps(rows, kept).items()}}
    return Fates(dropped, found, tuple(sets), cleaning)
