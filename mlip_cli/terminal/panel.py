"""What is drawn in place on a terminal: the training panel and progress bars. Complete plain lines everywhere else.

Colours are the terminal's own (bold, dim, green, red, cyan), so that none vanishes on a white or a black ground.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean, median
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mlip_cli.recipe.config import LOSS_NAMES
from mlip_cli.terminal.output import clock, draws, error_console, logger, say

if TYPE_CHECKING:
    from rich.console import Console


LOSS_KEYS = ("loss", *LOSS_NAMES)
"""Metrics that the training panel shows as losses, when they are there: the total first."""

LINE_EVERY_S = 10.0
"""In a pipe, long work says so often how far it is."""
REDRAW_EVERY_S = 0.1
"""A terminal gets small steps no more often than this."""
ECHO = 4
"""Columns that stay free at the right: a terminal writes ^C where the cursor is, and must not wrap for it."""

Cell = tuple[str, str]
"""A name and the value that stands below it."""


class Bar(Progress):
    """A progress bar; where it is not drawn, a line now and then."""

    def __init__(self, *, is_drawn: bool, is_silent: bool) -> None:
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(style="dim", complete_style="cyan", finished_style="green", pulse_style="cyan"),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=error_console(),
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # results in a pipe must not land on stderr
            disable=not is_drawn,
        )
        self._says = not is_drawn and not is_silent
        self._last_line_s = time.monotonic()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Move on by `advance` of the total."""
        super().advance(task_id, advance)
        if self._says and time.monotonic() - self._last_line_s >= LINE_EVERY_S:
            self._last_line_s = time.monotonic()
            [task] = self.tasks
            total = "" if task.total is None else f" of {task.total:,.0f}, {clock(task.time_remaining)} left"
            say(f"{task.description}: {task.completed:,.0f}{total}")


class TrainingPanel:
    """The state of a training run: redrawn in place on a terminal, one complete line an update in a pipe."""

    is_drawn = False
    """True while a panel holds the terminal; there is one terminal."""

    def __init__(self, total_steps: int, *, step: int = 0, line_every: int = 1, is_live: bool) -> None:
        self.total_steps = total_steps
        self._line_every = line_every
        self._started_s = time.monotonic()
        self._has_begun = False
        self._step = step
        self._eta_s: float | None = None
        self._metrics: Mapping[str, float] = {}
        self._measures: dict[str, str] = {}
        self._activity: str | None = "waiting for the first batch"
        self._last_drawn_s = self._last_line_s = time.monotonic()
        # No thread: it is redrawn when there is something new. Log lines go through the same console, above the panel.
        self.live = Live(self, console=error_console(), auto_refresh=False, redirect_stdout=sys.stdout.isatty())
        self._is_live = is_live

    def update(self, metrics: Mapping[str, float], *, eta_s: float | None) -> None:
        """Show `metrics` (a line of metrics.jsonl with at least `step`) and the seconds left, None while unknown.

        The plain line reaches the other handlers of the logger (log.txt) in both cases.
        """
        self._has_begun = True
        step = f"step {int(metrics['step'])}/{self.total_steps}"
        losses = [f"{name} {value}" for name, value in _losses(metrics)]
        self._log("  ".join([step, *losses, *_rates(metrics), f"ETA {clock(eta_s)}"]))
        self._metrics, self._step, self._eta_s, self._activity = metrics, int(metrics["step"]), eta_s, None
        self._draw()

    def move(self, step: int, *, eta_s: float | None) -> None:
        """A step is done; the plain lines have those of `update`, and before them the first one as a sign of life."""
        if not self._has_begun and not self._is_live:
            after_s = time.monotonic() - self._started_s
            lines = f"a line every {self._line_every:,} steps"
            say(f"step {step}/{self.total_steps}: first step after {after_s:.1f} s; {lines}")
        self._has_begun = True
        self._step, self._eta_s, self._activity = step, eta_s, None
        self._draw(is_small=True)

    def measured(self, step: int, name: str, words: str) -> None:
        """Show what an evaluator found, or how long a save took, under its `name`; it stays until the next one."""
        self._log(f"step {step}: {name}: {words}")
        self._measures[name] = f"step {step}: {name}: {words}"
        self._draw()

    def doing(self, activity: str | None, *, done: int | None = None, total: int | None = None) -> None:
        """Say what goes on instead of steps, and how far it is: `done` of `total`; None: nothing else."""
        text = activity if done is None else f"{activity}: {done:,} of {total:,}"
        self._activity = text
        self._draw(is_small=bool(done))
        now = time.monotonic()
        if not done:
            self._last_line_s = now
        elif not self._is_live and now - self._last_line_s >= LINE_EVERY_S:
            self._last_line_s = now
            say(f"step {self._step}: {text}")

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

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        width = max(options.max_width - ECHO, 1)
        top = Table.grid(padding=(0, 2))
        top.width = width
        top.add_column(no_wrap=True)
        top.add_column(ratio=1)
        top.add_column(no_wrap=True)
        top.add_row(
            Text(f"step {self._step}/{self.total_steps}", style="bold"),
            ProgressBar(
                total=self.total_steps,
                completed=self._step,
                style="dim",
                complete_style="cyan",
                finished_style="green",
            ),
            Text(f"ETA {clock(self._eta_s)}"),
        )
        yield top
        yield from _grid(_losses(self._metrics), width)
        yield from _grid(_rate_cells(self._metrics), width)
        for words in self._measures.values():
            yield from Text(words).wrap(console, width)
        if self._activity:
            yield from Text(self._activity, style="cyan").wrap(console, width)


@contextmanager
def training_panel(total_steps: int, *, step: int = 0, line_every: int = 1) -> Iterator[TrainingPanel]:
    """Open the panel that a training loop feeds from `step` on; its last state stays on the screen.

    Args:
        line_every: steps from one `update` to the next.
    """
    panel = TrainingPanel(total_steps, step=step, line_every=line_every, is_live=draws())
    if not draws():
        yield panel
        return
    with panel.live:
        panel.live.refresh()
        TrainingPanel.is_drawn = True
        try:
            yield panel
        finally:
            TrainingPanel.is_drawn = False
            panel.close()


def _grid(cells: Sequence[Cell], width: int) -> Iterator[Text]:
    """Names above values in aligned columns, as many in a row as fit."""
    names, values = "", ""
    for name, value in cells:
        size = max(len(name), len(value))
        if names and len(names) + size > width:
            yield from (Text(names.rstrip(), style="dim"), Text(values.rstrip()))
            names, values = "", ""
        names, values = names + name.ljust(size + 2), values + value.ljust(size + 2)
    if names:
        yield from (Text(names.rstrip(), style="dim"), Text(values.rstrip()))


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


FEWEST_STEPS = 10
"""In a stretch: shorter ones differ by the batches that they wait for."""
STRETCHES = 15
"""The newest ones, of which the median counts; an interruption or a slow beginning is one among them."""


class TimeLeft:
    """Seconds left by the speed of recent steps, the mean cost of an evaluation, and what saving costs beside them.

    The first step since now counts nowhere: processes start in it, and code is compiled.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        step: int,
        evaluate_every: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps, self._evaluate_every, self._clock = total_steps, evaluate_every, clock
        self._first_step = self._evaluated = step
        self._stretches: deque[float] = deque(maxlen=STRETCHES)
        self._evaluations: list[float] = []
        self._saving_s = 0.0
        self._elsewhere_s = 0.0
        self._from: tuple[int, float] | None = None
        """Where the stretch began that is under way: step, and the clock less what was spent elsewhere."""

    def logged(self, step: int) -> float | None:
        """Seconds left when `step` is done and its numbers have come from the device, so that the clock is right."""
        if self._from is not None and step - self._from[0] >= FEWEST_STEPS:
            self._stretches.append(self._per_step_s(step))
            self._from = step, self._working_s()
        return self.after(step)

    def after(self, step: int) -> float | None:
        """Seconds left when `step` is done; None until two steps tell how long one takes."""
        if self._from is None:
            self._from = step, self._working_s()
        if self._stretches:
            step_s = median(self._stretches)
        elif step > self._from[0]:
            step_s = self._per_step_s(step)
        else:
            return None
        step_s += self._saving_s / (step - self._first_step)
        evaluations_s = self._evaluations_left() * fmean(self._evaluations) if self._evaluations else 0.0
        return (self._total_steps - step) * step_s + evaluations_s

    @contextmanager
    def evaluating(self, step: int) -> Iterator[None]:
        """The evaluation after `step`."""
        started = self._clock()
        yield
        self._evaluations.append(self._clock() - started)
        self._elsewhere_s += self._evaluations[-1]
        self._evaluated = step

    @contextmanager
    def saving(self) -> Iterator[None]:
        """A checkpoint."""
        started = self._clock()
        yield
        seconds = self._clock() - started
        self._saving_s += seconds
        self._elsewhere_s += seconds

    def _working_s(self) -> float:
        return self._clock() - self._elsewhere_s

    def _per_step_s(self, step: int) -> float:
        assert self._from is not None
        return (self._working_s() - self._from[1]) / (step - self._from[0])

    def _evaluations_left(self) -> int:
        """Those between the last one and the end, and the one at the end."""
        if self._evaluated >= self._total_steps:
            return 0
        every = self._evaluate_every or self._total_steps
        return (self._total_steps - 1) // every - self._evaluated // every + 1


@contextmanager
def progress(total: int | None, label: str) -> Iterator["Bar"]:
    """A progress bar on a terminal, a line now and then in a pipe, silence under a training panel.

    Its one task has id 0; `advance` moves it.
    """

    with Bar(is_drawn=draws() and not TrainingPanel.is_drawn, is_silent=TrainingPanel.is_drawn) as bar:
        bar.add_task(label, total=total)
        yield bar
