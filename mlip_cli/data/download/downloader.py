"""Downloads beside the work of a process: a thread with an event loop, whose answers come in the order they are ready.

All parts that a process has in hand share one `Downloader`, and so its connections, its hosts and its bytes.
"""

import asyncio
import functools
import threading
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

from mlip_cli.data.download.failure import DownloadError
from mlip_cli.data.download.fetch import Fetcher
from mlip_cli.data.download.names import LookUp, look_up
from mlip_cli.data.download.options import DownloadOptions
from mlip_cli.machine import allow_open_files

Value = TypeVar("Value")
Answer = tuple[int, bytes | Exception]
FILES_A_CONNECTION = 8
"""Open ones, and those that stay open for the next row of their host."""


class Downloader:
    """Fetches the pictures of URLs. Leaving the block ends what is under way."""

    def __init__(self, options: DownloadOptions, *, lookup: LookUp = look_up) -> None:
        allow_open_files(256 + FILES_A_CONNECTION * options.connections)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="downloads", daemon=True)
        self._thread.start()
        self._fetcher = self._run(_made(options, lookup)).result()

    def __enter__(self) -> "Downloader":
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._end()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def answers(self, urls: Sequence[tuple[int, str]]) -> Iterator[tuple[int, bytes | DownloadError]]:
        """Yield (position, the bytes or why there are none) for each (position, URL), in the order they are ready.

        The bytes of an answer count as held until the next one is asked for.
        """
        ready: SimpleQueue[Answer] = SimpleQueue()
        fetching = self._run(self._fetch_all(urls, ready))
        num_taken = 0
        try:
            for _ in urls:
                position, answer = ready.get()
                num_taken += 1
                if isinstance(answer, Exception) and not isinstance(answer, DownloadError):
                    raise answer
                yield position, answer
                self._free(answer)
        finally:
            if num_taken < len(urls):
                fetching.cancel()

    def _free(self, answer: bytes | DownloadError) -> None:
        if isinstance(answer, bytes):
            self._loop.call_soon_threadsafe(self._fetcher.budget.give, answer)

    def _run(self, work: Coroutine[Any, Any, Value]) -> Future[Value]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _fetch_all(self, urls: Sequence[tuple[int, str]], ready: SimpleQueue[Answer]) -> None:
        async with asyncio.TaskGroup() as group:
            for position, url in urls:
                group.create_task(self._fetch_one(position, url, ready))

    async def _fetch_one(self, position: int, url: str, ready: SimpleQueue[Answer]) -> None:
        answer: bytes | Exception
        try:
            answer = await self._fetcher.fetch(url)
        except DownloadError as error:
            answer = DownloadError(error.reason, error.detail)  # without a traceback, whose frames hold the bytes
        except Exception as error:  # noqa: BLE001 - it is yielded or raised where the answer is waited for
            answer = error
        ready.put((position, answer))

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._fetcher.close()


async def _made(options: DownloadOptions, lookup: LookUp) -> Fetcher:
    return Fetcher(options, lookup=lookup)


@functools.cache
def _of_process(options: DownloadOptions) -> Downloader:
    return Downloader(options)


_ONE_AT_A_TIME = threading.Lock()


def downloaded(
    urls: Sequence[tuple[int, str]], options: DownloadOptions
) -> Iterator[tuple[int, bytes | DownloadError]]:
    """As `Downloader.answers`, by the one downloader of this process, which ends with the process."""
    if not urls:
        return
    with _ONE_AT_A_TIME:
        downloader = _of_process(options)
    yield from downloader.answers(urls)
