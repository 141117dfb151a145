"""Files at URLs that fsspec speaks: transfers side by side, and errors as one line with the URL."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

from mlip_cli.errors import RunError, UsageError
from mlip_cli.files import FULL_DISK
from mlip_cli.terminal.panel import progress

WITHOUT_RETRIES = ("http", "https")
"""Protocols whose backend gives up at the first failure. s3fs, gcsfs, adlfs and huggingface_hub retry by themselves."""
WAITS_S = (1.0, 4.0, 16.0)
"""Pauses before the second, third and fourth attempt with those."""
AT_ONCE = 8
"""Files that are transferred side by side."""


class MissingFileError(RunError):
    """There is no file at a URL."""


class Transfers:
    """Transfers side by side, which all end after one of them failed."""

    def __init__(self) -> None:
        self.are_over = Event()

    def fetch(self, folder: str, name: str, path: Path) -> None:
        """Copy the file `name` of the folder at a URL to `path`.

        Raises:
            RunError: it is missing, or the network failed; where the backend gives up at once, again and again.
        """
        self._retried(folder, name, lambda fs, place: fs.get_file(place, str(path), callback=self._stopping()))

    def send(self, path: Path, folder: str, name: str) -> None:
        """Copy the file at `path` to `name` in the folder at a URL. Object stores show it when it is whole.

        Raises:
            RunError: as `fetch`.
        """
        self._retried(folder, name, lambda fs, place: fs.put_file(str(path), place, callback=self._stopping()))

    def _retried(self, folder: str, name: str, transfer: Callable[[Any, str], None]) -> None:
        waits = WAITS_S if folder.partition("://")[0] in WITHOUT_RETRIES else ()
        for wait_s in (*waits, None):
            try:
                with errors_named(f"{folder}/{name}"):
                    filesystem, path = filesystem_of(folder)
                    transfer(filesystem, f"{path}/{name}")
                return
            except MissingFileError:
                raise
            except RunError:
                if wait_s is None or self.are_over.wait(wait_s):
                    raise

    def _stopping(self) -> Any:
        """A callback of fsspec that ends a transfer after another one failed."""
        from fsspec.callbacks import Callback

        are_over = self.are_over

        class Stopping(Callback):
            def relative_update(self, inc: int = 1) -> None:
                if are_over.is_set():
                    raise InterruptedError("another transfer failed")

        return Stopping()


def side_by_side(transfer: Callable[[str, Transfers], None], names: Sequence[str], *, label: str) -> None:
    """Call `transfer` for each name, AT_ONCE at a time, under a progress bar.

    Raises:
        RunError: one failed; the others have ended.
    """
    transfers = Transfers()
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        with progress(len(names), label) as bar:
            for future in as_completed([pool.submit(transfer, name, transfers) for name in names]):
                future.result()
                bar.advance(bar.task_ids[0], 1)
    finally:
        transfers.are_over.set()
        pool.shutdown(cancel_futures=True)


def filesystem_of(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL and the path in it. fsspec keeps it, so asking again costs nothing.

    Raises:
        UsageError: no package speaks the protocol.
    """
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    protocol = url.partition("://")[0]
    try:
        filesystem, path = url_to_fs(url)
    except ImportError as error:
        package = str(known_implementations.get(protocol, {}).get("class", "")).partition(".")[0]
        cure = f"pip install {'aiohttp' if package == 'fsspec' else package}" if package else str(error)
        raise UsageError(f"{url}: {protocol}:// needs another package; {cure}") from error
    except ValueError as error:
        raise UsageError(f"{url}: fsspec knows no protocol {protocol}://; copy the data to a disk") from error
    return filesystem, str(path).rstrip("/")


@contextmanager
def errors_named(url: str) -> Iterator[None]:
    """Turn errors of a transfer into one line with the URL.

    Raises:
        RunError: the transfer failed.
        OSError: the disk is full.
    """
    try:
        yield
    except UsageError:
        raise
    except FileNotFoundError as error:
        raise MissingFileError(f"{url}: no such file; upload it again") from error
    except Exception as error:  # the packages that fsspec calls have errors of their own, without a common base
        if isinstance(error, OSError) and error.errno in FULL_DISK:
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"{url}: {reason}; check network and credentials, then try again") from error
