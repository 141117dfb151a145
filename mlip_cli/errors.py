"""Error types, by who has to act."""

from collections.abc import Iterator
from contextlib import contextmanager


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
def interrupted_as(words: str) -> Iterator[None]:
    """Turn a Ctrl-C in the block into `Stopped` with these words.

    Raises:
        Stopped: there was one.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(words, exit_code=130) from None
