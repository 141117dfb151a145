"""A prepared data set: shards read sample by sample, in any order, through their indexes."""

import json
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlip_cli.config import Source
from mlip_cli.data.index import FORMATS, index_path, read_index
from mlip_cli.errors import RunError, UsageError

MAX_OPEN_SHARDS = 256
TAR_BLOCK = 512


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

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.card = _read_card(folder)
        self.fingerprint: str = self.card["fingerprint"]
        self._shards: list[str] = [shard["name"] for shard in self.card["shards"]]
        self._ends = list(accumulate(shard["n"] for shard in self.card["shards"]))
        self._num_tokens = self._read_num_tokens()
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

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
        name, place = str(self.folder / self._shards[number]), f"at byte {int(record['offset'])}"
        size = max(image_at + image_size, json_at + json_size)
        if int(record["offset"]) + size > shard.num_bytes:
            raise BadSampleError(name, place, "the index places it behind the shard's end")
        if record["format"] >= len(FORMATS):
            known = ", ".join(FORMATS)
            raise BadSampleError(name, place, f"the index names format {record['format']}, which is none of {known}")
        content = os.pread(shard.descriptor, size, int(record["offset"]))
        if len(content) != size:
            raise BadSampleError(name, place, f"the shard ends {size - len(content)} bytes too early")
        try:
            key = _checked_key(content, json_at, json_size, "json")
            image_key = _checked_key(content, image_at, image_size, FORMATS[record["format"]])
            fields = json.loads(content[json_at : json_at + json_size])
        except ValueError as error:
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
        for shard in self.card["shards"]:
            records = read_index(self.folder / shard["name"])
            if len(records) != shard["n"]:
                raise RunError(
                    f"{index_path(self.folder / shard['name'])}: {len(records)} samples where dataset.json says "
                    f"{shard['n']}; prepare the data again (mlip prepare-data)"
                )
            columns.append(np.array(records["num_tokens"]))
        return np.concatenate([np.zeros(0, np.uint16), *columns])

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
        path = self.folder / self._shards[number]
        records = read_index(path)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._open[number] = _OpenShard(descriptor, os.fstat(descriptor).st_size, records)
        return self._open[number]


def open_sources(sources: Sequence[Source]) -> list[ShardDataset]:
    """The data sets of `data.train` or `data.validation`, in order.

    Raises:
        UsageError: a folder is missing, not prepared or empty.
    """
    return [ShardDataset(Path(source.path)) for source in sources]


def _read_card(folder: Path) -> dict[str, Any]:
    path = folder / "dataset.json"
    if not path.is_file():
        raise UsageError(_why_not_prepared(folder))
    try:
        card = json.loads(path.read_bytes())
        shards = [(shard["name"], int(shard["n"])) for shard in card["shards"]]
        fingerprint = card["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not written by mlip prepare-data ({error!r}); prepare the data again") from error
    if not fingerprint or sum(n for _, n in shards) == 0:
        raise UsageError(f"{folder}: the data set holds no samples; prepare it again (mlip prepare-data)")
    return dict(card)


def _why_not_prepared(folder: Path) -> str:
    source = "openmoji" if folder.parent.name == "openmoji" else "SOURCE"
    if not folder.exists():
        return f"{folder}: no such folder; make it with: mlip prepare-data {source} {folder.parent}"
    if not folder.is_dir():
        return f"{folder}: a file, not a folder of shards; prepare it: mlip prepare-data {folder} OUT"
    parts = sorted(child.parent for child in folder.glob("*/dataset.json"))
    if parts:
        return f"{folder}: no dataset.json here, but in {', '.join(map(str, parts))}; name one of these"
    what = "no dataset.json"
    if any(folder.glob("*.tar")):
        what = "shards without dataset.json" if any(folder.glob("*.idx")) else "tars without index"
    return f"{folder}: {what}; prepare it: mlip prepare-data {folder} OUT"


def _checked_key(content: bytes, at: int, size: int, extension: str) -> str:
    """Key of the tar member whose bytes start at `at`; ValueError unless its header fits extension and size."""
    header = content[at - TAR_BLOCK : at] if at >= TAR_BLOCK else b""
    if len(header) != TAR_BLOCK or header[257:262] != b"ustar":
        raise ValueError("no tar header where the index says")
    name = header[:100].rstrip(b"\0").decode("ascii", "replace")
    checksum = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if checksum != _octal(header[148:156]):
        raise ValueError(f"damaged tar header of {name!r}")
    key, dot, found = name.rpartition(".")
    if not dot or found != extension or _octal(header[124:136]) != size:
        raise ValueError(f"{name!r} of {_octal(header[124:136])} bytes where the index says .{extension} of {size}")
    return key


def _octal(field: bytes) -> int:
    digits = field.strip(b" \0")
    return int(digits, 8) if digits else 0
