"""One thread a process: tests are small, run side by side, and compare bits."""

import logging
import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from browser_for_tests import Browser
    from download_server_for_tests import DownloadServer

FIRST = (
    "test_training.py",
    "test_killed.py",
    "test_sharded.py",
    "test_readme.py",
    "test_gpu_check.py",
    "test_leaving.py",
    "test_slurm.py",
    "test_report.py",
    "test_profile.py",
    "test_gradients.py",
    "test_loader.py",
)
"""The longest files begin first, so that at the end no process waits long for the other."""

# set before torch is imported; processes that tests start inherit it
os.environ["OMP_NUM_THREADS"] = "1"

# A script in the background ignores Ctrl-C, and so would the processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """main() starts logging for its whole process; the next test begins without it."""
    logger = logging.getLogger("mlip_cli")
    before = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.level, logger.propagate = before


@pytest.fixture(scope="module")
def chromium() -> Iterator["Browser"]:
    """A browser, where this machine has one."""
    from browser_for_tests import browser, find_browser

    path = find_browser()
    if path is None:
        pytest.skip("no Chromium on this machine: the page was not opened in a browser")
    with browser(path) as opened:
        yield opened


@pytest.fixture
def server() -> Iterator["DownloadServer"]:
    """Servers of pictures on this machine."""
    from download_server_for_tests import DownloadServer

    with DownloadServer() as started:
        yield started
