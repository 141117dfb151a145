"""What a terminal shows in place: the training panel and progress bars. A pipe gets complete plain lines instead.

Colours are the terminal's own (bold, dim, green, red, cyan), so that all are readable on white and on black.
"""

import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mlip_cli.recipe.config import LOSS_NAMES
from mlip_cli.terminal.history import Headline, History, Scores
from mlip_cli.terminal.output import clock, draws, error_console, logger, say

LOSS_KEYS = ("loss", *LOSS_NAMES)
"""Keys of metrics.jsonl that the training panel shows as losses: the total first."""

LINE_EVERY_S = 10.0
"""In a pipe, long work reports its progress this often."""
REDRAW_EVERY_S = 0.1
"""A terminal is redrawn for small steps at most this often."""
ECHO = 4
"""Columns that stay free at the right: a terminal writes ^C where the cursor is, and must not wrap for it."""

WIDE_ENOUGH = 64
"""Columns from which on the panel shows the epoch, the time that has passed and the table of evaluations."""
NARROWEST_CELL, WIDEST_CELL = 10, 24
"""Columns of a loss with its curve."""

Cell = tuple[str, str]
"""A name and the value that stands below it."""


class WorkProgress(Progress):
    """A progress bar on a terminal; elsewhere a line now and then."""

    def __init__(self) -> None:
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(style="dim", complete_style="cyan", finished_style="green", pulse_style="cyan"),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=error_console(),
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # results in a pipe must not land on stderr
            disable=not draws(),
        )
        self._last_line_s = time.monotonic()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Move on by `advance` of the total."""
        super().advance(task_id, advance)
        self._say_now_and_then()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Change what is shown: see `rich.progress.Progress.update`."""
        super().update(task_id, **changes)
        self._say_now_and_then()

    def _say_now_and_then(self) -> None:
        if self.disable and time.monotonic() - self._last_line_s >= LINE_EVERY_S:
            self._last_line_s = time.monotonic()
            [task] = self.tasks
            total = "" if task.total is None else f" of {task.total:,.0f}, {clock(task.time_remaining)} left"
            say(f"{task.description}: {task.completed:,.0f}{total}")


@contextmanager
def progress(total: int | None, label: str) -> Iterator[WorkProgress]:
    """A progress bar on a terminal, a line now and then in a pipe. Its one task has id 0; `advance` moves it."""
    with WorkProgress() as bar:
        bar.add_task(label, total=total)
        yield bar


class TrainingPanel:
    """The state of a training run: redrawn in place on a terminal, one complete line an update in a pipe."""

    def __init__(
        self, total_steps: int, *, line_every: int = 1, steps_per_epoch: float | None = None, is_live: bool
    ) -> None:
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self._line_every, self._is_live = line_every, is_live
        self._step = 0
        self._first: tuple[int, float] | None = None
        """The first step of this session, and the time when it was done."""
        self._left_s: float | None = None
        self._metrics: Mapping[str, float] = {}
        self._losses: dict[str, History] = {}
        self._measures: dict[str, str] = {}
        self._scores = Scores()
        self._activity: str | None = None
        self._started_s = self._last_drawn_s = self._last_line_s = time.monotonic()
        # No thread redraws it: it is redrawn when there is something new. Log lines appear above it.
        self.live = Live(
            get_renderable=self._rendered,
            console=error_console(),
            auto_refresh=False,
            redirect_stdout=sys.stdout.isatty(),
        )

    def update(self, metrics: Mapping[str, float]) -> None:
        """Show `metrics`, a line of metrics.jsonl. Other handlers of the logger (log.txt) get a plain line."""
        self._advance(int(metrics["step"]))
        losses = [f"{name} {value}" for name, value in _losses(metrics)]
        step = f"step {self._step}/{self.total_steps}"
        self._log("  ".join([step, *losses, *_rates(metrics), f"ETA {clock(self._left_s)}"]))
        self._show(metrics)

    def glance(self, metrics: Mapping[str, float]) -> None:
        """Show `metrics` on a terminal alone: those of a session's first step, long before the first line."""
        if self._is_live:
            self._advance(int(metrics["step"]))
            self._show(metrics)

    def _show(self, metrics: Mapping[str, float]) -> None:
        self._metrics = metrics
        self._remember_losses(metrics)
        self._draw()

    def recall(self, line: Mapping[str, float | None]) -> None:
        """Take over a line of metrics.jsonl that an earlier session wrote."""
        if "loss" in line:
            self._remember_losses(line)
        else:
            self._scores.remember(line)

    def _remember_losses(self, line: Mapping[str, float | None]) -> None:
        for key in LOSS_KEYS:
            value = line.get(key)
            if value is not None and math.isfinite(value):
                self._losses.setdefault(key, History()).add(float(line["step"] or 0), value)

    def step_done(self, step: int) -> None:
        """Move to a step. A pipe gets a line for the first step of a session alone, if `update` has not written one."""
        if self._first is None and not self._is_live:
            after_s = time.monotonic() - self._started_s
            lines = f"a line every {self._line_every:,} steps"
            say(f"step {step}/{self.total_steps}: first step after {after_s:.1f} s; {lines}")
        self._advance(step)
        self._draw(is_small=True)

    def _advance(self, step: int) -> None:
        """The time left follows from the mean of this session without its first step, which starts and compiles."""
        now_s = time.monotonic()
        self._first = self._first or (step, now_s)
        first, first_s = self._first
        self._left_s = (self.total_steps - step) * (now_s - first_s) / (step - first) if step > first else None
        self._step, self._activity = step, None

    def measured(self, step: int, name: str, words: str, *, headline: Headline | None = None) -> None:
        """Show the result of an evaluator, or how long a checkpoint took, until the next one of this `name`.

        The score of `headline` also stands in a table with those of earlier evaluations.
        """
        if headline is not None:
            self._scores.add(step, headline)
        self._log(f"step {step}: {name}: {words}")
        self._measures[name] = f"step {step}: {name}: {words}"
        self._draw()

    def doing(self, activity: str | None, *, done: int | None = None, total: int | None = None) -> None:
        """Show other work than steps, and that `done` of `total` is finished; None: the steps go on."""
        self._activity = activity if done is None else f"{activity}: {done:,} of {total:,}"
        self._draw(is_small=bool(done))
        now = time.monotonic()
        if not done:
            self._last_line_s = now
        elif not self._is_live and now - self._last_line_s >= LINE_EVERY_S:
            self._last_line_s = now
            say(f"step {self._step}: {self._activity}")

    def close(self) -> None:
        """Show the last state."""
        self._activity = None
        self._draw()

    def _log(self, line: str) -> None:
        logger.info("%s", line, extra={"is_on_panel": self._is_live})

    def _draw(self, *, is_small: bool = False) -> None:
        now = time.monotonic()
        if self._is_live and not (is_small and now - self._last_drawn_s < REDRAW_EVERY_S):
            self._last_drawn_s = now
            self.live.refresh()

    def _rendered(self) -> RenderableType:
        width = max(error_console().width - ECHO, 1)
        cells = [_columns(self._loss_cells(width)), _columns(_rate_cells(self._metrics))]
        words = [Text(line) for line in self._measures.values()]
        scores = self._scores.table(width) if width >= WIDE_ENOUGH else None
        if self._activity:
            words.append(Text(self._activity, style="cyan"))
        parts = [self._top(width), *cells, *([scores] if scores is not None else []), *words]
        return Constrain(Group(*parts), width)

    def _top(self, width: int) -> RenderableType:
        """Step, bar and times; narrow terminals have no room for the epoch and the time that has passed."""
        words = [f"ETA {clock(self._left_s)}"]
        if width >= WIDE_ENOUGH:
            words.insert(0, f"{clock(time.monotonic() - self._started_s)} elapsed")
            if self.steps_per_epoch is not None:
                done, total = (f"{steps / self.steps_per_epoch:.1f}" for steps in (self._step, self.total_steps))
                words.insert(0, f"epoch {done}/{total}")
        top = Table.grid(padding=(0, 2), expand=True)
        top.add_column(no_wrap=True)
        top.add_column(ratio=1)
        bar = ProgressBar(self.total_steps, self._step, style="dim", complete_style="cyan", finished_style="green")
        for _ in words:
            top.add_column(no_wrap=True)
        top.add_row(Text(f"step {self._step}/{self.total_steps}", style="bold"), bar, *words)
        return top

    def _loss_cells(self, width: int) -> list[Cell]:
        """The losses, each with its curve so far, as wide as the terminal has room for."""
        losses = _losses(self._metrics)
        if not (error_console().encoding or "").startswith("utf"):
            return losses
        widths = range(WIDEST_CELL, NARROWEST_CELL, -1)
        taken = 2 * (len(losses) - 1)
        fitting = (own for own in widths if taken + sum(max(own, len(name)) for name, _ in losses) <= width)
        cell = next(fitting, NARROWEST_CELL)
        return [
            (name, f"{value} {self._losses[name].spark(max(cell, len(name)) - len(value) - 1)}".rstrip())
            if name in self._losses
            else (name, value)
            for name, value in losses
        ]


@contextmanager
def training_panel(
    total_steps: int, *, line_every: int = 1, steps_per_epoch: float | None = None
) -> Iterator[TrainingPanel]:
    """Open the panel of a training; its last state stays on the screen.

    Args:
        line_every: steps from one `update` to the next.
        steps_per_epoch: None where sources are mixed by weight, so that there are no epochs.
    """
    panel = TrainingPanel(total_steps, line_every=line_every, steps_per_epoch=steps_per_epoch, is_live=draws())
    with panel.live if draws() else nullcontext():
        panel.doing("waiting for the first batch")
        try:
            yield panel
        finally:
            panel.close()


def _columns(cells: list[Cell]) -> Columns:
    """Names above values, as many in a row as fit."""
    return Columns([Group(Text(name, style="dim"), Text(value)) for name, value in cells], padding=(0, 2))


def _losses(metrics: Mapping[str, float]) -> list[Cell]:
    return [(key, f"{metrics[key]:.3f}") for key in LOSS_KEYS if key in metrics]


def _rate_cells(metrics: Mapping[str, float]) -> list[Cell]:
    shown = {
        "images_per_s": lambda value: ("images/s", _speed(value)),
        "data_wait_share": lambda value: ("data wait", f"{100 * value:.0f} %"),
        "peak_gib": lambda value: ("memory", f"{value:.2f} GiB"),
        "lr": lambda value: ("lr", f"{value:.3g}"),
        "skipped_steps": lambda value: ("skipped steps", f"{value:.0f}"),
        "bad_samples": lambda value: ("bad samples", f"{value:.0f}"),
    }
    return [show(metrics[key]) for key, show in shown.items() if metrics.get(key) is not None]


def _rates(metrics: Mapping[str, float]) -> list[str]:
    """The same for a line, which leaves out the learning rate, and counts that are 0."""
    return [
        f"{value} {name}" if name == "images/s" else f"{name} {value}"
        for name, value in _rate_cells(metrics)
        if name != "lr" and value != "0"
    ]


def _speed(images_per_s: float) -> str:
    return f"{images_per_s:.4g}" if images_per_s < 1000 else f"{images_per_s:,.0f}"
