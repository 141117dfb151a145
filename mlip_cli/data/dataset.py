"""A data set: samples in tars, read one by one, in any order, through the indexes of the tars.

The same reader serves shards that mlip prepared and tars as they are; `mlip_cli.data.open` opens both.
"""

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlip_cli.data.index import (
    check_is_named,
    check_size,
    has_checksums,
    place_of,
    read_checked,
    read_records,
)
from mlip_cli.data.open_shard import OpenShard, read_parts
from mlip_cli.data.remote import RemoteShards
from mlip_cli.data.sources.records import MAX_CAPTIONS, Caption, UnusableSampleError, usable_captions
from mlip_cli.data.sources.tar_samples import GUESSED, Columns
from mlip_cli.data.sources.tars import Stated, stated
from mlip_cli.errors import RunError
from mlip_cli.machine import allow_open_files
from mlip_cli.terminal.output import warn

MAX_OPEN_SHARDS = 256
"""Most shards of a data set that are open at a time, unless `keep_open` allows another number."""
FILES_OF_A_SHARD = 2
"""The tar and the map of its index."""
OTHER_FILES = 1024
"""Files that a process may need besides: libraries, pipes and shared memory of loader processes, checkpoints."""
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


class ShardDataset:
    """The samples of some tars, numbered in the order of the tars and of what lies in them.

    Holds two bytes a sample in memory (caption lengths). Tars are opened when they are first read, at most 256 at a
    time (see `keep_open`). A forked process shares those that are open; one that gets the data set pickled opens them
    anew. Not for several threads at once.

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
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._most_open = MAX_OPEN_SHARDS

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
            key, parts, is_whole = read_parts(shard, record, place)
        except (ValueError, OSError) as error:  # OSError: a bad block of the disk
            raise BadSampleError(tar, f"at byte {place.start}", str(error)) from error
        if not is_whole:
            raise BadSampleError(tar, key, WRONG_CHECKSUM)
        image = parts.pop("image")
        try:
            info = stated(parts, self._columns)
            captions = usable_captions(info.captions)[:MAX_CAPTIONS]
        except UnusableSampleError as error:
            raise BadSampleError(tar, key, str(error)) from error
        return RawSample(key, image, captions, info, tar)

    def read_ahead(self, ids: Iterable[int]) -> None:
        """Ask the system to fetch these samples from the disk side by side, and return at once.

        Without it each read waits for the one before: 2 to 5 ms a sample on a network disk. Only Linux can do it.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        for id in ids:
            number, row = self._place(id)
            shard = self._opened(number)
            place = place_of(shard.records[row], is_prepared=self._is_prepared)
            if place.end <= shard.num_bytes:  # else the index is damaged, which `read` says
                os.posix_fadvise(shard.descriptor, place.start, place.end - place.start, os.POSIX_FADV_WILLNEED)

    def keep_open(self, most: int) -> None:
        """Let up to `most` shards stay open, and open them all now if they are not more."""
        self._most_open = max(1, most)
        for number in range(self.num_shards if self.num_shards <= self._most_open else 0):
            self._opened(number)

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

    def _opened(self, number: int) -> OpenShard:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        while len(self._open) >= self._most_open:
            os.close(self._open.popitem(last=False)[1].descriptor)
        self.fetch([number])
        header, records = read_records(self.indexes[number])
        if self._is_prepared:
            check_size(self.tars[number], header)
        descriptor = os.open(self.tars[number], os.O_RDONLY | os.O_CLOEXEC)
        size, at_first_dot = os.fstat(descriptor).st_size, self.card["shards"][number].get("at_first_dot", False)
        own_checksums = self._is_prepared and has_checksums(header)
        self._open[number] = OpenShard(descriptor, size, records, own_checksums, at_first_dot)
        return self._open[number]


def keep_open(datasets: Sequence[ShardDataset]) -> None:
    """Keep all shards open, as far as this process may open files; of more, each data set keeps an equal number.

    Processes that are forked afterwards share them and need to open nothing.

    Raises:
        RunError: a shard is missing, or not as long as its index says.
    """
    num_shards = sum(dataset.num_shards for dataset in datasets)
    allowed = allow_open_files(FILES_OF_A_SHARD * num_shards + OTHER_FILES)
    fitting = shards_that_fit(allowed)
    for dataset in datasets:
        dataset.keep_open(dataset.num_shards if num_shards <= fitting else fitting // len(datasets))


def shards_that_fit(num_files: int) -> int:
    """How many shards a process keeps open that may open so many files."""
    return max(num_files - OTHER_FILES, num_files // 2) // FILES_OF_A_SHARD
