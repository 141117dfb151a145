"""Error types, by who has to act."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class UsageError(ValueError):
    """The user can fix it before the work starts: `place: what; what to do`. Exit code 2."""


class RecipeError(UsageError):
    """Mistakes in a recipe, one on each line."""


class RunError(RuntimeError):
    """The work itself failed (bad data, full disk, diverged loss). Exit code 1."""


class Stopped(Exception):
    """A signal ended the work. The message says what is kept; `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def interrupted_as(words: str, *, hears_sigterm: bool = False) -> Iterator[None]:
    """Turn a Ctrl-C in the block into `Stopped` with these words.

    Args:
        hears_sigterm: SIGTERM too, which schedulers send.

    Raises:
        Stopped: there was one.
    """
    is_main_thread = threading.current_thread() is threading.main_thread()
    is_heard = hears_sigterm and is_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    exit_code = 130

    def terminate(number: int, frame: FrameType | None) -> None:
        nonlocal exit_code
        exit_code = 143  # noted here, since Ray raises a KeyboardInterrupt of its own instead of this one
        raise KeyboardInterrupt

    try:
        if is_heard:
            signal.signal(signal.SIGTERM, terminate)
        yield
    except KeyboardInterrupt:
        raise Stopped(words, exit_code=exit_code) from None
    finally:
        if is_heard:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
