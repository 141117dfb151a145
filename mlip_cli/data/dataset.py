"""A data set: samples in tars, read one by one, in any order, through the indexes of the tars.

The same reader serves shards that mlip prepared and tars as they are; `mlip_cli.data.open` opens both.
"""

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlip_cli.data.index import FORMAT_ENDINGS, FORMATS, Place, check_size, place_of, read_checked, read_records
from mlip_cli.data.remote import RemoteShards
from mlip_cli.data.sources.records import Caption, UnusableSampleError, usable_captions
from mlip_cli.data.sources.tars import TEXT_ENDINGS, Stated, ending_of, key_of, stated
from mlip_cli.data.tar import BLOCK, Member, Read, member_at, walk
from mlip_cli.errors import RunError
from mlip_cli.paths import escaped

MAX_OPEN_SHARDS = 256
MAX_GAP_BYTES = 1 << 18
"""A sample is read in one go, unless more bytes than these lie between its parts."""


class BadSampleError(RunError):
    """One sample that cannot be used; the others can."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(shard, key, reason)
        self.shard, self.key, self.reason = shard, key, reason

    def __str__(self) -> str:
        return f"{self.shard}: sample {self.key}: {self.reason}"


class RawSample(NamedTuple):
    """A sample as it lies in its tar."""

    key: str
    image: bytes
    """The encoded picture (JPEG, PNG or WebP)."""
    captions: tuple[Caption, ...]
    """One at least; none is empty, and all weights are positive."""
    info: Stated
    """The class of the picture, and texts and numbers besides, such as `concept`."""
    shard: str
    """Path of the tar, for messages."""


@dataclass(frozen=True)
class _OpenShard:
    descriptor: int
    num_bytes: int
    records: NDArray[np.void]


class ShardDataset:
    """The samples of some tars, numbered in the order of the tars and of what lies in them.

    Holds two bytes a sample in memory (caption lengths). Tars are opened when they are first read, at most 256 at a
    time, anew in each process that the data set is sent to. Not for several threads at once.

    Args:
        indexes: the index of each tar.
        card: what dataset.json says, or the like for tars as they are.
        name: the folder, pattern or URL, as the recipe names it.
        is_prepared: mlip wrote the tars. Each must then be as long as its index says, and KEY.txt is not read, since
            KEY.json repeats it.
        remote: where the tars come from, if they lie elsewhere.

    Raises:
        RunError: an index is missing or damaged, or does not belong to its tar.
    """

    def __init__(
        self,
        tars: Sequence[Path],
        indexes: Sequence[Path],
        card: dict[str, Any],
        *,
        name: str,
        is_prepared: bool,
        remote: RemoteShards | None = None,
    ) -> None:
        self.tars, self.indexes, self.card = tars, indexes, card
        self.name, self.remote = name, remote
        self.fingerprint: str = card["fingerprint"]
        self._is_prepared = is_prepared
        self._ends = list(accumulate(shard["n"] for shard in card["shards"]))
        self._num_tokens = self._read_num_tokens()
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    @property
    def place(self) -> str:
        """The absolute folder, or the URL: the same name wherever a run is resumed."""
        return str(Path(self.name).resolve()) if self.remote is None else self.name

    def fetch(self, shards: Iterable[int] | None = None) -> None:
        """Fetch these shards to this machine if they lie at a URL. None means all.

        Raises:
            RunError: the network failed, or they are not what dataset.json says.
        """
        if self.remote is not None:
            numbers = range(self.num_shards) if shards is None else shards
            self.remote.fetch([self.tars[number].name for number in numbers])

    @property
    def num_samples(self) -> int:
        """Number of samples in all shards."""
        return self._ends[-1] if self._ends else 0

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self.tars)

    def num_tokens(self, ids: ArrayLike) -> NDArray[np.int64]:
        """Tokens of the longest caption of each sample, BOS and EOS included, before any cut: (n,) -> (n,)."""
        return self._num_tokens[np.asarray(ids)].astype(np.int64)

    def read(self, id: int) -> RawSample:
        """The sample with this number, in one read of the disk.

        Raises:
            BadSampleError: what lies there is not the sample that the index describes, or cannot be used.
        """
        number, row = self._place(id)
        shard = self._opened(number)
        place, tar = place_of(shard.records[row], without_txt=self._is_prepared), str(self.tars[number])
        try:
            key, parts = _read_parts(shard, place, one_header=self._is_prepared)
        except (ValueError, OSError) as error:  # OSError: a bad block of the disk
            raise BadSampleError(tar, f"at byte {place.start}", str(error)) from error
        image = parts.pop("image")
        try:
            info = stated(parts)
            captions = usable_captions(info.captions)
        except UnusableSampleError as error:
            raise BadSampleError(tar, key, str(error)) from error
        return RawSample(key, image, captions, info, tar)

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
        for tar, index, shard in zip(self.tars, self.indexes, self.card["shards"], strict=True):
            header, records = read_checked(index)
            if self._is_prepared and self.remote is None:
                check_size(tar, header)
            if len(records) != shard["n"]:
                raise RunError(
                    f"{index}: {len(records)} samples where dataset.json says {shard['n']}; prepare the data again "
                    "(mlip prepare-data)"
                )
            columns.append(np.array(records["num_tokens"]))
        return np.concatenate([np.zeros(0, np.uint16), *columns])

    def _place(self, id: int) -> tuple[int, int]:
        if not 0 <= id < self.num_samples:
            raise IndexError(f"sample {id} of {self.num_samples} in {self.name}")
        number = bisect_right(self._ends, id)
        return number, int(id) - (self._ends[number - 1] if number else 0)

    def _opened(self, number: int) -> _OpenShard:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        if len(self._open) >= MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1].descriptor)
        self.fetch([number])
        header, records = read_records(self.indexes[number])
        if self._is_prepared:
            check_size(self.tars[number], header)
        descriptor = os.open(self.tars[number], os.O_RDONLY | os.O_CLOEXEC)
        self._open[number] = _OpenShard(descriptor, os.fstat(descriptor).st_size, records)
        return self._open[number]


def _read_parts(shard: _OpenShard, place: Place, *, one_header: bool) -> tuple[str, dict[str, bytes]]:
    """Key of a sample and the bytes of its parts, each checked against its header in the tar.

    Args:
        one_header: no PAX or long-name headers precede the headers, so other members need not be looked at.

    Raises:
        ValueError: what lies there is not what the index says.
        OSError: the disk cannot be read.
    """
    start, parts = place.start, place.parts
    end = max((at + size for at, size in parts.values()), default=0)
    if end > shard.num_bytes:
        raise ValueError("the index places it behind the end of the shard")
    if "image" not in parts:
        raise ValueError("the index places no picture")
    if place.format >= len(FORMATS):
        raise ValueError(f"the index names picture format {place.format}; formats are 0 to {len(FORMATS) - 1}")
    read: Read = partial(_read_whole, shard.descriptor)
    if end - start <= MAX_GAP_BYTES + sum(size for _, size in parts.values()):
        read = partial(_part_of, read(end - start, start), start)
    found: dict[int, Member] = {}
    if one_header:
        found = {at: member_at(read, at - BLOCK) for at, _ in parts.values()}
    else:
        for member in walk(read, length=shard.num_bytes, start=start):
            found[member.offset] = member
            if member.offset + member.size >= end:
                break
    keys, contents = set(), {}
    for part, (at, size) in parts.items():
        endings = FORMAT_ENDINGS[place.format] if part == "image" else TEXT_ENDINGS[part]
        keys.add(_checked_key(found.get(at), size, endings))
        contents[part] = read(size, at)
    if len(keys) != 1:
        raise ValueError(f"its parts belong to {' and '.join(sorted(map(escaped, keys)))}")
    return escaped(keys.pop()), contents


def _read_whole(descriptor: int, size: int, at: int) -> bytes:
    content = os.pread(descriptor, size, at)
    if len(content) != size:
        raise ValueError(f"the shard ends {size - len(content)} bytes too early")
    return content


def _part_of(content: bytes, start: int, size: int, at: int) -> bytes:
    return content[at - start : at - start + size]


def _checked_key(member: Member | None, size: int, endings: Sequence[str]) -> str:
    """Key of the member at the place of a part; ValueError where it is not what the index says."""
    if member is None:
        raise ValueError(f"no member begins where the index places .{endings[0]}")
    if member.size != size or not member.is_file or ending_of(member.name) not in endings:
        raise ValueError(f"{member.name!r} of {member.size} bytes where the index says .{endings[0]} of {size}")
    return key_of(member.name)
