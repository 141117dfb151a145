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

from mlip_cli.data.index import (
    FORMATS,
    Place,
    check_is_named,
    check_size,
    checksum,
    has_checksums,
    place_of,
    read_checked,
    read_records,
)
from mlip_cli.data.remote import RemoteShards
from mlip_cli.data.sources.records import Caption, UnusableSampleError, usable_captions
from mlip_cli.data.sources.tar_samples import FIELDS_OF, GUESSED, Columns, ending_of, key_and_field
from mlip_cli.data.sources.tars import Stated, stated
from mlip_cli.data.tar import BLOCK, Member, Read, walk
from mlip_cli.errors import RunError
from mlip_cli.paths import escaped
from mlip_cli.terminal.output import warn

MAX_OPEN_SHARDS = 256
MAX_GAP_BYTES = 1 << 18
"""A sample of a tar that mlip did not write is read in one go, unless more bytes than these lie between its parts."""
HEADER_BYTES = 8 * BLOCK
"""Room for the PAX or long-name headers of the last part in that one go; where they are longer, it is read again."""
WRONG_CHECKSUM = "its bytes are not those that mlip prepare-data wrote: its checksum is wrong"


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
    """The encoded picture."""
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
    has_checksums: bool
    at_first_dot: bool
    """Where the keys of its samples end."""


class ShardDataset:
    """The samples of some tars, numbered in the order of the tars and of what lies in them.

    Holds two bytes a sample in memory (caption lengths). Tars are opened when they are first read, at most 256 at a
    time, anew in each process that the data set is sent to. Not for several threads at once.

    Args:
        indexes: the index of each tar.
        card: what dataset.json says, or the like for tars as they are.
        name: the folder, pattern or URL, as the recipe names it.
        columns: which fields are picture and captions; None: mlip wrote the tars. Each must then be as long as its
            index says, its samples have checksums, and KEY.txt is not read, since KEY.json repeats it.
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
        columns: Columns | None,
        remote: RemoteShards | None = None,
    ) -> None:
        self.tars, self.indexes, self.card = tars, indexes, card
        self.name, self.remote = name, remote
        self.fingerprint: str = card["fingerprint"]
        self._is_prepared, self._columns = columns is None, columns or GUESSED
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
        record, tar = shard.records[row], str(self.tars[number])
        place = place_of(record, is_prepared=self._is_prepared)
        try:
            key, parts, is_whole = _read_parts(shard, record, place)
        except (ValueError, OSError) as error:  # OSError: a bad block of the disk
            raise BadSampleError(tar, f"at byte {place.start}", str(error)) from error
        if not is_whole:
            raise BadSampleError(tar, key, WRONG_CHECKSUM)
        image = parts.pop("image")
        try:
            info = stated(parts, self._columns)
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
        columns, without_checksums = [], 0
        for tar, index, shard in zip(self.tars, self.indexes, self.card["shards"], strict=True):
            header, records = read_checked(index)
            if self._is_prepared:
                check_is_named(index, header, shard)
                without_checksums += not has_checksums(header)
                if self.remote is None:
                    check_size(tar, header)
            columns.append(np.array(records["num_tokens"]))
        if without_checksums:
            warn(
                f"{self.name}: this data set was prepared before samples had checksums, so a damaged sample may be "
                "trained on; prepare it again"
            )
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
        size, at_first_dot = os.fstat(descriptor).st_size, self.card["shards"][number].get("at_first_dot", False)
        own_checksums = self._is_prepared and has_checksums(header)
        self._open[number] = _OpenShard(descriptor, size, records, own_checksums, at_first_dot)
        return self._open[number]


def _read_parts(shard: _OpenShard, record: np.void, place: Place) -> tuple[str, dict[str, bytes], bool]:
    """Key of a sample, the bytes of its parts, and whether its checksum is right, if it has one.

    Raises:
        ValueError: what lies there is not what the index says.
        OSError: the disk cannot be read.
    """
    if place.end > shard.num_bytes:
        raise ValueError("the index places it behind the end of the shard")
    if "image" not in place.parts:
        raise ValueError("the index places no picture")
    if place.format >= len(FORMATS):
        raise ValueError(f"the index names picture format {place.format}; formats are 0 to {len(FORMATS) - 1}")
    if not shard.has_checksums:
        return *_parts_by_headers(shard, place), True
    content = _read_whole(shard.descriptor, place.end - place.start, place.start)
    if checksum(record, content) != place.crc32:
        return *_parts_by_headers(shard, place), False
    parts = {}
    for part, (header, size) in place.parts.items():
        at = header + BLOCK - place.start
        parts[part] = content[at : at + size]
    at = place.parts["image"][0] - place.start
    name = content[at : at + 100].partition(b"\0")[0].decode()
    return name.rpartition(".")[0], parts, True


def _parts_by_headers(shard: _OpenShard, place: Place) -> tuple[str, dict[str, bytes]]:
    """Key of a sample and the bytes of its parts, each checked against its header in the tar.

    Raises:
        ValueError: what lies there is not what the index says.
        OSError: the disk cannot be read.
    """
    read: Read = partial(_read_whole, shard.descriptor)
    if place.end - place.start <= MAX_GAP_BYTES + sum(size for _, size in place.parts.values()):
        read = _Window(shard.descriptor, place.start, place.end + HEADER_BYTES - place.start)
    keys, contents = set(), {}
    for part, (header, size) in place.parts.items():
        member = next(walk(read, length=shard.num_bytes, start=header), None)
        keys.add(_checked_key(member, part, size, at_first_dot=shard.at_first_dot))
        contents[part] = read(size, member.offset) if member else b""
    if len(keys) != 1:
        raise ValueError(f"its parts belong to {' and '.join(sorted(map(escaped, keys)))}")
    return escaped(keys.pop()), contents


def _read_whole(descriptor: int, size: int, at: int) -> bytes:
    content = os.pread(descriptor, size, at)
    if len(content) != size:
        raise ValueError(f"the shard ends {size - len(content)} bytes too early")
    return content


class _Window:
    """Some bytes of a tar, read at once; what lies outside is read when it is asked for."""

    def __init__(self, descriptor: int, start: int, size: int) -> None:
        self.descriptor, self.start = descriptor, start
        self.content = os.pread(descriptor, size, start)

    def __call__(self, size: int, at: int) -> bytes:
        found = self.content[at - self.start : at - self.start + size]
        return found if len(found) == size else _read_whole(self.descriptor, size, at)


def _checked_key(member: Member | None, part: str, size: int, *, at_first_dot: bool) -> str:
    """Key of the member at the place of a part; ValueError where it is not what the index says."""
    endings = FIELDS_OF[part]
    if member is None:
        raise ValueError(f"no member begins where the index places .{endings[0]}")
    key, field = key_and_field(member.name, at_first_dot=at_first_dot)
    if member.size != size or not member.is_file or ending_of(field) not in endings:
        name = escaped(member.name)
        raise ValueError(f"{name!r} of {member.size} bytes where the index says .{endings[0]} of {size}")
    return key
