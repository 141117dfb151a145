"""The pictures that a search looks through: in shards of mlip, or as folders, tables and tars hold them."""

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mlip_cli.data.dataset import BadSampleError, ShardDataset
from mlip_cli.data.open import open_prepared
from mlip_cli.data.pictures import RejectedPictureError
from mlip_cli.data.prepare.parts import read_picture
from mlip_cli.data.prepare.summary import attributions
from mlip_cli.data.sources.find import find_pictures
from mlip_cli.data.sources.listing import PassedOver
from mlip_cli.data.sources.records import PictureAddress, PictureBytes, PicturePlace, Record
from mlip_cli.errors import UsageError
from mlip_cli.files import GIB

MOST_BYTES_IN_TABLES = 2 * GIB
"""Pictures inside tables stay in memory while they are searched."""


@dataclass(frozen=True)
class FoundPicture:
    """One of the pictures, as it was read."""

    name: str
    """File, row of a table, or key in shards."""
    content: bytes
    """The encoded picture."""
    caption: str | None
    """The first one."""
    original_sha256: str | None = None
    """Of the file that `prepare-data` stored it from."""


class SearchPictures(Protocol):
    """The pictures of a collection, by number."""

    place: str
    """Where they lie, absolute."""
    passed_over: PassedOver
    """Rows without a picture; pictures that cannot be decoded are added to it."""

    @property
    def keys(self) -> NDArray[np.uint64]:
        """(N,): a number that changes with a picture. By 64 bits, two of a million share one with a chance of 3e-8."""

    def read(self, number: int) -> FoundPicture:
        """One picture. Not for several threads at once.

        Raises:
            RejectedPictureError: it cannot be read.
        """

    def name(self, number: int) -> str:
        """Its name, without reading it where that is possible."""

    def data_of(self, number: int) -> str | None:
        """Fingerprint of the prepared data set that holds the picture; None where it is not prepared."""

    @property
    def attribution(self) -> tuple[str, ...]:
        """The attributions that the licences of the pictures ask for."""


def open_pictures(images: str) -> SearchPictures:
    """The pictures at a path: shards of mlip or a folder with parts of them, a folder of pictures, a table, tars.

    Raises:
        UsageError: nothing there, no pictures, or pictures that must be unpacked first.
        RunError: shards are damaged.
    """
    folder = Path(images)
    parts = [folder] if (folder / "dataset.json").is_file() else sorted(p.parent for p in folder.glob("*/dataset.json"))
    if parts:
        return PreparedPictures(str(folder.resolve()), [open_prepared(part) for part in parts])
    source, records = find_pictures(images)
    return _listed(images, records, root=source.root)


class PreparedPictures:
    """The samples of data sets that `prepare-data` wrote."""

    def __init__(self, place: str, datasets: Sequence[ShardDataset]) -> None:
        self.place, self.datasets = place, datasets
        self.passed_over = PassedOver()
        self._ends = list(accumulate(dataset.num_samples for dataset in datasets))

    @cached_property
    def keys(self) -> NDArray[np.uint64]:
        """A picture is another one once its shard or its place in it has changed."""
        return np.concatenate([_keys_of_shards(dataset) for dataset in self.datasets])

    @cached_property
    def attribution(self) -> tuple[str, ...]:
        """As the cards say."""
        return attributions(dataset.card for dataset in self.datasets)

    def read(self, number: int) -> FoundPicture:
        """One sample."""
        dataset, id = self._place(number)
        try:
            sample = dataset.read(id)
        except BadSampleError as error:
            raise RejectedPictureError("damaged sample", error.reason) from None
        name = sample.key if len(self.datasets) == 1 else f"{Path(dataset.name).name}/{sample.key}"
        sha256 = sample.info.fields.get("sha256")
        return FoundPicture(name, sample.image, sample.captions[0].text, sha256 if isinstance(sha256, str) else None)

    def name(self, number: int) -> str:
        """The data set and the number in it: the key would have to be read."""
        dataset, id = self._place(number)
        return f"{Path(dataset.name).name}: sample {id}"

    def data_of(self, number: int) -> str | None:
        """Fingerprint of its data set."""
        return self._place(number)[0].fingerprint

    def _place(self, number: int) -> tuple[ShardDataset, int]:
        part = bisect_right(self._ends, number)
        return self.datasets[part], number - (self._ends[part - 1] if part else 0)


def _keys_of_shards(dataset: ShardDataset) -> NDArray[np.uint64]:
    keys = []
    for shard in dataset.card["shards"]:
        identity = shard.get("sha256") or f"{dataset.fingerprint} {shard['name']}"
        keys.append(np.arange(shard["n"], dtype=np.uint64) + np.uint64(_key(identity)))
    return np.concatenate([np.zeros(0, np.uint64), *keys])


@dataclass
class ListedPictures:
    """Pictures that lie one by one: as files, in tars, in tables."""

    place: str
    names: Sequence[str]
    pictures: Sequence[PicturePlace | PictureBytes]
    captions: Sequence[str | None]
    passed_over: PassedOver = field(default_factory=PassedOver)

    @property
    def attribution(self) -> tuple[str, ...]:
        """Nobody says what their licences ask for."""
        return ()

    @cached_property
    def keys(self) -> NDArray[np.uint64]:
        """A file is another picture once its path, its size or its time has changed."""
        status = cache(_status)
        return np.array([_key(_identity(picture, status)) for picture in self.pictures], np.uint64)

    def read(self, number: int) -> FoundPicture:
        """One picture."""
        return FoundPicture(self.names[number], read_picture(self.pictures[number]), self.captions[number])

    def name(self, number: int) -> str:
        """Its name."""
        return self.names[number]

    def data_of(self, number: int) -> str | None:
        """Nobody prepared it."""
        return None


def _listed(images: str, records: Iterable[Record], *, root: Path) -> ListedPictures:
    """The pictures of records, each once, with its first caption."""
    passed_over = PassedOver()
    found: dict[PicturePlace | PictureBytes, tuple[str, str | None]] = {}
    num_bytes = 0
    for record in records:
        picture = record.picture
        if picture is None:
            row = f"{record.file}: row {record.row}"
            passed_over.add(record.reject or "no picture", f"{row}: {record.detail}" if record.detail else row)
            continue
        if isinstance(picture, PictureAddress):
            passed_over.add("pictures at an address (mlip prepare-data downloads them)", picture.url)
            continue
        if isinstance(picture, PicturePlace) and picture.is_compressed:
            raise UsageError(
                f"--images {images}: compressed tars; decompress them, or name what prepare-data makes of them"
            )
        first = found.get(picture)
        caption = next((own.text.strip() for own in record.captions if own.text.strip()), None)
        if first is None and isinstance(picture, PictureBytes):
            num_bytes += len(picture.content)
            if num_bytes > MOST_BYTES_IN_TABLES:
                gib = MOST_BYTES_IN_TABLES // GIB
                cure = "prepare it with mlip prepare-data, and name the folder that this writes"
                raise UsageError(f"--images {images}: over {gib} GiB of pictures inside a table; {cure}")
        found[picture] = first if first is not None and first[1] else (_name(record, root), caption)
    if not found:
        why = f": {passed_over.in_words()}" if passed_over.counts else ""
        raise UsageError(f"--images {images}: no pictures{why}")
    names, captions = zip(*found.values(), strict=True)
    return ListedPictures(str(Path(images).resolve()), names, list(found), captions, passed_over)


def _name(record: Record, root: Path) -> str:
    """A file by its path in the source, others by their row."""
    picture = record.picture
    if isinstance(picture, PicturePlace) and picture.size is None:
        path = Path(picture.path)
        return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
    return record.detail or f"{record.file}: row {record.row}"


def _identity(picture: PicturePlace | PictureBytes, status: "Status") -> bytes | str:
    if isinstance(picture, PictureBytes):
        return picture.content
    return f"{status(picture.path)} {picture.offset} {picture.size}"


class Status(Protocol):
    """What is known of a file without reading it."""

    def __call__(self, path: str) -> str: ...


def _status(path: str) -> str:
    try:
        found = os.stat(path)
    except OSError:  # a broken link: it is named when it is read
        return f"{os.path.abspath(path)} missing"
    return f"{os.path.abspath(path)} {found.st_size} {found.st_mtime_ns}"


def _key(identity: bytes | str) -> int:
    content = identity.encode("utf-8", "surrogateescape") if isinstance(identity, str) else identity
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def read_all(pictures: SearchPictures, numbers: Iterable[int]) -> Iterator[tuple[int, FoundPicture]]:
    """Pictures in order; what cannot be read is counted in `passed_over` and left out."""
    for number in numbers:
        try:
            yield number, pictures.read(number)
        except RejectedPictureError as error:
            pictures.passed_over.add(error.reason, f"{pictures.name(number)}: {error.detail}")
