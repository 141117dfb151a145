"""Names of hosts become IP addresses that were checked, and the connection is made to these: nothing asks DNS again."""

import asyncio
import ipaddress
import socket
import threading
import time
from collections.abc import Callable

from aiohttp.abc import AbstractResolver, ResolveResult

from mlip_cli.data.download.addresses import why_not_public
from mlip_cli.data.download.failure import DownloadError
from mlip_cli.data.download.outcome import NO_DNS, NO_HOST, REFUSED

LookUp = Callable[[str], list[str]]
"""Name of a host -> its IP addresses; raises socket.gaierror."""

KNOWN_S = 60.0
"""An answer is used again for so long."""
MOST_KNOWN = 10_000
MOST_LOOKUPS = 64
"""At the same time."""
NO_SUCH_NAME = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))


def look_up(name: str) -> list[str]:
    """The IP addresses of a host, by the resolver of the system."""
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    return list(dict.fromkeys(str(place[0]) for *_, place in found))


class CheckedResolver(AbstractResolver):
    """What aiohttp asks before it connects: it gets the addresses of a name, or none where one may not be asked."""

    def __init__(self, lookup: LookUp, *, allow_private: bool) -> None:
        self._lookup, self._allow_private = lookup, allow_private
        self._known: dict[str, tuple[float, asyncio.Task[list[str]]]] = {}
        self._lookups = asyncio.Semaphore(MOST_LOOKUPS)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """The addresses to connect to.

        Raises:
            DownloadError: the name has none, or one of them is not public.
        """
        until, task = self._known.get(host, (0.0, None))
        if task is None or (task.done() and time.monotonic() > until):
            if len(self._known) >= MOST_KNOWN:
                self._known = {name: entry for name, entry in self._known.items() if not entry[1].done()}
            task = asyncio.create_task(self._checked(host))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # all who ask may have left
            self._known[host] = (time.monotonic() + KNOWN_S, task)
        return [_result(host, ip, port) for ip in await asyncio.shield(task)]

    async def close(self) -> None:
        """Nothing is open."""

    async def _checked(self, host: str) -> list[str]:
        try:
            async with self._lookups:
                ips = await _in_a_thread(self._lookup, host)
        except socket.gaierror as error:
            if error.errno in NO_SUCH_NAME:
                raise DownloadError(NO_HOST, host) from None
            raise DownloadError(NO_DNS, f"{host}: {error.strerror}", is_retried=True) from None
        except UnicodeError:  # Python's own encoding of names
            raise DownloadError(NO_HOST, f"{host}: no possible name") from None
        for ip in () if self._allow_private else ips:
            if why := why_not_public(ipaddress.ip_address(ip)):
                raise DownloadError(REFUSED, f"{host} is {ip}: {why}")
        return ips


async def _in_a_thread(lookup: LookUp, host: str) -> list[str]:
    """Run a lookup in a thread that nothing waits for: the system may take half a minute over one."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[list[str]] = loop.create_future()

    def answer(ips: list[str] | None, error: Exception | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(ips or [])
        else:
            future.set_exception(error)

    def ask() -> None:
        ips, failure = None, None
        try:
            ips = lookup(host)
        except (OSError, UnicodeError) as error:
            failure = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(answer, ips, failure)

    threading.Thread(target=ask, daemon=True).start()
    return await future


def _result(host: str, ip: str, port: int) -> ResolveResult:
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    numeric = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    return {"hostname": host, "host": ip, "port": port, "family": family, "proto": 0, "flags": numeric}
