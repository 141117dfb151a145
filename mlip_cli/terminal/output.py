"""Output: results on stdout, messages on stderr, both from rank 0 only.

Rich is imported only when something is drawn, so that help and version appear at once.
"""

import io
import json
import logging
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from functools import cache
from typing import IO, TYPE_CHECKING, Any

from mlip_cli.files import GIB, MIB
from mlip_cli.paths import escaped

if TYPE_CHECKING:
    from rich.console import Console


logger = logging.getLogger("mlip_cli")

NARROWEST_TEXT = 12
"""Narrowest text column, in characters. On a terminal with less room the table is not folded."""

_NUMBER = re.compile(r"[-+~<>±]?\.?\d")


class ReaderLeft(Exception):
    """Nobody reads stdout or stderr any more, as after `| head`."""


class _Stream(io.TextIOWrapper):
    """stdout or stderr. Writing raises `ReaderLeft` where Python has BrokenPipeError, which libraries turn into exit
    code 1."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            raise ReaderLeft from None

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            raise ReaderLeft from None


def open_streams() -> None:
    """Replace stdout and stderr of this process: what their encoding lacks is escaped, and a closed one takes all."""
    for name in ("stdout", "stderr"):
        old = getattr(sys, name)  # None: the shell closed it
        buffer = old.buffer if old else io.BufferedWriter(io.FileIO(os.devnull, "w"))
        encoding, by_line = (old.encoding, old.line_buffering) if old else ("utf-8", False)
        stream = _Stream(buffer, encoding, "backslashreplace", line_buffering=by_line or name == "stderr")
        setattr(sys, name, stream)


def drop_streams() -> None:
    """Send to nowhere what stdout and stderr still hold and cannot write."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (ReaderLeft, OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def is_main() -> bool:
    """True for the process that prints: rank 0 under torchrun, or the only process."""
    return os.environ.get("RANK", "0") == "0"


@cache
def error_console() -> "Console":
    """The one console on stderr. Messages, bars and panels share it, so that they do not overwrite each other."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def draws() -> bool:
    """True when stderr can redraw a line: it is a real terminal, whatever FORCE_COLOR says, and this process prints."""
    return is_main() and error_console().file.isatty() and not error_console().is_dumb_terminal


class _Words(logging.Handler):
    """Prints log records as plain lines on stderr. A panel prints its own lines."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "is_on_panel", False):
            return
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        text = prefix + escaped(self.format(record), keep="\n\t")
        if draws() and not getattr(record, "is_to_copy", False):
            text = folded(text, error_console().width)
        error_console().print(text, soft_wrap=True)


def start_logging() -> None:
    """Send the `mlip_cli` logger to stderr. On ranks other than 0 it prints only errors."""
    logger.handlers = [_Words()]
    logger.setLevel(logging.INFO if is_main() else logging.ERROR)
    logger.propagate = False
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns where an account has no home folder


def say(text: str) -> None:
    """Print one complete line for a person."""
    logger.info("%s", text)


def say_to_copy(text: str) -> None:
    """Print a command. It is not folded, so that a person copies it as one line."""
    logger.info("%s", text, extra={"is_to_copy": True})


def warn(text: str) -> None:
    """Print one line about something that may surprise."""
    logger.warning("%s", text)


def print_json(value: Any) -> None:
    """Print one strict JSON document on stdout. NaN raises ValueError; use None."""
    print_lines(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def print_lines(text: str) -> None:
    """Print plain text on stdout; control characters in it are escaped."""
    _print(escaped(text, keep="\n\t"))


def _print(text: str) -> None:
    if is_main():
        sys.stdout.write(text.rstrip("\n") + "\n")
        sys.stdout.flush()


def folded(text: str, width: int) -> str:
    """`text` with its lines folded between words. A word that is longer than `width` stays whole."""
    wrapper = textwrap.TextWrapper(width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(wrapper.fill(line) for line in text.splitlines())


def print_prose(text: str) -> None:
    """Print sentences on stdout: folded on a terminal, unchanged in a pipe."""
    print_lines(folded(text, shutil.get_terminal_size().columns) if sys.stdout.isatty() else text)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str | None = None) -> None:
    """Print a table on stdout (see `table_lines`)."""
    if is_main():
        _print("\n".join(table_lines(columns, rows, title=title, file=sys.stdout)))


def table_lines(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], *, file: IO[str], title: str | None = None
) -> list[str]:
    """The lines of a table for stdout or stderr. Cells are plain text: brackets and colons are not markup.

    Columns of numbers are right-aligned, and None becomes a dash. A terminal folds a table that is too wide; in a pipe
    the table is as wide as its content."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title) if title else None, title_justify="left", box=None, pad_edge=False)
    least_width = 2 * (len(columns) - 1)
    for i, column in enumerate(columns):
        numeric = bool(rows) and all(is_number(row[i]) for row in rows)
        one_word = numeric and not any(" " in str(row[i]) for row in rows)
        header = Text(column, style="bold")
        table.add_column(header, justify="right" if numeric else "left", overflow="fold", no_wrap=one_word)
        width = max([len(column), *(len(str(row[i])) for row in rows)])
        least_width += width if one_word else min(width, NARROWEST_TEXT)
    for row in rows:
        table.add_row(*[Text("-" if cell is None else escaped(str(cell))) for cell in row])
    console = Console(file=file, highlight=False, force_terminal=file.isatty())
    terminal_width = console.width
    console.width = 1_000_000  # to measure without a limit
    fits = console.file.isatty() and least_width <= terminal_width
    console.width = terminal_width if fits else console.measure(table).maximum
    with console.capture() as drawn:
        console.print(table)
    return [line.rstrip() for line in drawn.get().splitlines()]


def is_number(cell: Any) -> bool:
    """True for what tables align on the right: a number, a text that begins with one, nothing at all."""
    if isinstance(cell, bool):
        return False
    return cell is None or isinstance(cell, int | float) or (isinstance(cell, str) and bool(_NUMBER.match(cell)))


def plural(n: int, one: str, many: str | None = None) -> str:
    """1, "row" -> 1 row; 2,000, "row" -> 2,000 rows; `many` where an s at the end is not the plural."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def size_in_words(num_bytes: float) -> str:
    """2**30 -> 1.00 GiB, 3 * 2**20 -> 3.0 MiB, 512 -> 0.5 KiB."""
    for unit, name, digits in ((GIB, "GiB", 2), (MIB, "MiB", 1)):
        if num_bytes >= unit / 10:
            return f"{num_bytes / unit:.{digits}f} {name}"
    return f"{num_bytes / 2**10:.1f} KiB"


def clock(seconds: float | None) -> str:
    """130 -> 2:10, 7325 -> 2:02:05, None -> -:--."""
    if seconds is None:
        return "-:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def percent(share: float | None) -> str | None:
    """0.316 -> 31.6"""
    return None if share is None else f"{100 * share:.1f}"


def per_second(tflops: float) -> str:
    """Teraflops a second: 0.0512 -> 51.2 GFLOP/s, 512.3 -> 512 TFLOP/s"""
    return f"{tflops:.3g} TFLOP/s" if tflops >= 1 else f"{1000 * tflops:.3g} GFLOP/s"
