"""Wait for other processes."""

import time
from collections.abc import Callable
from subprocess import Popen


def wait_until(
    condition: Callable[[], bool], process: Popen[str] | None = None, *, what: str = "", every_s: float = 0.001
) -> None:
    """Wait until it is so, while a process works.

    Args:
        what: is said when it never is so.
        every_s: between two looks.
    """
    deadline = time.monotonic() + 240
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, what
        time.sleep(every_s)
