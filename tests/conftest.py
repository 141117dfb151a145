"""One thread a process: tests are small, run side by side, and compare bits."""

import logging
import os
import signal
from collections.abc import Iterator

import pytest

FIRST = ("test_training.py", "test_killed.py", "test_leaving.py", "test_sharded.py")
"""The longest files; none of them shall be left over for one process at the end."""

# before torch is imported, and for the processes that tests start
os.environ["OMP_NUM_THREADS"] = "1"

# in the background of a script Ctrl-C is ignored, and would be by the processes that tests start and interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """What a command said in one test is not said in the next: main() starts logging for its whole process."""
    logger = logging.getLogger("mlip_cli")
    before = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.level, logger.propagate = before
