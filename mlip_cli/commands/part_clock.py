"""Where the seconds of one call go, by parts that are opened and closed around pieces of it."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

from mlip_cli.distributed import synchronize


class PartClock:
    """Where the seconds of one call go: every moment counts for the innermost part that is open, and for it alone.

    The device is waited for at every border, so that a part's seconds hold its work and not its queueing.

    Args:
        now: the clock in seconds; `time.thread_time` counts the CPU alone.
        undivided: parts that keep what is opened inside them.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        now: Callable[[], float] = time.perf_counter,
        undivided: Sequence[str] = (),
    ) -> None:
        self.device, self.now, self.undivided = torch.device(device), now, frozenset(undivided)
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    def enter(self, name: str) -> None:
        """Open a part; the one around it stands still."""
        self._border()
        keeps = self._open and self._open[-1] in self.undivided
        self._open.append(self._open[-1] if keeps else name)

    def leave(self) -> None:
        """Close the innermost part; the one around it goes on."""
        self._border()
        self._open.pop()

    def switch(self, name: str) -> None:
        """From now on the innermost part is another one."""
        self._border()
        if self._open[-1] not in self.undivided:
            self._open[-1] = name

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block for a part."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose calls count for a part."""

        @wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            with self.part(name):
                return function(*arguments, **named)

        return call

    def take(self) -> dict[str, float]:
        """Seconds by part since the last time; starts from nothing again."""
        assert not self._open, self._open
        seconds, self.seconds = self.seconds, {}
        return seconds

    def _border(self) -> None:
        synchronize(self.device)
        moment = self.now()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + moment - self._since
        self._since = moment


@contextmanager
def replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """`owner.name` is `function` inside the block, and afterwards exactly what it was: nothing of its own, say."""
    is_own = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
