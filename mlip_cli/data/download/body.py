"""The bytes of an answer: at most so many of one, and at most so many of all together."""

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import ClientResponse

from mlip_cli.data.download.failure import DownloadError
from mlip_cli.data.download.outcome import BAD_ANSWER, CUT_OFF, TOO_LARGE

NOT_COMPRESSED = ("", "identity")
BY_ZLIB = ("gzip", "x-gzip", "deflate")
ZLIB_OR_GZIP = 32 + zlib.MAX_WBITS
"""Tells zlib to see by the first bytes which of both it is."""
GZIP = b"\x1f\x8b"


class Budget:
    """The bytes that are in hand: of answers that are being read, and of those that nobody has taken yet."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self._whole = 0
        """Those of whole answers: whoever takes them gives them back."""
        self._changed = asyncio.Event()
        self._beyond = asyncio.Lock()

    def take(self, num_bytes: int) -> None:
        """Hold bytes of an answer; with a negative number give them back."""
        self.held += num_bytes
        self._changed.set()

    def keep(self, content: bytes) -> None:
        """Note that a held answer is whole."""
        self._whole += len(content)

    def give(self, content: bytes) -> None:
        """An answer was taken out of hand."""
        self._whole -= len(content)
        self.take(-len(content))

    @property
    def is_full(self) -> bool:
        """True when whoever reads has to wait."""
        return self.held >= self.limit

    async def room(self) -> None:
        """Wait until there is room for more answers."""
        await self._until(lambda: not self.is_full)

    @asynccontextmanager
    async def beyond(self) -> AsyncIterator[None]:
        """Let one answer end that goes beyond the limit, when no whole one is left whose bytes would make room."""
        async with self._beyond:
            await self._until(lambda: not self.is_full or not self._whole)
            yield

    async def _until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            self._changed.clear()
            await self._changed.wait()


async def read_body(response: ClientResponse, *, max_bytes: int, budget: Budget, deadline: asyncio.Timeout) -> bytes:
    """The content of an answer. Its bytes stay in `budget`; those of a failure do not.

    Waiting for other answers of this process moves the deadline.

    Raises:
        DownloadError: too large, cut off, or compressed by what we do not know.
    """
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    if encoding not in (*NOT_COMPRESSED, *BY_ZLIB):
        raise DownloadError(BAD_ANSWER, f"Content-Encoding: {encoding}, and none was asked for")
    if (declared := response.content_length or 0) > max_bytes:
        raise _too_large(f"Content-Length: {declared:,}", max_bytes)
    held = 0
    try:
        body = bytearray()
        async for chunk in response.content.iter_any():
            body += chunk
            held += len(chunk)
            budget.take(len(chunk))
            if held > max_bytes:
                raise _too_large("more came", max_bytes)
            if budget.is_full:
                await _read_rest(response, body, max_bytes=max_bytes, budget=budget, deadline=deadline)
                held = len(body)
        content = bytes(body) if encoding in NOT_COMPRESSED else _decompressed(body, max_bytes)
    except BaseException:
        budget.take(-held)
        raise
    budget.take(len(content) - held)
    budget.keep(content)
    return content


async def _read_rest(
    response: ClientResponse, body: bytearray, *, max_bytes: int, budget: Budget, deadline: asyncio.Timeout
) -> None:
    """Read on although the budget is spent, when it is this answer's turn."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    when = deadline.when() or started
    deadline.reschedule(None)
    async with budget.beyond():
        deadline.reschedule(when + loop.time() - started)
        before = len(body)
        try:
            async for chunk in response.content.iter_any():
                body += chunk
                budget.take(len(chunk))
                if len(body) > max_bytes:
                    raise _too_large("more came", max_bytes)
        except BaseException:
            budget.take(before - len(body))
            raise


def _decompressed(body: bytearray, max_bytes: int) -> bytes:
    """What a compressed body holds, of gzip all its members; no more than the cap is ever made."""
    content, rest = bytearray(), bytes(body)
    while rest.startswith(GZIP) or not content:
        decompressor = zlib.decompressobj(ZLIB_OR_GZIP)
        try:
            content += decompressor.decompress(rest, max_bytes + 1 - len(content))
        except zlib.error as error:
            raise DownloadError(BAD_ANSWER, f"its compression is damaged: {error}") from None
        if len(content) > max_bytes:
            raise _too_large(f"{len(body):,} bytes hold more", max_bytes)
        if not decompressor.eof:
            raise DownloadError(CUT_OFF, f"compressed, without its end, after {len(body):,} bytes", is_retried=True)
        if not (rest := decompressor.unused_data):
            break
    return bytes(content)


def _too_large(seen: str, max_bytes: int) -> DownloadError:
    return DownloadError(TOO_LARGE, f"{seen}, at most {max_bytes:,} bytes are taken")
