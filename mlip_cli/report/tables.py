"""Results as tables, laid out once: `print_tables` shows them on a terminal and `page.tables` on a page."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from mlip_cli.evaluate.results import (
    PairedTest,
    Recalls,
    SweepResult,
    ZeroshotResult,
    ZeroshotScores,
    ZeroshotSweep,
)
from mlip_cli.evaluate.statistics import BELOW_CHANCE, MANY_CLASSES, Interval, is_below_chance
from mlip_cli.paths import escaped
from mlip_cli.profiling.result import ProfileResult
from mlip_cli.terminal.output import percent, plural, print_lines, print_prose, print_table

INTERVALS = "in brackets: 95 % intervals"
RECALLS_SHOWN = (1, 5, 10)
PAIRED_TEST = "p: McNemar's exact test"


@dataclass(frozen=True)
class Spread:
    """A number with its interval."""

    value: str
    low: str
    high: str

    def interval(self, dash: str = "-") -> str:
        """28.0-35.4; -1.2 to +3.4 where the ends have signs"""
        return f"{self.low}{' to ' if self.low.startswith(('+', '-')) else dash}{self.high}"

    def __str__(self) -> str:
        """31.6 (28.0-35.4)"""
        return f"{self.value} ({self.interval()})"


Cell = str | int | Spread | None
"""None is a dash."""


@dataclass(frozen=True)
class Table:
    """A table for a terminal or a page."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str | None = None
    notes: Sequence[str] = field(default=())
    """Sentences below the rows."""

    def without_empty_columns(self) -> "Table":
        """The same without the columns that are empty in every row."""
        kept = [i for i in range(len(self.columns)) if any(row[i] is not None for row in self.rows)]
        rows = [[row[i] for i in kept] for row in self.rows]
        return Table([self.columns[i] for i in kept], rows, self.title, self.notes)


def print_tables(tables: Iterable[Table], *, notes: Sequence[str] = ()) -> None:
    """Print tables with their notes on stdout, with an empty line between them, and `notes` about all of them."""
    for number, table in enumerate(tables):
        if number:
            print_lines("")
        cells = [[str(cell) if isinstance(cell, Spread) else cell for cell in row] for row in table.rows]
        print_table(table.columns, cells, title=escaped(table.title) if table.title else None)
        for note in table.notes:
            print_prose(note)
    if notes:
        print_lines("")
    for note in notes:
        print_prose(note)


def percent_cell(share: float | None, interval: Interval | None) -> Spread | None:
    """A fraction and its interval in per cent; None if the fraction was not measured."""
    if share is None or interval is None:
        return None
    value, low, high = (f"{100 * part:.1f}" for part in (share, *interval))
    return Spread(value, low, high)


def recall_cell(recalls: Recalls | None, k: int) -> Spread | None:
    """Recall at `k` in per cent."""
    if recalls is None:
        return None
    share = recalls.at(k)
    return percent_cell(share.value, share.interval)


def speedup_cell(speedup: float | None, interval: tuple[float, float] | None) -> Spread | None:
    """1.52 (1.48-1.55), or None"""
    if speedup is None or interval is None:
        return None
    return Spread(*(f"{ratio:.2f}" for ratio in (speedup, *interval)))


def machine_words(result: SweepResult | ProfileResult) -> str:
    """The machine of a measurement."""
    return f"{result.device}, {result.device_name}, {plural(result.threads, 'thread')}, torch {result.torch}"


def tokens_words(tokens: Iterable[int]) -> str:
    """16, 16, 11, 8 -> 2 x 16, 11, 8"""
    runs = [(number, len(list(own))) for number, own in groupby(tokens)]
    return ", ".join(f"{count} x {number}" if count > 1 else str(number) for number, count in runs)


def data_words(result: ZeroshotResult | ZeroshotSweep, scores: ZeroshotScores) -> str:
    """Pictures, classes and chance level of a data set."""
    if scores.asks_names_alone and scores.names is not None:
        return f"{plural(result.n, 'picture')}, {names_words(scores.names)}; {INTERVALS}"
    pictures = plural(result.n, "picture") + (" of concepts that training did not see" if scores.names else "")
    chance = f"chance {percent(result.chance)} %"
    if result.num_classes >= MANY_CLASSES:
        chance += f", of top-5 {percent(5 / result.num_classes)} %"
    return f"{pictures}, {plural(result.num_classes, 'class', 'classes')}: {chance}; {INTERVALS}"


def doubts(result: ZeroshotResult | ZeroshotSweep, scores: Sequence[ZeroshotScores]) -> list[str]:
    """Lines about files that were not read, and about scores that are worse than guessing."""
    lines = [f"passed over: {result.passed_over.in_words()}"] if result.passed_over.counts else []
    is_worse = any(is_below_chance(own.mean_per_class_recall_interval, result.chance) for own in scores)
    return [*lines, BELOW_CHANCE] if is_worse else lines


def names_words(names: Recalls) -> str:
    """Number of names and chance level."""
    chances = ", ".join(f"R@{k} {percent(names.at(k).chance)} %" for k in (1, 5))
    return f"{plural(names.num_candidates, 'name')}: chance {chances}"


@dataclass(frozen=True)
class MainScore:
    """The score of a data set that charts and paired tests take."""

    words: str
    value: float
    interval: Interval
    chance: float
    measure: str
    """Its name among the answers to single pictures."""
    won: str
    """What a won or lost answer is."""


def main_score(scores: ZeroshotScores, *, chance: float) -> MainScore:
    """Text to image R@1 where each name is a class, else the mean recall, whose level of guessing is `chance`."""
    if scores.asks_names_alone and scores.pictures is not None:
        share = scores.pictures.at(1)
        won = "names whose picture is found first by"
        return MainScore("text to image R@1", share.value, share.interval, share.chance, "picture_r1", won)
    value, interval = scores.mean_per_class_recall, scores.mean_per_class_recall_interval
    return MainScore("mean recall", value, interval, chance, "acc1", "pictures that are classified correctly by")


VERSUS = ("won", "lost", "p")


def versus_cells(test: PairedTest | None) -> list[Cell]:
    """Cells of the columns VERSUS."""
    return [None] * 3 if test is None else [f"{test.won:,}", f"{test.lost:,}", f"{test.p:.2g}"]
