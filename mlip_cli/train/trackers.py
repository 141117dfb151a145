"""TensorBoard and Weights & Biases get the lines of metrics.jsonl. They are imported if a recipe asks for them."""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from mlip_cli.errors import Stopped, UsageError
from mlip_cli.files import write_text
from mlip_cli.recipe.config import Log
from mlip_cli.runs.contents import MetricsLine
from mlip_cli.runs.folder import Run
from mlip_cli.terminal.output import say, warn

MOST_FINISHING_S = 20.0
"""W&B may send the rest for so long when a training ends; schedulers often wait 30 s after SIGTERM."""


class Tracker(Protocol):
    """Another place for the lines of metrics.jsonl."""

    name: str
    """The key of the recipe that asks for it."""

    def append(self, line: MetricsLine) -> None:
        """Take a line."""

    def close(self, exit_code: int) -> None:
        """No line follows; 0: the training reached its end."""


class TensorBoard:
    """An event file in RUN/tensorboard; TensorBoard drops the events of earlier files after `step`."""

    name = "log.tensorboard"

    def __init__(self, folder: Path, *, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def append(self, line: MetricsLine) -> None:
        """The numbers of a line at its step; one that is not finite is a gap."""
        for name, value in line.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, line["step"])
        self._writer.flush()

    def close(self, exit_code: int) -> None:
        """Close the file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of W&B, the same one after a resume; its files lie in RUN/wandb.

    Raises:
        UsageError: nobody is logged in, or W&B refuses the project's name.
    """

    name = "log.wandb"

    def __init__(self, project: str, run: Run, *, config: dict[str, Any]) -> None:
        import wandb

        if not run.wandb_id.is_file():
            write_text(run.wandb_id, secrets.token_hex(4) + "\n")
        settings = wandb.Settings(console="off", silent=True)
        if "WANDB_FINISH_TIMEOUT" not in os.environ:
            settings.finish_timeout = MOST_FINISHING_S

        def begin(mode: Literal["offline"] | None) -> Any:
            return wandb.init(
                project=project,
                id=run.wandb_id.read_text().strip(),
                name=run.folder.resolve().name,
                dir=run.folder,
                resume="allow",
                config=config,
                allow_val_change=True,
                mode=mode,
                settings=settings,
            )

        try:
            self._run = begin(None)
        except (wandb.errors.AuthenticationError, wandb.errors.UsageError) as error:
            raise UsageError(f"{self.name}: {_words(error)}; run wandb login, or set WANDB_MODE=offline") from error
        except (wandb.Error, OSError) as error:
            warn(f"{self.name}: {_words(error)}; lines go to {run.folder}/wandb, and wandb sync sends them later")
            wandb.teardown()  # its process still holds the id
            self._run = begin("offline")
        else:
            if not self._run.settings._offline:
                say(f"{self.name}: {self._run.url}")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")  # W&B's own steps must not go back, as a resume does

    def append(self, line: MetricsLine) -> None:
        """The numbers of a line; one that is not finite is a gap."""
        self._run.log({name: value for name, value in line.items() if value is not None})

    def close(self, exit_code: int) -> None:
        """Send what is left."""
        self._run.finish(exit_code=exit_code)


class Trackers:
    """The trackers that a recipe asks for. If the disk or network of one fails, it gets no more lines."""

    def __init__(self) -> None:
        self._opened: list[Tracker] = []

    def open(self, name: str, make: Callable[[], Tracker]) -> None:
        """Add the tracker that `make` opens."""
        with self._dropped_on_failure(name):
            self._opened.append(make())

    def append(self, line: MetricsLine) -> None:
        """Give a line to each."""
        for tracker in list(self._opened):
            with self._dropped_on_failure(tracker.name):
                tracker.append(line)

    def close(self, exit_code: int) -> None:
        """Tell each that the training ended."""
        for tracker in list(self._opened):
            with self._dropped_on_failure(tracker.name):
                tracker.close(exit_code)

    @contextmanager
    def _dropped_on_failure(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not _is_from_outside(error):
                raise
            self._opened = [tracker for tracker in self._opened if tracker.name != name]
            warn(f"{name}: {_words(error)}; it gets no more lines; metrics.jsonl has all of them")


@contextmanager
def opened_trackers(log: Log, run: Run, *, config: dict[str, Any], step: int) -> Iterator[Trackers]:
    """The trackers that `log` asks for, in a run that goes on after `step`.

    Args:
        config: the recipe, for W&B to show.

    Raises:
        UsageError: see `WeightsAndBiases`.
    """
    trackers = Trackers()
    if log.tensorboard:
        trackers.open(TensorBoard.name, lambda: TensorBoard(run.tensorboard, step=step))
    if log.wandb is not None:
        project = log.wandb
        trackers.open(WeightsAndBiases.name, lambda: WeightsAndBiases(project, run, config=config))
    try:
        yield trackers
    except Stopped as stop:
        trackers.close(stop.exit_code)
        raise
    except Exception:
        trackers.close(1)
        raise
    trackers.close(0)


def _is_from_outside(error: Exception) -> bool:
    """Whether an error comes from a disk, a network or W&B, and not from a mistake of this program."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] == "wandb"


def _words(error: Exception) -> str:
    """The first line of an error, without its full stop."""
    lines = str(error).splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
