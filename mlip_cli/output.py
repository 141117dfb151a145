"""What people and programs see: results on stdout, words on stderr, progress only on a terminal, rank 0 only."""

import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

logger = logging.getLogger("mlip_cli")


def is_main() -> bool:
    """True in the one process that speaks: rank 0 under torchrun, or the only process."""
    return os.environ.get("RANK", "0") == "0"


@cache
def error_console() -> Console:
    """The console on stderr that words, bars and panels share, so that they do not overwrite each other."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


class _Words(logging.Handler):
    """Log records as plain lines on stderr; user text is never read as markup."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        error_console().print(prefix + self.format(record), markup=False)


def start_logging() -> None:
    """Send the `mlip_cli` logger to stderr; on ranks other than 0 only errors pass."""
    logger.handlers = [_Words()]
    logger.setLevel(logging.INFO if is_main() else logging.ERROR)
    logger.propagate = False


def say(text: str) -> None:
    """One complete line for a person."""
    logger.info("%s", text)


def warn(text: str) -> None:
    """One line about something that may surprise."""
    logger.warning("%s", text)


def print_json(value: Any) -> None:
    """One strict JSON document on stdout (NaN is refused: write None)."""
    if is_main():
        sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        sys.stdout.flush()


def print_lines(text: str) -> None:
    """Plain text on stdout."""
    if is_main():
        sys.stdout.write(text.rstrip("\n") + "\n")
        sys.stdout.flush()


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str | None = None) -> None:
    """A table on stdout. Numbers are right-aligned; in a pipe it is as wide as its content needs."""
    if not is_main():
        return
    console = Console(file=sys.stdout, highlight=False)
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        numeric = all(_is_number(row[i]) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*[_plain(cell) for cell in row])
    if not console.is_terminal:
        console.width = max(80, console.measure(table).maximum)
    console.print(table, markup=False)


def _is_number(cell: Any) -> bool:
    return cell is None or isinstance(cell, int | float) or (isinstance(cell, str) and cell[:1].isdigit())


def _plain(cell: Any) -> str:
    from rich.markup import escape

    return "-" if cell is None else escape(str(cell))


@contextmanager
def progress(total: int | None, label: str) -> Iterator[Progress]:
    """A progress bar on a terminal, silence in a pipe. Yields the bar; its one task has id 0."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = error_console()
    with Progress(*columns, console=console, transient=True, disable=not (console.is_terminal and is_main())) as bar:
        bar.add_task(label, total=total)
        yield bar
