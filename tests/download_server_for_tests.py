"""A web server of this machine with good and bad manners; it notes what it is asked for."""

import asyncio
import gzip
import io
import ssl
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path

import numpy as np
from PIL import Image

Answer = Callable[["Asked"], Awaitable[None]]
SLOW_STEP_S = 0.05
BOMB = gzip.compress(bytes(100 << 20), 1)
"""100 MiB in 0.5."""


@dataclass
class Asked:
    """A request, and the connection to answer it on."""

    server: "DownloadServer"
    path: str
    query: str
    headers: dict[str, str]
    writer: asyncio.StreamWriter
    times: int
    """How often this path was asked for, with this one."""

    async def send(self, status: int, body: bytes = b"", *, length: int | None = None, **headers: str) -> None:
        """Answer. `length` is the Content-Length, where it is not that of `body`; `_` in names is a dash."""
        lines = [f"HTTP/1.1 {status} x", f"Content-Length: {len(body) if length is None else length}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        await self.writer.drain()


@dataclass
class DownloadServer:
    """Serves on every address of this machine, so that 127.0.0.1, 127.0.0.2 ... are hosts of their own."""

    port: int = 0
    asked: Counter[str] = field(default_factory=Counter)
    """Requests by path and query."""
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    """Of the last request, by path."""
    open: Counter[str] = field(default_factory=Counter)
    most_open: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """The most requests at a time, by host, and of `all`."""
    when: list[tuple[float, str]] = field(default_factory=list)
    """Time and path of each request."""
    dialled: set[str] = field(default_factory=set)
    """Addresses of this machine that connections were made to."""
    certificate: Path | None = None
    """Of HTTPS, with its key."""

    def __enter__(self) -> "DownloadServer":
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "0.0.0.0", self.port, backlog=1024, ssl=self._tls()), self._loop
        ).result()
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        """A URL of this server."""
        return f"{'https' if self.certificate else 'http'}://{host}:{self.port}/{path}"

    def _tls(self) -> ssl.SSLContext | None:
        if self.certificate is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate)
        return context

    async def _end(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.dialled.add(writer.get_extra_info("sockname")[0])
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                target = head[0].split(" ")[1]
                headers = {
                    name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)
                }
                path, _, query = target.partition("?")
                self.asked[target] += 1
                self.headers[path] = headers
                self.when.append((time.monotonic(), path))
                host = headers["host"].partition(":")[0]
                self.open[host] += 1
                self.most_open[host] = max(self.most_open[host], self.open[host])
                self.most_open["all"] = max(self.most_open["all"], self.open.total())
                try:
                    kind = path.strip("/").split("/")[0]
                    asked = Asked(self, path, query, headers, writer, self.asked[target])
                    if await ANSWERS.get(kind, missing)(asked) is False:
                        break
                finally:
                    self.open[host] -= 1
        writer.close()


def jpeg(number: int, *, side: int = 40) -> bytes:
    """A JPEG, another for every number."""
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST).save(file, "JPEG", quality=90)
    return file.getvalue()


def number_of(asked: Asked) -> int:
    """The digits of a path, as a number."""
    return int("0" + "".join(filter(str.isdigit, asked.path)))


async def good(asked: Asked) -> None:
    await asked.send(200, jpeg(number_of(asked)), Content_Type="image/jpeg", Set_Cookie="id=1; Path=/")


async def unnamed(asked: Asked) -> None:
    await asked.send(200, jpeg(number_of(asked)), Content_Type="text/plain")


async def missing(asked: Asked) -> None:
    await asked.send(404, b"<html>not here")


async def gone(asked: Asked) -> None:
    await asked.send(410)


async def slow(asked: Asked) -> None:
    await asyncio.sleep(0.3)
    await good(asked)


async def silent(asked: Asked) -> None:
    await asyncio.sleep(3_600)


async def slow_headers(asked: Asked) -> None:
    for byte in b"HTTP/1.1 200 x\r\nContent-Length: 5\r\nX-A: " + 10_000 * b"a":
        asked.writer.write(bytes([byte]))
        await asked.writer.drain()
        await asyncio.sleep(SLOW_STEP_S)


async def endless(asked: Asked) -> bool:
    """A body without an end, as fast as it is read."""
    asked.writer.write(b"HTTP/1.1 200 x\r\nConnection: close\r\n\r\n" + jpeg(1))
    while True:
        asked.writer.write(bytes(1 << 16))
        await asked.writer.drain()


async def drip(asked: Asked) -> bool:
    """A body without an end, a byte at a time."""
    asked.writer.write(b"HTTP/1.1 200 x\r\nConnection: close\r\n\r\n" + jpeg(1))
    while True:
        asked.writer.write(b"a")
        await asked.writer.drain()
        await asyncio.sleep(SLOW_STEP_S)


async def huge(asked: Asked) -> bool:
    await asked.send(200, jpeg(1), length=10**12)
    await asyncio.sleep(60)
    return False


async def truncated(asked: Asked) -> bool:
    body = jpeg(number_of(asked))
    await asked.send(200, body[:100], length=len(body))
    return False


async def closed(asked: Asked) -> bool:
    return False


async def redirect(asked: Asked) -> None:
    """To what the query says."""
    await asked.send(302, b"moved", Location=asked.query)


async def chain(asked: Asked) -> None:
    """/chain/N redirects N times."""
    left = number_of(asked)
    await (asked.send(301, Location=f"/chain/{left - 1}") if left else good(asked))


async def circle(asked: Asked) -> None:
    name = asked.path.rpartition("/")[2]
    other = {"a": "b", "b": "a"}[name[0]] + name[1:]
    await asked.send(302, Location=other)


async def busy_once(asked: Asked) -> None:
    await (asked.send(503) if asked.times == 1 else good(asked))


async def busy(asked: Asked) -> None:
    await asked.send(503)


async def later(asked: Asked) -> None:
    """Asks once to come back in a second."""
    await (asked.send(429, Retry_After="1") if asked.times == 1 else good(asked))


async def later_by_date(asked: Asked) -> None:
    if asked.times == 1:
        await asked.send(429, Retry_After=formatdate(time.time() + 2, usegmt=True))
    else:
        await good(asked)


async def much_later(asked: Asked) -> None:
    await asked.send(503, Retry_After="3600")


async def html(asked: Asked) -> None:
    await asked.send(200, b"\n<!DOCTYPE html><title>No</title>", Content_Type="image/jpeg")


async def noise(asked: Asked) -> None:
    await asked.send(200, b"\x00\x01\x02" * 100, Content_Type="image/jpeg")


async def empty(asked: Asked) -> None:
    await asked.send(200)


async def bomb(asked: Asked) -> None:
    await asked.send(200, BOMB, Content_Encoding="gzip")


async def gzipped(asked: Asked) -> None:
    await asked.send(200, gzip.compress(jpeg(number_of(asked))), Content_Encoding="gzip")


async def members(asked: Asked) -> None:
    """Gzip in two members."""
    content = jpeg(number_of(asked))
    await asked.send(200, gzip.compress(content[:500]) + gzip.compress(content[500:]), Content_Encoding="gzip")


async def brotli(asked: Asked) -> None:
    await asked.send(200, b"xyz", Content_Encoding="br")


async def noai(asked: Asked) -> None:
    await asked.send(200, jpeg(number_of(asked)), X_Robots_Tag="noarchive, noai")


async def others_noai(asked: Asked) -> None:
    await asked.send(200, jpeg(number_of(asked)), X_Robots_Tag="otherbot: noai, noindex")


async def reserved(asked: Asked) -> None:
    await asked.send(200, jpeg(number_of(asked)), TDM_Reservation="1")


async def not_http(asked: Asked) -> bool:
    asked.writer.write(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")
    await asked.writer.drain()
    return False


ANSWERS: dict[str, Answer] = {
    name: answer for name, answer in globals().items() if asyncio.iscoroutinefunction(answer) and name != "missing"
}
