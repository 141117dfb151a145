"""torch's DataLoader over datasets that never raise: an error in a worker process travels as an item."""

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
    """The `items` of `batches`, in order, made in `num_workers` processes, or in this one where that is 0."""
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
    # a signal to the whole group of processes asks the training to stop, which needs its loaders for another step
    os.setpgid(0, 0)
    signal_at_death_of_parent(signal.SIGKILL)  # torch's own watch sees nothing while a worker is stuck
    report = sys.excepthook

    def report_own(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Of the thread that hands tensors over; where the main process hung up it says why itself, or is killed."""
        if not isinstance(error, EOFError | ConnectionError):
            report(kind, error, trace)

    sys.excepthook = report_own


def items_of(loader: DataLoader[Any]) -> Generator[Any, None, None]:
    """What the workers made; closing the generator ends them.

    Raises:
        RunError: a worker process died, or found no memory. Errors that the workers sent are raised here.
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
                        "a loader process found no memory for its pictures; use fewer data.num_workers"
                    ) from error
                raise
            raise RunError(
                f"a loader process died: {error}; look for too little memory or /dev/shm, or use data.num_workers=0"
            ) from error
        if isinstance(item, Exception):
            raise item
        yield item


def _quiet_iter(loader: DataLoader[Any]) -> Iterator[Any]:
    """iter(loader), less torch's SIGCHLD handler, which raises wherever the main process happens to be.

    A worker that died is found at the next item that it owes, within five seconds.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    items = iter(loader)
    if threading.current_thread() is threading.main_thread() and handler is not None:
        signal.signal(signal.SIGCHLD, handler)
    return items
