"""What people and programs see: results on stdout, words on stderr, progress only on a terminal, rank 0 only.

Rich is imported where something is drawn, so that help and version need not wait for it.
"""

import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.progress import Progress

logger = logging.getLogger("mlip_cli")

LOSS_KEYS = ("loss", "spatial_global", "spatial_token", "frequency_global", "frequency_token")
"""Metrics that the training panel shows as losses, when they are there: the total first."""

_NUMBER = re.compile(r"[-+~<>±]?\.?\d")


def is_main() -> bool:
    """True in the one process that speaks: rank 0 under torchrun, or the only process."""
    return os.environ.get("RANK", "0") == "0"


@cache
def error_console() -> "Console":
    """The console on stderr that words, bars and panels share, so that they do not overwrite each other."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def _draws() -> bool:
    """True when stderr can redraw a line: a real terminal, whatever FORCE_COLOR says, and this process speaks."""
    return is_main() and error_console().file.isatty() and not error_console().is_dumb_terminal


class _Words(logging.Handler):
    """Log records as plain lines on stderr; a panel that is being drawn shows its own lines itself."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "is_on_panel", False):
            return
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        error_console().print(prefix + self.format(record), soft_wrap=True)


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
    print_lines(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def print_lines(text: str) -> None:
    """Plain text on stdout."""
    if is_main():
        sys.stdout.write(text.rstrip("\n") + "\n")
        sys.stdout.flush()


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str | None = None) -> None:
    """A table on stdout, exactly as the cells say: brackets and colons are text.

    Columns of numbers are right-aligned and None is a dash. A terminal folds what is too wide for it; in a pipe the
    table is as wide as its content.
    """
    if not is_main():
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title) if title else None, title_justify="left", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        numeric = bool(rows) and all(_is_number(row[i]) for row in rows)
        one_word = numeric and not any(" " in str(row[i]) for row in rows)
        header = Text(column, style="bold")
        table.add_column(header, justify="right" if numeric else "left", overflow="fold", no_wrap=one_word)
    for row in rows:
        table.add_row(*[Text("-" if cell is None else str(cell)) for cell in row])
    console = Console(file=sys.stdout, highlight=False)
    terminal_width = console.width
    console.width = 1_000_000  # to measure without a limit
    needed = console.measure(table)
    fits = console.file.isatty() and needed.minimum <= terminal_width
    console.width = terminal_width if fits else needed.maximum
    with console.capture() as drawn:
        console.print(table)
    print_lines("\n".join(line.rstrip() for line in drawn.get().splitlines()))


def _is_number(cell: Any) -> bool:
    if isinstance(cell, bool):
        return False
    return cell is None or isinstance(cell, int | float) or (isinstance(cell, str) and bool(_NUMBER.match(cell)))


@contextmanager
def progress(total: int | None, label: str) -> Iterator["Progress"]:
    """A progress bar on a terminal; silence in a pipe and under a training panel. Its one task has id 0."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns,
        console=error_console(),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # results in a pipe must not land on stderr
        disable=not _draws() or TrainingPanel.is_drawn,
    ) as bar:
        bar.add_task(label, total=total)
        yield bar


class TrainingPanel:
    """The state of a training run: redrawn in place on a terminal, one complete line an update in a pipe."""

    is_drawn = False
    """True while a panel holds the terminal; there is one terminal."""

    def __init__(self, total_steps: int, live: "Live | None") -> None:
        self.total_steps = total_steps
        self._live = live

    def update(self, metrics: Mapping[str, float], *, eta_s: float | None) -> None:
        """Show `metrics` (a line of metrics.jsonl with at least `step`) and the seconds left, None while unknown.

        The plain line reaches the other handlers of the logger (log.txt) in both cases.
        """
        step = f"step {int(metrics['step'])}/{self.total_steps}"
        line = "  ".join([step, *_losses(metrics), *_rates(metrics), f"ETA {clock(eta_s)}"])
        logger.info("%s", line, extra={"is_on_panel": self._live is not None})
        if self._live is not None:
            self._live.update(self._drawing(metrics, eta_s), refresh=True)

    def _drawing(self, metrics: Mapping[str, float], eta_s: float | None) -> "RenderableType":
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        step = int(metrics["step"])
        top = Table.grid(padding=(0, 2), expand=True)
        top.add_column(no_wrap=True)
        top.add_column(ratio=1)
        top.add_column(no_wrap=True)
        top.add_row(
            Text(f"step {step}/{self.total_steps}", style="bold"),
            ProgressBar(total=self.total_steps, completed=step),
            Text(f"ETA {clock(eta_s)}"),
        )
        below = [Text("  ".join(parts)) for parts in (_losses(metrics), _rates(metrics)) if parts]
        return Group(top, *below)


@contextmanager
def training_panel(total_steps: int) -> Iterator[TrainingPanel]:
    """Open the panel that a training loop feeds at its logging steps; its last state stays on the screen."""
    if not _draws():
        yield TrainingPanel(total_steps, None)
        return
    from rich.live import Live

    # No thread: it is redrawn when there is something new. Log lines go through the same console, above the panel.
    live = Live(console=error_console(), auto_refresh=False, redirect_stdout=sys.stdout.isatty())
    with live:
        TrainingPanel.is_drawn = True
        try:
            yield TrainingPanel(total_steps, live)
        finally:
            TrainingPanel.is_drawn = False


def _losses(metrics: Mapping[str, float]) -> list[str]:
    return [f"{key} {metrics[key]:.3f}" for key in LOSS_KEYS if key in metrics]


def _rates(metrics: Mapping[str, float]) -> list[str]:
    shown = {
        "images_per_s": lambda value: f"{value:.4g} images/s" if value < 1000 else f"{value:,.0f} images/s",
        "data_wait_share": lambda value: f"data wait {100 * value:.0f} %",
        "peak_gib": lambda value: f"memory {value:.2f} GiB",
        "skipped_steps": lambda value: f"skipped steps {value:.0f}" if value else None,
        "bad_samples": lambda value: f"bad samples {value:.0f}" if value else None,
    }
    texts = [show(metrics[key]) for key, show in shown.items() if metrics.get(key) is not None]
    return [text for text in texts if text]


def clock(seconds: float | None) -> str:
    """130 -> 2:10, 7325 -> 2:02:05, None -> -:--."""
    if seconds is None:
        return "-:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
