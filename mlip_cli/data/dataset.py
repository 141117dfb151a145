"""A prepared data set: shards read sample by sample, in any order, through their indexes."""

import json
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlip_cli.data.index import FORMATS, check_records, index_path, parse_card, read_index, read_records
from mlip_cli.data.remote import RemoteShards
from mlip_cli.data.tar import TAR_BLOCK, checked_header
from mlip_cli.errors import RunError, UsageError
from mlip_cli.recipe.config import Cache

MAX_OPEN_SHARDS = 256
UNREADABLE = (ValueError, RecursionError, OSError)
"""Of one sample: not what the index says, JSON of ten thousand brackets, a bad block of the disk."""


class BadSampleError(RunError):
    """One sample that cannot be used; the others can."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(shard, key, reason)
        self.shard, self.key, self.reason = shard, key, reason

    def __str__(self) -> str:
        return f"{self.shard}: sample {self.key}: {self.reason}"


@dataclass(frozen=True)
class RawSample:
    """A sample as it lies in its shard."""

    key: str
    image: bytes
    """The encoded picture (JPEG, PNG or WebP)."""
    record: dict[str, Any]
    """KEY.json: captions [{text, weight}], class, width, height, source, meta, ..."""
    shard: str
    """Path of the shard, for messages."""


@dataclass(frozen=True)
class _OpenShard:
    descriptor: int
    num_bytes: int
    records: NDArray[np.void]


class ShardDataset:
    """The samples of a folder of shards, numbered in the order of dataset.json.

    Holds two bytes a sample in memory (caption lengths). Shards are opened when they are first read, at most 256 at a
    time, anew in each process that the data set is sent to. Not for several threads at once.

    Raises:
        UsageError: the folder is no prepared data set; the message names the command that makes one.
        RunError: an index is missing or does not belong to its shard.
    """

    def __init__(self, folder: Path, *, remote: RemoteShards | None = None) -> None:
        self.folder = folder
        """Where the shards are read from: the cache, for data that lies elsewhere."""
        self.remote = remote
        self._start(_read_card(folder))

    def _start(self, card: dict[str, Any]) -> None:
        self.card = card
        self.fingerprint: str = card["fingerprint"]
        self._shards: list[str] = [shard["name"] for shard in card["shards"]]
        self._ends = list(accumulate(shard["n"] for shard in card["shards"]))
        self._num_tokens = self._read_num_tokens()
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    @classmethod
    def at_url(cls, url: str, cache: Cache) -> "ShardDataset":
        """Data that lies elsewhere; whole shards are fetched when they are read, or before that by `fetch`."""
        remote = RemoteShards(url, cache)
        return cls(remote.folder, remote=remote)

    @property
    def name(self) -> str:
        """The folder, or the URL, as the recipe names it."""
        return str(self.folder) if self.remote is None else self.remote.url

    @property
    def place(self) -> str:
        """The absolute folder, or the URL: the same name wherever a run goes on."""
        return str(self.folder.resolve()) if self.remote is None else self.remote.url

    def fetch(self, shards: Iterable[int] | None = None) -> None:
        """Have these shards (None: all) on this machine, where they lie elsewhere.

        Raises:
            RunError: the network failed, or they are not what dataset.json says.
        """
        if self.remote is not None:
            self.remote.fetch(self._shards if shards is None else [self._shards[number] for number in shards])

    @property
    def num_samples(self) -> int:
        """Number of samples in all shards."""
        return self._ends[-1] if self._ends else 0

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self._shards)

    def num_tokens(self, ids: ArrayLike) -> NDArray[np.int64]:
        """Tokens of the longest caption of each sample, BOS and EOS included, before any cut: (n,) -> (n,)."""
        return self._num_tokens[np.asarray(ids)].astype(np.int64)

    def read(self, id: int) -> RawSample:
        """The sample with this number, in one read of the disk.

        Raises:
            BadSampleError: what lies there is not the sample that the index describes.
        """
        number, row = self._place(id)
        shard = self._opened(number)
        record = shard.records[row]
        image_at, image_size = int(record["image_offset"]), int(record["image_size"])
        json_at, json_size = int(record["json_offset"]), int(record["json_size"])
        name, place = str(self._tar(number)), f"at byte {int(record['offset'])}"
        size = max(image_at + image_size, json_at + json_size)
        if int(record["offset"]) + size > shard.num_bytes:
            raise BadSampleError(name, place, "the index places it behind the shard's end")
        if record["format"] >= len(FORMATS):
            known = ", ".join(FORMATS)
            raise BadSampleError(name, place, f"the index names format {record['format']}, which is none of {known}")
        try:
            content = os.pread(shard.descriptor, size, int(record["offset"]))
            if len(content) != size:
                raise ValueError(f"the shard ends {size - len(content)} bytes too early")
            key = _checked_key(content, json_at, json_size, "json")
            image_key = _checked_key(content, image_at, image_size, FORMATS[record["format"]])
            fields = json.loads(content[json_at : json_at + json_size])
        except UNREADABLE as error:
            raise BadSampleError(name, place, str(error)) from error
        if image_key != key:
            raise BadSampleError(name, key, f"the picture that lies there belongs to {image_key}")
        if not isinstance(fields, dict):
            raise BadSampleError(name, key, f"{key}.json is not a mapping")
        return RawSample(key=key, image=content[image_at : image_at + image_size], record=fields, shard=name)

    def close(self) -> None:
        """Close the shards that are open; the next read opens them again."""
        while self._open:
            os.close(self._open.popitem()[1].descriptor)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()

    def _read_num_tokens(self) -> NDArray[np.uint16]:
        columns = []
        for number, shard in enumerate(self.card["shards"]):
            records = self._records(number)
            check_records(self._index(number))
            if len(records) != shard["n"]:
                raise RunError(
                    f"{self._index(number)}: {len(records)} samples where dataset.json says "
                    f"{shard['n']}; prepare the data again (mlip prepare-data)"
                )
            columns.append(np.array(records["num_tokens"]))
        return np.concatenate([np.zeros(0, np.uint16), *columns])

    def _tar(self, number: int) -> Path:
        return self.folder / self._shards[number]

    def _index(self, number: int) -> Path:
        return index_path(self._tar(number))

    def _records(self, number: int) -> NDArray[np.void]:
        return read_index(self._tar(number)) if self.remote is None else read_records(self._index(number))[1]

    def _place(self, id: int) -> tuple[int, int]:
        if not 0 <= id < self.num_samples:
            raise IndexError(f"sample {id} of {self.num_samples} in {self.folder}")
        number = bisect_right(self._ends, id)
        return number, int(id) - (self._ends[number - 1] if number else 0)

    def _opened(self, number: int) -> _OpenShard:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        if len(self._open) >= MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1].descriptor)
        self.fetch([number])
        records = self._records(number)
        descriptor = os.open(self._tar(number), os.O_RDONLY | os.O_CLOEXEC)
        self._open[number] = _OpenShard(descriptor, os.fstat(descriptor).st_size, records)
        return self._open[number]


def _read_card(folder: Path) -> dict[str, Any]:
    path = folder / "dataset.json"
    if not path.is_file():
        raise UsageError(_why_not_prepared(folder))
    return parse_card(path.read_bytes(), place=str(path), folder=str(folder))


def _why_not_prepared(folder: Path) -> str:
    source = "openmoji" if folder.parent.name == "openmoji" else "SOURCE"
    if not folder.exists():
        return f"{folder}: no such folder; make it with: mlip prepare-data {source} {folder.parent}"
    if not folder.is_dir():
        return f"{folder}: a file, not a folder of shards; prepare it: mlip prepare-data {folder} OUT"
    as_they_are = f"data.train: [{{path: {folder}, format: webdataset}}]"
    parts = sorted(child.parent for child in folder.glob("*/dataset.json"))
    if parts:
        return f"{folder}: no dataset.json here, but in {', '.join(map(str, parts))}; name one of these"
    what = "no dataset.json"
    if any(folder.glob("*.tar")):
        if not any(folder.glob("*.idx")):
            cure = f"prepare them: mlip prepare-data {folder} OUT, or read them as they are: {as_they_are}"
            return f"{folder}: tars without index; {cure}"
        what = "shards without dataset.json"
    return f"{folder}: {what}; prepare it: mlip prepare-data {folder} OUT"


def _checked_key(content: bytes, at: int, size: int, extension: str) -> str:
    """Key of the tar member whose bytes start at `at`; ValueError unless its header fits extension and size."""
    header = content[at - TAR_BLOCK : at] if at >= TAR_BLOCK else b""
    name, found_size = checked_header(header)
    key, dot, found = name.rpartition(".")
    if not dot or found != extension or found_size != size:
        raise ValueError(f"{name!r} of {found_size} bytes where the index says .{extension} of {size}")
    return key
