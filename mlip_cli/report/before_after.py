"""What a training changed since step 0: a sentence, a table, and a section of the run's page."""

import sys
from collections.abc import Sequence

from mlip_cli.evaluate.before_after import BeforeAfter, Change, read_changes
from mlip_cli.report.page import Html, note, section, tables
from mlip_cli.report.record import RunRecord
from mlip_cli.report.tables import INTERVALS, PAIRED_TEST, VERSUS, Cell, Spread, Table, percent_cell, versus_cells
from mlip_cli.runs.folder import Run
from mlip_cli.terminal.output import table_lines

COLUMNS = ("data set", "measure", "n", "before %", "after %", "points", *VERSUS)


def points_words(change: Change) -> str:
    """+3.2 points (95 %: +1.1 to +5.3)"""
    low, high = change.interval
    return f"{100 * change.test.difference:+.1f} points (95 %: {100 * low:+.1f} to {100 * high:+.1f})"


def changes_sentence(kept: BeforeAfter) -> str | None:
    """What got better, what got worse, and where a change is not shown; None before a second evaluation."""
    changes = kept.changes
    if not changes:
        return None
    groups = {
        "better at": [own for own in changes if own.is_shown and own.test.difference > 0],
        "worse at": [own for own in changes if own.is_shown and own.test.difference < 0],
    }
    said = [f"{how} {_listed(own)}" for how, own in groups.items() if own]
    open_ones = [own for own in changes if not own.is_shown]
    rest = f"a change is not shown at {_listed(open_ones)}" if open_ones else ""
    steps = f"From step 0 to step {kept.step:,}"
    if not said:
        return f"{steps} {rest}."
    return f"{steps} it got {' and '.join(said)}{f'; {rest}' if rest else ''}."


def _listed(changes: Sequence[Change]) -> str:
    return ", ".join(f"{own.words} {points_words(own)}" for own in changes)


def changes_table(kept: BeforeAfter) -> Table:
    """A row for each measure."""
    rows: list[list[Cell]] = [
        [
            own.dataset,
            own.words.removeprefix(f"{own.dataset} "),
            f"{own.n:,}",
            percent_cell(own.before, own.before_interval),
            percent_cell(own.after, own.after_interval),
            points_cell(own),
            *versus_cells(own.test),
        ]
        for own in kept.changes
    ]
    notes = [
        f"{INTERVALS}; won / lost: questions that only the last weights / only those of step 0 answer rightly; "
        f"{PAIRED_TEST}"
    ]
    return Table(COLUMNS, rows, f"step {kept.step:,} beside step 0", notes)


def points_cell(change: Change) -> Spread:
    """Of the paired difference."""
    low, high = change.interval
    return Spread(*(f"{100 * value:+.1f}" for value in (change.test.difference, low, high)))


def ending_lines(run: Run) -> list[str]:
    """The last lines of a training that evaluated step 0: the table and its sentence."""
    kept = read_changes(run)
    if kept is None or (sentence := changes_sentence(kept)) is None:
        return []
    shown = changes_table(kept)
    rows = [[str(cell) if isinstance(cell, Spread) else cell for cell in row] for row in shown.rows]
    return [*table_lines(shown.columns, rows, title=shown.title, file=sys.stderr), *shown.notes, sentence]


def before_after_sections(record: RunRecord) -> list[Html]:
    """The section of a page; none for a run whose step 0 was not evaluated."""
    kept = record.newest(BeforeAfter)
    if kept is None:
        return []
    sentence = changes_sentence(kept)
    parts = [note("Only step 0 is evaluated yet.")] if sentence is None else [note(sentence)]
    shown = tables([changes_table(kept)]) if sentence is not None else []
    return [section("before-after", "Before and after", *parts, *shown)]
