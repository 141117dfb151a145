"""A file lock that another process holds."""

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlip_cli.files import lock


@contextmanager
def held_elsewhere(path: Path) -> Iterator[None]:
    """Another process holds the lock file `path` during the block."""
    context = multiprocessing.get_context("fork")
    holds, may_end = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(path, holds, may_end))
    process.start()
    assert holds.wait(60)
    try:
        yield
    finally:
        may_end.set()
        process.join()


def _hold(path: Path, holds: Any, may_end: Any) -> None:
    with open(path, "a") as file:
        lock(file, when_held=lambda: None)
        holds.set()
        may_end.wait(60)
