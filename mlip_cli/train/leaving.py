"""A second Ctrl-C ends the process, also where Python does not listen: in a long operation, a collective, a dead disk.

Python's signal handlers run between two of its own instructions. A thread is told of signals at once.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import active_children

GRACE_S = 3.0
"""For leaving in order, which takes no longer where nothing hangs."""
LOOK_EVERY_S = 1.0
"""At torchrun: a rank that lost it has nobody to end it."""

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_DONE = 0


@contextmanager
def sure_to_leave() -> Iterator[None]:
    """Within the block a Ctrl-C after another stop signal ends the process within `GRACE_S`, whatever it does.

    Under torchrun, which passes a second Ctrl-C on as SIGTERM, that counts too; where torchrun itself is gone, a rank
    gets SIGTERM.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    _pipes.add(writing)
    previous = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watch = threading.Thread(target=_watch, args=(reading,), name="second Ctrl-C", daemon=True)
    watch.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.write(writing, bytes([_DONE]))
        watch.join()
        _pipes.discard(writing)
        os.close(writing)
        os.close(reading)


_pipes: set[int] = set()
"""Pipes that a forked process must not write to: its signals are not ours."""


def _forget() -> None:
    if _pipes:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget)


def _watch(reading: int) -> None:
    is_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    parent = os.getppid()
    seen: list[int] = []
    deadline: float | None = None
    while True:
        wait_s = LOOK_EVERY_S if deadline is None else max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select([reading], [], [], wait_s if is_torchrun or deadline is not None else None)
        if not ready and deadline is not None:
            _end()
        if is_torchrun and os.getppid() != parent:
            parent = os.getppid()
            _signal_main_thread(signal.SIGTERM)
        for number in os.read(reading, 1024) if ready else b"":
            if number == _DONE:
                return
            if number == signal.SIGINT and seen:
                deadline = deadline or time.monotonic() + GRACE_S
            elif number == signal.SIGTERM and signal.SIGINT in seen and is_torchrun:
                _signal_main_thread(signal.SIGINT)
            if number in STOPS:
                seen.append(number)


def _signal_main_thread(number: signal.Signals) -> None:
    ident = threading.main_thread().ident
    assert ident is not None
    signal.pthread_kill(ident, number)


def _end() -> None:
    """Leave without a word to anything that may hang."""
    for child in active_children():
        child.kill()
    show_cursor = b"\x1b[?25h" if os.isatty(2) else b""
    os.write(2, show_cursor + b"error: interrupted\n")
    os._exit(130)
