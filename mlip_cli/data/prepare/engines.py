"""What prepares the parts: processes of this machine, or Ray."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from mlip_cli.data.prepare import workers
from mlip_cli.machine import usable_cores

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Engine:
    """The engine. The bytes of the output do not depend on it."""

    name: Literal["processes", "ray"] = "processes"
    num_workers: int | None = None
    """None: one for each core."""

    @property
    def num_workers_here(self) -> int:
        """Of processes of this machine."""
        return self.num_workers or usable_cores()

    def num_processes(self, at_once: int) -> int:
        """The most processes at work when each worker has `at_once` tasks in hand. Ray gives each task a process."""
        return self.num_workers_here * (at_once if self.name == "ray" else 1)


def run_parallel(
    function: Callable[..., Result],
    tasks: Iterable[Task],
    *,
    engine: Engine,
    folder: Path,
    at_once: int = 1,
    hear: Callable[[Any], None],
) -> Iterator[Result]:
    """Yield results of `function`, which writes to `folder`, in the order in which they finish.

    Args:
        at_once: tasks that a worker has in hand: for tasks that wait for something.
        hear: called with what `function(task, say=...)` says while it works. On Ray nothing is heard.

    Raises:
        UsageError: the engine cannot work here.
        RunError: a worker was killed. Errors of `function` are raised here too.
    """
    if engine.name == "ray":
        from mlip_cli.data.prepare import ray_engine

        return ray_engine.run_parallel(function, tasks, num_workers=engine.num_workers, folder=folder, at_once=at_once)
    return workers.run_parallel(function, tasks, num_workers=engine.num_workers_here, at_once=at_once, hear=hear)
