"""A clock for the parts of one piece of work, which marks them itself: `with part("decode"): ...`."""

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch

from mlip_cli.devices import synchronize


class PartClock:
    """Seconds by part: every moment counts for the innermost open part, and for it alone.

    The clock waits for the device at every border, so that a part's seconds hold its work and not its queueing.

    Args:
        now: the clock in seconds; `time.thread_time` counts the CPU alone.
        undivided: parts that keep what is opened inside them.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        now: Callable[[], float] = time.perf_counter,
        undivided: Collection[str] = (),
    ) -> None:
        self.device, self.now, self.undivided = torch.device(device), now, undivided
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block for a part; the part around it stands still meanwhile."""
        self._border()
        self._open.append(self._inside(name))
        try:
            yield
        finally:
            self._border()
            self._open.pop()

    def switch(self, name: str) -> None:
        """From now on the innermost block counts for another part."""
        self._border()
        self._open[-1] = self._inside(name)

    def take(self) -> dict[str, float]:
        """Seconds by part since the last call; the clock starts from nothing again."""
        assert not self._open, self._open
        seconds, self.seconds = self.seconds, {}
        return seconds

    def _inside(self, name: str) -> str:
        return self._open[-1] if self._open and self._open[-1] in self.undivided else name

    def _border(self) -> None:
        synchronize(self.device)
        moment = self.now()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + moment - self._since
        self._since = moment
