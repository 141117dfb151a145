"""Prepared data that lies elsewhere, at a URL that fsspec can read: indexes at once, whole shards when they are needed.

Training reads samples in an order that is random over all shards: a batch of G touches S (1 - (1 - 1/S)^G) of S shards,
nearly all of them. So what a run reads is fetched before it begins and must fit into the cache.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path, PurePosixPath
from threading import Event
from typing import Any, TypeVar
from weakref import finalize

from mlip_cli.data.cache import GIB, ShardCache
from mlip_cli.data.index import HEADER, RECORD, index_path, parse_card, read_records
from mlip_cli.errors import RunError, UsageError
from mlip_cli.files import FULL_DISK, atomic_path, full_disk_named, write_bytes
from mlip_cli.recipe.config import Cache
from mlip_cli.terminal.output import plural, say
from mlip_cli.terminal.panel import progress

T = TypeVar("T")

WAITS_S = (1.0, 4.0, 16.0)
"""Before the second, third and fourth attempt."""
AT_ONCE = 8
"""Files that are fetched side by side."""

NAME = re.compile(r"[0-9A-Za-z_][0-9A-Za-z_.-]*\.tar")
SHA256 = re.compile(r"[0-9a-f]{64}")
FINAL = (PermissionError, IsADirectoryError, NotADirectoryError)
"""What another attempt does not mend."""


def is_url(path: str) -> bool:
    """True for `s3://bucket/folder` and the like, whatever the protocol."""
    return "://" in path


class _MissingFileError(RunError):
    """Nothing lies at a URL."""


class RemoteShards:
    """A folder of shards at a URL, and its copy in the cache, which stays as long as this object lives.

    Raises:
        UsageError: no data set there, one that the cache cannot hold, or no package that speaks the protocol.
        RunError: the network failed; says the URL.
    """

    def __init__(self, url: str, config: Cache) -> None:
        self.url = url.rstrip("/")
        try:
            content = _attempted(f"{self.url}/dataset.json", self._read_card, Event())
        except _MissingFileError:
            cure = "correct the URL, or upload a folder that mlip prepare-data wrote (OUT/train, say)"
            raise UsageError(f"{self.url}: no dataset.json there; {cure}") from None
        card = parse_card(content, place=f"{self.url}/dataset.json", folder=self.url)
        self.shards = {shard["name"]: shard for shard in card["shards"]}
        self._check_names()
        self.cache = ShardCache.of(config)
        listing = [[name, shard["n"], shard["bytes"], shard["sha256"]] for name, shard in self.shards.items()]
        self.key = hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]
        finalize(self, os.close, self.cache.hold(self.key))
        with self.cache.locked():  # whoever holds the lock removes files that are not finished
            write_bytes(self.folder / "dataset.json", content)
        self._fetch_indexes()

    @property
    def folder(self) -> Path:
        """Where the copies lie."""
        return self.cache.folder / self.key

    @property
    def num_bytes(self) -> int:
        """Of all shards."""
        return sum(shard["bytes"] for shard in self.shards.values())

    def fetch(self, names: Collection[str]) -> None:
        """Have these shards in `folder`, whole and checked.

        Raises:
            RunError: one is missing or not the one of dataset.json, the network failed, or there is no room.
        """
        missing = [name for name in names if not self._has(name)]
        if not missing:
            return
        with self.cache.locked():
            missing = [name for name in names if not self._has(name)]
            needed = sum(self.shards[name]["bytes"] for name in missing)
            self.cache.make_room(needed, key=self.key)
            if missing:
                what = plural(len(missing), "shard")
                say(f"fetching {what}, {needed / GIB:.2f} GiB, from {self.url} into {self.folder}")
            self._fetch_side_by_side(missing, self._fetch_shard)

    def _read_card(self) -> bytes:
        return bytes(self._filesystem().cat_file(self._path("dataset.json")))

    def _check_names(self) -> None:
        for name, shard in self.shards.items():
            numbers = (shard["n"], shard.get("bytes"))
            is_whole = all(type(n) is int for n in numbers) and SHA256.fullmatch(str(shard.get("sha256")))
            if not NAME.fullmatch(str(name)) or not is_whole:
                raise UsageError(
                    f"{self.url}/dataset.json: no plain name, sizes and sha256 of shard {name!r}; prepare it again"
                )

    def _has(self, name: str) -> bool:
        path = self.folder / name
        return path.is_file() and path.stat().st_size == self.shards[name]["bytes"]

    def _has_index(self, name: str) -> bool:
        path = index_path(self.folder / name)
        return path.is_file() and path.stat().st_size == HEADER.itemsize + self.shards[name]["n"] * RECORD.itemsize

    def _fetch_indexes(self) -> None:
        if not all(map(self._has_index, self.shards)):
            with self.cache.locked():
                missing = [name for name in self.shards if not self._has_index(name)]
                self._fetch_side_by_side(missing, self._fetch_index)

    def _fetch_side_by_side(self, names: list[str], fetch_one: Callable[[str, Event], None]) -> None:
        is_over = Event()
        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            with (
                full_disk_named(self.cache.folder, "make room, or set data.cache.folder"),
                progress(len(names), f"fetching {self.url}") as bar,
            ):
                for future in as_completed([pool.submit(fetch_one, name, is_over) for name in names]):
                    future.result()
                    bar.advance(bar.task_ids[0], 1)
        finally:
            is_over.set()
            pool.shutdown(cancel_futures=True)

    def _fetch_index(self, name: str, is_over: Event) -> None:
        shard, index = self.shards[name], str(PurePosixPath(name).with_suffix(".idx"))

        def check(path: Path) -> None:
            header, records = read_records(path)
            if len(records) != shard["n"] or bytes(header["sha256"]).hex() != shard["sha256"]:
                raise RunError(f"not the index of {name} in dataset.json; upload it again")

        self._fetch_file(index, check, is_over)

    def _fetch_shard(self, name: str, is_over: Event) -> None:
        def check(path: Path) -> None:
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != self.shards[name]["sha256"]:
                shard, size = self.shards[name], path.stat().st_size
                raise RunError(
                    f"{size} bytes with sha256 {found[:12]}... where dataset.json says {shard['bytes']} with "
                    f"{shard['sha256'][:12]}...; upload the shard again"
                )

        self._fetch_file(name, check, is_over)

    def _fetch_file(self, name: str, check: Callable[[Path], None], is_over: Event) -> None:
        with atomic_path(self.folder / name) as temporary:

            def attempt() -> None:
                self._filesystem().get_file(self._path(name), str(temporary), callback=_stopping(is_over))
                check(temporary)

            _attempted(f"{self.url}/{name}", attempt, is_over)

    def _path(self, name: str) -> str:
        from fsspec.core import url_to_fs

        return f"{str(url_to_fs(self.url)[1]).rstrip('/')}/{name}"

    def _filesystem(self) -> Any:
        """fsspec's own cache makes it cheap to ask again, and right in another process.

        Raises:
            UsageError: no package that speaks the protocol.
        """
        from fsspec.core import url_to_fs
        from fsspec.registry import known_implementations

        protocol = self.url.partition("://")[0]
        try:
            return url_to_fs(self.url)[0]
        except ImportError as error:
            package = str(known_implementations.get(protocol, {}).get("class", "")).partition(".")[0]
            cure = f"pip install {'aiohttp' if package == 'fsspec' else package}" if package else str(error)
            raise UsageError(f"{self.url}: {protocol}:// needs another package; {cure}") from error
        except ValueError as error:
            raise UsageError(f"{self.url}: fsspec knows no protocol {protocol}://; copy the data to a disk") from error


def _stopping(is_over: Event) -> Any:
    """A callback of fsspec that ends a transfer nobody waits for any more."""
    from fsspec.callbacks import Callback

    class Stopping(Callback):
        def relative_update(self, inc: int = 1) -> None:
            if is_over.is_set():
                raise InterruptedError("another transfer failed")

    return Stopping()


def _attempted(url: str, work: Callable[[], T], is_over: Event) -> T:
    """What `work` gives, attempted again after a pause where that may help.

    Raises:
        UsageError: `work` says so.
        RunError: the last attempt failed; says the URL and why.
        OSError: the disk is full.
    """
    for wait_s in (*WAITS_S, None):
        try:
            return work()
        except UsageError:
            raise
        except Exception as error:  # the packages that fsspec calls have errors of their own, without a common base
            if isinstance(error, FileNotFoundError):
                raise _MissingFileError(f"{url}: no such file; upload it again") from error
            if isinstance(error, OSError) and error.errno in FULL_DISK:
                raise
            if isinstance(error, FINAL) or wait_s is None or is_over.is_set():
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                cure = "" if isinstance(error, RunError) else "; look at network and credentials, then try again"
                raise RunError(f"{url}: {reason}{cure}") from error
            is_over.wait(wait_s)
    raise AssertionError("unreachable")


def check_fit(remotes: Sequence[RemoteShards]) -> None:
    """See that the cache can hold all these data sets together.

    Raises:
        UsageError: it cannot.
    """
    needed = sum(remote.num_bytes for remote in remotes)
    if remotes and needed > (most := remotes[0].cache.most_bytes):
        urls = ", ".join(remote.url for remote in remotes)
        raise UsageError(
            f"data.cache.gib: {most / GIB:g} is less than the {needed / GIB:.2f} GiB of {urls}, which are read in "
            f"random order; set it to {-(-needed // GIB)} or more, or copy the data to a disk that all nodes see"
        )
