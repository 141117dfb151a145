"""Work in several processes that end when the driver does, however it ends.

`concurrent.futures.ProcessPoolExecutor` does not promise that: after kill -9 of the driver its workers live on. Here
each worker watches the driver, and ends in the middle of its task when the driver is gone.
"""

import multiprocessing
import os
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar, cast

from mlip_cli.errors import RunError

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Said:
    """What `function` says while it works, on its way to the driver."""

    what: Any


def run_parallel(
    function: Callable[..., Result],
    tasks: Iterable[Task],
    *,
    num_workers: int,
    at_once: int = 1,
    hear: Callable[[Any], None] | None = None,
) -> Iterator[Result]:
    """Yield results of `function` in the order in which they finish. One worker means this process.

    Workers are spawned, so `function`, tasks and results must pickle. When the driver leaves this generator, it ends
    the workers.

    Args:
        at_once: tasks that a worker has in hand, in a thread each: for tasks that wait for something. Their worker is
            never this process, which could not end their threads.
        hear: called here with what `function(task, say=...)` gives to `say` while it works. None: `function(task)`.

    Raises:
        RunError: a worker was killed. Errors of `function` are raised here too.
    """
    if num_workers == at_once == 1:
        for task in tasks:
            yield function(task, say=hear) if hear else function(task)
        return
    with _started(function, num_workers, in_threads=at_once > 1, says=hear is not None) as workers:
        queue = iter(tasks)
        busy: Counter[Connection] = Counter()

        def hand_out(pipe: Connection) -> None:
            for task in islice(queue, 1):
                with _watched(workers[pipe]):
                    pipe.send(task)
                busy[pipe] += 1

        for pipe in list(workers) * at_once:
            hand_out(pipe)
        while waited_for := [pipe for pipe, n in busy.items() if n]:
            for pipe in cast(list[Connection], wait(waited_for)):
                with _watched(workers[pipe]):
                    result, error = pipe.recv()
                if error is not None:
                    raise error
                if hear and isinstance(result, Said):
                    hear(result.what)
                    continue
                busy[pipe] -= 1
                hand_out(pipe)
                yield result


@contextmanager
def _watched(process: SpawnProcess) -> Iterator[None]:
    """Turn a closed pipe into one line: the worker died."""
    try:
        yield
    except (EOFError, ConnectionError):
        process.join()
        raise worker_died(f"exit code {process.exitcode}") from None


def worker_died(how: str) -> RunError:
    """The error for a worker that was killed; `how` stands in parentheses."""
    again = "Run the same command again to go on, with fewer --workers if it happens again"
    return RunError(f"a worker process died ({how}); out of memory? {again}")


@contextmanager
def _started(
    function: Callable[..., Any], num_workers: int, *, in_threads: bool, says: bool
) -> Iterator[dict[Connection, SpawnProcess]]:
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection, SpawnProcess] = {}
    resource_tracker.ensure_running()  # else the first start() starts it and unblocks Ctrl-C
    # Workers inherit the mask: Ctrl-C on the terminal reaches the driver alone, and the driver ends them.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for _ in range(num_workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(function, theirs, in_threads, says), daemon=True)
            process.start()
            theirs.close()
            workers[ours] = process
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        yield workers
    finally:
        for process in workers.values():
            process.terminate()
        for process in workers.values():
            process.join()


def _serve(function: Callable[..., Any], pipe: Connection, in_threads: bool, says: bool) -> None:
    """Do tasks until the driver closes the pipe: one after another, or each in a thread that ends with the process."""
    threading.Thread(target=_end_with_driver, daemon=True).start()
    sending = threading.Lock()

    def send(result: Any, error: BaseException | None = None) -> None:
        with sending:
            pipe.send((result, error))

    def do(task: Any) -> None:
        try:
            answer = function(task, say=lambda what: send(Said(what))) if says else function(task)
        except Exception as error:  # noqa: BLE001 - it is raised again, in the driver
            error.add_note(f"in a worker process:\n{traceback.format_exc()}")
            send(None, error)
        else:
            send(answer)

    while True:
        try:
            task = pipe.recv()
        except (EOFError, ConnectionError):
            return
        if in_threads:
            threading.Thread(target=do, args=(task,), daemon=True).start()
        else:
            do(task)


def _end_with_driver() -> None:
    """Wait for the end of the driver. Then end this process at once, so that it writes nothing beside a new driver."""
    driver = multiprocessing.parent_process()
    assert driver is not None
    driver.join()
    os._exit(1)
