"""What is known of each host in this process: how many rows ask it, whether it asked to wait, whether it answers."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from mlip_cli.data.download.failure import DownloadError
from mlip_cli.data.download.outcome import ASKED_TO_WAIT, HOST_SILENT

LONGEST_WAIT_S = 60.0
"""A server that asks for a longer pause ends the row."""
MOST_PAUSES = 3
"""Pauses that a host may ask for without an answer between them."""
MOST_FAILURES = 8
"""Connections to a host that may fail one after another; then its rows end without being tried."""
MOST_TIMEOUTS = 24
"""Answers that may not be whole in time one after another; then the same. A host that takes connections and says
nothing would hold each of its rows for all of its time."""
CLOSED_S = 300.0
"""After so long such a host is tried again."""
MOST_HOSTS = 10_000
"""More are forgotten when nothing is known of them."""


@dataclass
class Host:
    """A host, in one process."""

    slots: asyncio.Semaphore
    users: int = 0
    """Rows that ask it or wait to."""
    paused_until: float = 0.0
    closed_until: float = 0.0
    closed_as: tuple[str, str] = ("", "")
    """Reason and detail of rows that end without being tried."""
    pauses: int = 0
    """Without an answer since."""
    failures: int = 0
    """Connections that failed since the last whole answer."""
    timeouts: int = 0
    """Answers that were not whole in time since then."""

    def was_whole(self) -> None:
        """An answer ended, whatever it said."""
        self.failures = self.timeouts = 0

    def answered(self) -> None:
        """It answered without asking to wait."""
        self.pauses = 0

    def failed(self, words: str) -> None:
        """A connection failed."""
        self.failures += 1
        if self.failures >= MOST_FAILURES:
            self._close(HOST_SILENT, f"{self.failures} connections failed before, the last: {words}")

    def timed_out(self, words: str) -> None:
        """A connection did not fail, and its answer was not whole in time."""
        self.failures = 0
        self.timeouts += 1
        if self.timeouts >= MOST_TIMEOUTS:
            self._close(HOST_SILENT, f"{self.timeouts} answers before timed out, the last: {words}")

    def pause(self, seconds: float) -> None:
        """It asks all rows to wait."""
        now = time.monotonic()
        self.pauses += now >= self.paused_until
        self.paused_until = max(self.paused_until, now + seconds)
        if seconds > LONGEST_WAIT_S or self.pauses > MOST_PAUSES:
            self._close(ASKED_TO_WAIT, f"the host asked other rows to wait, the last time for {seconds:,.0f} s")

    def _close(self, reason: str, detail: str) -> None:
        self.closed_until, self.closed_as = time.monotonic() + CLOSED_S, (reason, detail)

    async def ready(self) -> None:
        """Wait until it may be asked.

        Raises:
            DownloadError: it may not be for a while.
        """
        while (left := self.paused_until - time.monotonic()) > 0 and not self._is_closed():
            await asyncio.sleep(min(left, LONGEST_WAIT_S))
        if self._is_closed():
            raise DownloadError(*self.closed_as)

    def _is_closed(self) -> bool:
        return time.monotonic() < self.closed_until

    def is_forgotten(self) -> bool:
        """True when nothing is lost without it."""
        now = time.monotonic()
        return (
            not self.users
            and not self.failures
            and not self.timeouts
            and now >= max(self.paused_until, self.closed_until)
        )


@dataclass
class Hosts:
    """All hosts, and the connections of this process."""

    per_host: int
    connections: asyncio.Semaphore
    known: dict[str, Host] = field(default_factory=dict)

    @asynccontextmanager
    async def turn(self, name: str) -> AsyncIterator[Host]:
        """Wait for a connection to a host, which is free again after the block.

        Raises:
            DownloadError: the host is not asked for a while.
        """
        host = self.known.setdefault(name, Host(asyncio.Semaphore(self.per_host)))
        host.users += 1
        try:
            async with host.slots:
                await host.ready()
                async with self.connections:
                    yield host
        finally:
            host.users -= 1
            if len(self.known) > MOST_HOSTS:
                self.known = {name: host for name, host in self.known.items() if not host.is_forgotten()}
