"""TensorBoard and Weights & Biases: both get the lines of metrics.jsonl. Imported only where a recipe asks for them."""

import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from mlip_cli.errors import Stopped, UsageError
from mlip_cli.files import write_text
from mlip_cli.recipe.config import Log
from mlip_cli.runs.folder import Run
from mlip_cli.terminal.output import say, warn

Line = Mapping[str, float | None]
"""Of metrics.jsonl: None where a number is not finite."""

MOST_FINISHING_S = 20.0
"""W&B may send what is left for so long when a training ends: machines that ask for an end wait for 30 s."""


class Tracker(Protocol):
    """Where else lines go."""

    name: str
    """Key of the recipe that asks for it."""

    def append(self, line: Line) -> None:
        """Take a line."""

    def close(self, exit_code: int) -> None:
        """Nothing more comes; 0: the training reached its end."""


class TensorBoard:
    """An event file in RUN/tensorboard, in which events after `step` of earlier ones count no more."""

    name = "log.tensorboard"

    def __init__(self, folder: Path, *, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(exist_ok=True)
        self._path = folder / f"events.out.tfevents.{time.time_ns():019d}.{socket.gethostname()}.{os.getpid()}"
        self._event, self._summary, self._records = Event, Summary, RecordWriter
        self._write(file_version="brain.Event:2")
        self._write(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def append(self, line: Line) -> None:
        """The numbers of a line at its step; one that is not finite is a gap."""
        values = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in line.items()
            if name != "step" and value is not None
        ]
        self._write(step=line["step"], summary=self._summary(value=values))

    def close(self, exit_code: int) -> None:
        """Nothing is open."""

    def _write(self, **fields: Any) -> None:
        with open(self._path, "ab") as file:
            self._records(file).write(self._event(wall_time=time.time(), **fields).SerializeToString())


class WeightsAndBiases:
    """A run of W&B, the same one after a resume; its files lie in RUN/wandb.

    Raises:
        UsageError: nobody is logged in, or the project's name is none.
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
            warn(f"{self.name}: {_words(error)}; written to {run.folder}/wandb for wandb sync, nothing is sent now")
            wandb.teardown()  # its process still holds the id
            self._run = begin("offline")
        else:
            if not self._run.settings._offline:
                say(f"{self.name}: {self._run.url}")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")  # W&B's own steps must not go back, as a resume does

    def append(self, line: Line) -> None:
        """The numbers of a line; one that is not finite is a gap."""
        self._run.log({name: value for name, value in line.items() if value is not None})

    def close(self, exit_code: int) -> None:
        """Send what is left."""
        self._run.finish(exit_code=exit_code)


class Trackers:
    """Those that a recipe asks for. One whose disk or network fails is named once and gets nothing more."""

    def __init__(self) -> None:
        self._opened: list[Tracker] = []

    def open(self, name: str, make: Callable[[], Tracker]) -> None:
        """Add the tracker that `make` opens."""
        with self._spared(name):
            self._opened.append(make())

    def append(self, line: Line) -> None:
        """A line for each."""
        for tracker in list(self._opened):
            with self._spared(tracker.name):
                tracker.append(line)

    def close(self, exit_code: int) -> None:
        """The end, for each."""
        for tracker in list(self._opened):
            with self._spared(tracker.name):
                tracker.close(exit_code)

    @contextmanager
    def _spared(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not _is_from_outside(error):
                raise
            self._opened = [tracker for tracker in self._opened if tracker.name != name]
            warn(f"{name}: {_words(error)}; it gets nothing more, metrics.jsonl has all")


@contextmanager
def opened_trackers(log: Log, run: Run, *, config: dict[str, Any], step: int) -> Iterator[Trackers]:
    """What `log` asks for beside metrics.jsonl, for a run that goes on after `step`.

    Args:
        config: the recipe, as W&B shows it.

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
    """A full disk, a lost connection, or what W&B makes of its own troubles; mistakes of this program are neither."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] == "wandb"


def _words(error: Exception) -> str:
    """The first line of an error, which needs no full stop."""
    lines = str(error).splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
