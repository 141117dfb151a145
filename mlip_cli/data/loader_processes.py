"""torch's DataLoader over datasets that never raise: a worker process sends an error as an item."""

import os
import signal
import sys
import threading
from collections.abc import Generator, Iterator
from types import TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from mlip_cli.distributed import signal_at_death_of_parent
from mlip_cli.errors import RunError

OF_DEAD_WORKERS = ("DataLoader worker", "Pin memory thread exited")


def data_loader(batches: Dataset[Any], items: range, num_workers: int, *, pin_memory: bool = False) -> DataLoader[Any]:
    """The `items` of `batches`, in order, made in `num_workers` processes; 0 means in this process."""
    return DataLoader(
        batches,
        sampler=items,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=None if num_workers == 0 else 4 if num_workers <= 2 else 2,
        pin_memory=pin_memory,
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


def items_of(loader: DataLoader[Any]) -> Generator[Any, None, None]:
    """The items that the workers made; closing the generator ends the workers.

    Raises:
        RunError: a worker process died or ran out of memory. Errors that the workers sent are raised here.
    """
    items = _quiet_iter(loader)
    while True:
        try:
            item = next(items)
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
