"""Prepared data at a URL that fsspec can read: indexes are fetched when it is opened, shards before training.

Training reads samples in an order that is random over all shards. A batch of G touches S (1 - (1 - 1/S)^G) of S shards,
which is nearly all of them, so every shard is fetched before a run begins, and all of them must fit into the cache.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

from mlip_cli.data.cache import ShardCache
from mlip_cli.data.index import HEADER, RECORD, index_path, parse_card, read_checked
from mlip_cli.errors import RunError, UsageError
from mlip_cli.files import FULL_DISK, GIB, atomic_path, full_disk_named, write_bytes, write_text
from mlip_cli.recipe.config import Cache
from mlip_cli.terminal.output import plural, say
from mlip_cli.terminal.panel import progress

WITHOUT_RETRIES = ("http", "https")
"""Protocols whose backend gives up at the first failure. s3fs, gcsfs, adlfs and huggingface_hub retry by themselves."""
WAITS_S = (1.0, 4.0, 16.0)
"""Pauses before the second, third and fourth attempt with those."""
AT_ONCE = 8
"""Files that are fetched side by side."""

NAME = re.compile(r"[0-9A-Za-z_][0-9A-Za-z_.-]*\.tar")
SHA256 = re.compile(r"[0-9a-f]{64}")


def is_url(path: str) -> bool:
    """True for `s3://bucket/folder` and the like, whatever the protocol."""
    return "://" in path


class _MissingFileError(RunError):
    """There is no file at a URL."""


class RemoteShards:
    """A folder of shards at a URL, and its copy in the cache.

    Raises:
        UsageError: the URL holds no data set, its data set cannot be checked, or no package speaks the protocol.
        RunError: the network failed; the message names the URL.
    """

    def __init__(self, url: str, config: Cache) -> None:
        self.url = url.rstrip("/")
        place = f"{self.url}/dataset.json"
        try:
            with _errors_named(place):
                filesystem, path = _filesystem(self.url)
                content = bytes(filesystem.cat_file(f"{path}/dataset.json"))
        except _MissingFileError:
            cure = "correct the URL, or upload a folder that mlip prepare-data wrote (OUT/train, say)"
            raise UsageError(f"{self.url}: no dataset.json there; {cure}") from None
        self.shards = _checked_shards(parse_card(content, place=place, folder=self.url), place=place)
        self.cache = ShardCache.of(config)
        listing = [[name, shard["n"], shard["bytes"], shard["sha256"]] for name, shard in self.shards.items()]
        self.folder = self.cache.subfolder(hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16])
        """Where the copies lie."""
        with self.cache.locked():
            write_bytes(self.folder / "dataset.json", content)
            write_text(self.folder / "url", f"{self.url}\n")
        self.fetch([index_path(Path(name)).name for name in self.shards])

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard["bytes"] for shard in self.shards.values())

    def fetch(self, names: Collection[str]) -> None:
        """Have these shards or indexes in `folder`, whole and checked. Those that are there are not fetched again.

        Raises:
            RunError: a file is missing or differs from dataset.json, the network failed, or there is no room.
        """
        if all(map(self._has, names)):
            return
        with self.cache.locked():
            missing = [name for name in names if not self._has(name)]
            needed = sum(map(self._size, missing))
            self.cache.check_room(needed)
            if missing:
                what = plural(len(missing), "file")
                say(f"fetching {what}, {needed / GIB:.2f} GiB, from {self.url} into {self.folder}")
            self._fetch_side_by_side(missing)

    def _fetch_side_by_side(self, names: Sequence[str]) -> None:
        is_over = Event()
        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            with (
                full_disk_named(self.cache.folder, "make room, or set data.cache.folder"),
                progress(len(names), f"fetching {self.url}") as bar,
            ):
                for future in as_completed([pool.submit(self._fetch_file, name, is_over) for name in names]):
                    future.result()
                    bar.advance(bar.task_ids[0], 1)
        finally:
            is_over.set()
            pool.shutdown(cancel_futures=True)

    def _fetch_file(self, name: str, is_over: Event) -> None:
        with atomic_path(self.folder / name) as temporary:
            waits = WAITS_S if self.url.partition("://")[0] in WITHOUT_RETRIES else ()
            for wait_s in (*waits, None):
                try:
                    with _errors_named(f"{self.url}/{name}"):
                        filesystem, path = _filesystem(self.url)
                        filesystem.get_file(f"{path}/{name}", str(temporary), callback=_stopping(is_over))
                    break
                except _MissingFileError:
                    raise
                except RunError:
                    if wait_s is None or is_over.wait(wait_s):
                        raise
            self._check(name, temporary)

    def _shard(self, name: str) -> dict[str, Any]:
        """The shard in dataset.json that a tar or an index belongs to."""
        return self.shards[str(Path(name).with_suffix(".tar"))]

    def _size(self, name: str) -> int:
        shard = self._shard(name)
        return int(shard["bytes"] if name.endswith(".tar") else HEADER.itemsize + shard["n"] * RECORD.itemsize)

    def _has(self, name: str) -> bool:
        path = self.folder / name
        return path.is_file() and path.stat().st_size == self._size(name)

    def _check(self, name: str, path: Path) -> None:
        """Compare the file that was fetched to `path` with dataset.json."""
        shard, place = self._shard(name), f"{self.url}/{name}"
        if name.endswith(".tar"):
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != shard["sha256"]:
                raise RunError(
                    f"{place}: {path.stat().st_size} bytes with sha256 {found[:12]}... where dataset.json says "
                    f"{shard['bytes']} with {shard['sha256'][:12]}...; upload the shard again"
                )
            return
        try:
            header, records = read_checked(path)
            is_its_index = len(records) == shard["n"] and bytes(header["sha256"]).hex() == shard["sha256"]
        except RunError:
            is_its_index = False
        if not is_its_index:
            tar = Path(name).with_suffix(".tar")
            raise RunError(f"{place}: not the index of {tar} in dataset.json; upload it again")


def _filesystem(url: str) -> tuple[Any, str]:
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


def _checked_shards(card: dict[str, Any], *, place: str) -> dict[str, dict[str, Any]]:
    """Shards of a card by name; a name must not lead out of the cache.

    Raises:
        UsageError: a shard lacks a plain name, sizes or sha256.
    """
    for shard in card["shards"]:
        numbers = (shard["n"], shard.get("bytes"))
        is_whole = all(type(n) is int for n in numbers) and SHA256.fullmatch(str(shard.get("sha256")))
        if not NAME.fullmatch(str(shard["name"])) or not is_whole:
            raise UsageError(f"{place}: no plain name, sizes and sha256 of shard {shard['name']!r}; prepare it again")
    return {shard["name"]: shard for shard in card["shards"]}


@contextmanager
def _errors_named(url: str) -> Iterator[None]:
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
        raise _MissingFileError(f"{url}: no such file; upload it again") from error
    except Exception as error:  # the packages that fsspec calls have errors of their own, without a common base
        if isinstance(error, OSError) and error.errno in FULL_DISK:
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"{url}: {reason}; check network and credentials, then try again") from error


def _stopping(is_over: Event) -> Any:
    """A callback of fsspec that ends a transfer after another one failed."""
    from fsspec.callbacks import Callback

    class Stopping(Callback):
        def relative_update(self, inc: int = 1) -> None:
            if is_over.is_set():
                raise InterruptedError("another transfer failed")

    return Stopping()


def check_fit(remotes: Sequence[RemoteShards]) -> None:
    """See that the cache can hold all these data sets together.

    Raises:
        UsageError: it cannot.
    """
    needed = sum(remote.num_bytes for remote in remotes)
    if remotes and needed > (most := remotes[0].cache.most_bytes):
        urls = ", ".join(remote.url for remote in remotes)
        raise UsageError(
            f"data.cache.gib: {most / GIB:g} is less than the {needed / GIB:.2f} GiB of {urls}, which a run fetches "
            f"whole; set it to {-(-needed // GIB)} or more, or copy the data to a disk that all nodes see"
        )
