"""torch's DataLoader over datasets that never raise: a worker process sends an error as an item."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, Queue
from types import TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from mlip_cli.data.workers import items_ahead
from mlip_cli.distributed import signal_at_death_of_parent
from mlip_cli.errors import RunError

OF_DEAD_WORKERS = "DataLoader worker"
PATIENCE_S = 5
"""After this time a loader process that does not end its item is killed."""


def data_loader(batches: Dataset[Any], items: Iterable[Any], num_workers: int) -> DataLoader[Any]:
    """The `items` of `batches`, in order, made in `num_workers` processes; 0 means in this process."""
    return DataLoader(
        batches,
        sampler=items,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=items_ahead(num_workers) if num_workers else None,
        worker_init_fn=_begin_worker,
        generator=torch.Generator(),  # workers' seeds, which nothing uses, must not come from the global one
    )


def _begin_worker(number: int) -> None:
    # a signal to the whole process group asks training to stop; training needs its loaders for one more step
    os.setpgid(0, 0)
    signal_at_death_of_parent(signal.SIGKILL)  # torch's own watch sees nothing while a worker is stuck
    report = sys.excepthook

    def report_own(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Be silent when the main process has gone: it reports the cause itself, or it was killed."""
        if not isinstance(error, EOFError | ConnectionError):
            report(kind, error, trace)

    sys.excepthook = report_own


def items_of(
    loader: DataLoader[Any], change: Callable[[Iterator[Any]], Iterator[Any]] = iter, *, most: int = 1
) -> Generator[Any, None, None]:
    """The items that the workers made, and what `change` makes of them while the caller works.

    The workers begin when the first item is asked for. A thread takes their items and runs `change`; `most` results
    wait. `change` must not compute with PyTorch, which would take cores from the training. Without workers there is no
    thread. Closing the generator ends thread and workers.

    Raises:
        RunError: a worker process died or ran out of memory. Errors that the workers sent are raised here, and those of
            `change`.
    """
    made = _quiet_iter(loader)  # here, since workers die with the thread that began them
    if loader.num_workers == 0:
        yield from change(_items(made))
        return
    results: Queue[Any] = Queue(most)
    is_over = threading.Event()
    thread = threading.Thread(target=_fill, args=(results, change(_items(made)), is_over), daemon=True)
    thread.start()
    try:
        while not isinstance(result := results.get(), _End):
            yield result
        if result.error is not None:
            raise result.error
    finally:
        is_over.set()
        with suppress(Empty):  # the thread may be waiting for room
            results.get_nowait()
        thread.join(PATIENCE_S)
        for worker in made._workers if thread.is_alive() else ():  # type: ignore[attr-defined]
            worker.kill()
        thread.join()


@dataclass(frozen=True)
class _End:
    """There are no more results, because of an error if there is one."""

    error: BaseException | None


def _fill(results: "Queue[Any]", found: Iterator[Any], is_over: threading.Event) -> None:
    error: BaseException | None = None
    try:
        for result in found:
            results.put(result)
            del result
            if is_over.is_set():
                return
    except BaseException as caught:  # noqa: BLE001 - raised where the results are taken
        error = caught
    if not is_over.is_set():
        results.put(_End(error))


def _items(made: Iterator[Any]) -> Iterator[Any]:
    """The items of workers that have begun, or a RunError that says what became of them."""
    while True:
        try:
            item = next(made)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:  # of torch's pipes; our own errors come as items
            if isinstance(error, RuntimeError) and not str(error).startswith(OF_DEAD_WORKERS):
                if "DefaultCPUAllocator" in str(error):
                    raise RunError(
                        "a loader process ran out of memory for its pictures; use fewer data.num_workers"
                    ) from error
                raise
            raise RunError(
                f"a loader process died: {error}; look for too little memory or /dev/shm, or use data.num_workers=0"
            ) from error
        if isinstance(item, Exception):
            raise item
        yield item


def _quiet_iter(loader: DataLoader[Any]) -> Iterator[Any]:
    """iter(loader) without torch's SIGCHLD handler, which raises at any point of the main process.

    The death of a worker is noticed within five seconds, when its next item is due.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    items = iter(loader)
    if threading.current_thread() is threading.main_thread() and handler is not None:
        signal.signal(signal.SIGCHLD, handler)
    return items
