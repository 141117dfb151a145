"""Retrieval scores: as tables on a terminal, and on the pages of a run and of several runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from mlip_cli.evaluate.results import DIRECTIONS, PairedTest, Recalls
from mlip_cli.evaluate.retrieval_results import RetrievalResult
from mlip_cli.evaluate.stored import Measured
from mlip_cli.report.page import Html, section, tables
from mlip_cli.report.record import RunRecord
from mlip_cli.report.scores import beside_first, newest_by_data, numbered, step_cells
from mlip_cli.report.tables import (
    INTERVALS,
    PAIRED_TEST,
    RECALLS_SHOWN,
    VERSUS,
    Cell,
    Table,
    print_tables,
    recall_cell,
    versus_cells,
)
from mlip_cli.terminal.output import percent, plural

TESTED = 5
"""Recall at this k is tested against another row."""
HEADS = ("run", "step", "true rate", "precision")
TOGETHER = f"{PAIRED_TEST}, where captions of a picture count together"


@dataclass(frozen=True)
class RecallRow:
    """Recalls both ways, and what stands beside them."""

    head: Sequence[Cell]
    recalls: Mapping[str, Recalls]
    """By direction."""
    median_rank: Mapping[str, float] | None = None
    tests: Mapping[str, PairedTest] | None = None
    """By direction, of recall at TESTED; None for the row that the others are tested against."""


def recall_tables(
    dataset: str, heads: Sequence[str], rows: Sequence[RecallRow], *, n: int, num_texts: int, beside: str, won: str
) -> list[Table]:
    """A table for each direction, and one of the paired tests.

    Args:
        heads: columns of the rows' heads.
        n: pictures. num_texts: distinct captions.
        beside: what the tests compare with, in the title. won: whose queries are won and lost.
    """
    shown = []
    tested: list[list[Cell]] = []
    for way, words in DIRECTIONS.items():
        recalls = [row.recalls[way] for row in rows]
        chances = "/".join(f"{percent(recalls[0].at(k).chance)}" for k in RECALLS_SHOWN)
        notes = [f"{plural(n, 'picture')}, {plural(num_texts, 'caption')}: chance {chances} %; {INTERVALS}"]
        cells: list[list[Cell]] = [
            [*row.head, *(recall_cell(own, k) for k in RECALLS_SHOWN), _median(row, way)]
            for row, own in zip(rows, recalls, strict=True)
        ]
        columns = (*heads, *(f"R@{k} %" for k in RECALLS_SHOWN), "median rank")
        shown.append(Table(columns, cells, f"{dataset}: {words}", notes).without_empty_columns())
        tested += [
            [words, *row.head, f"{100 * row.tests[way].difference:+.1f}", *versus_cells(row.tests[way])]
            for row in rows
            if row.tests is not None
        ]
    if tested:
        columns = ("direction", *heads, f"R@{TESTED}: points", *VERSUS)
        note = f"won / lost: queries that {won} answers among the first {TESTED}; {TOGETHER}"
        shown.append(Table(columns, tested, f"{dataset}: beside {beside}", [note]).without_empty_columns())
    return shown


def _median(row: RecallRow, way: str) -> str | None:
    return None if row.median_rank is None else f"{row.median_rank[way]:g}"


def _row(result: RetrievalResult, run: str | int | None, step: int | None, first: RetrievalResult | None) -> RecallRow:
    """A row that is tested against `first`, unless it is that."""
    tests = None
    if first is not None and first is not result:
        tests = {way: result.test_against(first, f"{way}_r{TESTED}") for way in DIRECTIONS}
    return RecallRow([run, *step_cells(result, step)], result.recalls, result.median_rank, tests)


def _tables(dataset: str, rows: Sequence[RecallRow], first: RetrievalResult, *, beside: str, won: str) -> list[Table]:
    return recall_tables(dataset, HEADS, rows, n=first.n, num_texts=first.num_texts, beside=beside, won=won)


def print_retrieval(measured: Mapping[str, Sequence[Measured[Any]]], *, failed: Sequence[str]) -> None:
    """Print results by data set, each row tested against the first; see `print_zeroshot`."""
    numbers, notes = numbered(measured, failed)
    shown = []
    for dataset, group in measured.items():
        first = group[0].result
        rows = [_row(own.result, numbers.get(own.checkpoint.label), None, first) for own in group]
        won = "only this row / only the first row"
        shown.append(_tables(dataset, rows, first, beside="the first row", won=won))
    print_tables(chain.from_iterable(shown), notes=notes)


def retrieval_tables(record: RunRecord) -> list[Table]:
    """Scores of every checkpoint and rate, later steps first, each tested against the first; none if not measured."""
    shown: list[Table] = []
    for name, ordered in newest_by_data(record.all_of(RetrievalResult)).items():
        rows = [_row(result, None, result.step, ordered[0]) for result in ordered]
        won = "only this row / only the first row"
        shown += _tables(name, rows, ordered[0], beside="the first row", won=won)
    return shown


def retrieval_sections(record: RunRecord) -> list[Html]:
    """The tables as a section of the run's page; none if not measured."""
    parts = tables(retrieval_tables(record))
    return [section("recalls", "Pictures and captions", *parts)] if parts else []


def compared_retrieval(records: Sequence[RunRecord]) -> list[Html]:
    """Scores of each run's newest checkpoint, each tested against the first run's at the same setting."""
    parts: list[Html] = []
    for name, own in beside_first(records, RetrievalResult).items():
        rows = [_row(result, run, result.step, first) for run, result, first in own]
        first_run, first_result, _ = own[0]
        won = f"this run alone / {first_run} alone, at the same merge rate,"
        parts += tables(_tables(name, rows, first_result, beside=first_run, won=won))
    return [section("recalls", "Pictures and captions", *parts)] if parts else []
