"""What prepares the parts: processes of this machine, or Ray."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

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


def run_parallel(
    function: Callable[[Task], Result], tasks: Iterable[Task], *, engine: Engine, folder: Path
) -> Iterator[Result]:
    """Yield results of `function`, which writes to `folder`, in the order in which they finish.

    Raises:
        UsageError: the engine cannot work here.
        RunError: a worker was killed. Errors of `function` are raised here too.
    """
    if engine.name == "ray":
        from mlip_cli.data.prepare import ray_engine

        return ray_engine.run_parallel(function, tasks, num_workers=engine.num_workers, folder=folder)
    return workers.run_parallel(function, tasks, num_workers=engine.num_workers or usable_cores())
