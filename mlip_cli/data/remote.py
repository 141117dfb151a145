"""Prepared data at a URL that fsspec can read: indexes are fetched when it is opened, shards before training.

Training reads samples in an order that is random over all shards. A batch of G touches S (1 - (1 - 1/S)^G) of S shards,
which is nearly all of them, so every shard is fetched before a run begins, and all of them must fit into the cache.
"""

import hashlib
import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from mlip_cli.data.cache import ShardCache
from mlip_cli.data.index import HEADER, RECORD, index_path, parse_card, read_checked
from mlip_cli.data.transfers import MissingFileError, Transfers, errors_named, filesystem_of, side_by_side
from mlip_cli.errors import RunError, UsageError
from mlip_cli.files import GIB, atomic_path, full_disk_named, write_bytes, write_text
from mlip_cli.recipe.config import Cache
from mlip_cli.terminal.output import plural, say, size_in_words

NAME = re.compile(r"[0-9A-Za-z_][0-9A-Za-z_.-]*\.tar")
SHA256 = re.compile(r"[0-9a-f]{64}")


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
            with errors_named(place):
                filesystem, path = filesystem_of(self.url)
                content = bytes(filesystem.cat_file(f"{path}/dataset.json"))
        except MissingFileError:
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
                say(f"fetching {what}, {size_in_words(needed)}, from {self.url} into {self.folder}")
            with full_disk_named(self.cache.folder, "make room, or set data.cache.folder"):
                side_by_side(self._fetch_file, missing, label=f"fetching {self.url}")

    def _fetch_file(self, name: str, transfers: Transfers) -> None:
        with atomic_path(self.folder / name) as temporary:
            transfers.fetch(self.url, name, temporary)
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


def check_fit(remotes: Sequence[RemoteShards]) -> None:
    """See that the cache can hold all these data sets together.

    Raises:
        UsageError: it cannot.
    """
    needed = sum(remote.num_bytes for remote in remotes)
    if remotes and needed > (most := remotes[0].cache.most_bytes):
        urls = ", ".join(remote.url for remote in remotes)
        raise UsageError(
            f"data.cache.gib: {most / GIB:g} is less than the {size_in_words(needed)} of {urls}, which a run fetches "
            f"whole; set it to {-(-needed // GIB)} or more, or copy the data to a disk that all nodes see"
        )
