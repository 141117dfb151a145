"""Names of millions of files: they lie in one piece of memory, without an object for each."""

import os
from array import array
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

from mlip_cli.data.sources.listing import is_leftover

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHUNK = 1024
"""Names that are decoded together."""
ENCODING = "utf-8", "surrogatepass"
"""Names that are not UTF-8 hold lone surrogates. The order of these bytes is that of the texts."""


class FileNames(Sequence[str]):
    """Names of files, in their bytes and nine more each."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        content, starts = bytearray(), array("Q", [0])
        for name in names:
            content += name.encode(*ENCODING)
            content += b"\0"  # no name holds it
            starts.append(len(content))
        self._content, self._starts = content, starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        if not 0 <= place < len(self):
            raise IndexError(place)
        return self._bytes(place).decode(*ENCODING)

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), CHUNK):
            end = self._starts[min(first + CHUNK, len(self))]
            yield from self._content[self._starts[first] : end - 1].decode(*ENCODING).split("\0")

    def __contains__(self, name: object) -> bool:
        """Whether a name is there. The names are sorted."""
        if not isinstance(name, str):
            return False
        wanted = name.encode(*ENCODING)
        place = bisect_left(range(len(self)), wanted, key=self._bytes)
        return place < len(self) and self._bytes(place) == wanted

    def _bytes(self, place: int) -> bytes:
        return bytes(self._content[self._starts[place] : self._starts[place + 1] - 1])

    def beside(self, place: int, start: str) -> dict[str, int]:
        """The names that begin with `start`, as the one at `place` does, and their places. The names are sorted."""
        wanted, first, end = start.encode(*ENCODING), place, place + 1
        while first and self._content.startswith(wanted, self._starts[first - 1], self._starts[first]):
            first -= 1
        while end < len(self) and self._content.startswith(wanted, self._starts[end], self._starts[end + 1]):
            end += 1
        return {self[number]: number for number in range(first, end)}

    def where(self, is_wanted: Callable[[str], bool]) -> "ChosenNames":
        """Those of the names that are wanted."""
        return ChosenNames(self, array("I", (place for place, name in enumerate(self) if is_wanted(name))))


class ChosenNames(Sequence[str]):
    """Some of the names of files, in four bytes each."""

    def __init__(self, names: FileNames, places: "array[int]") -> None:
        self.names, self.places = names, places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self.names[number] for number in self.places[place]]
        return self.names[self.places[place]]


@dataclass(frozen=True)
class FileList:
    """Files with their sizes and times: 25 bytes each beside the names."""

    names: FileNames
    sizes: "array[int]"
    mtimes_ns: "array[int]"

    def below(self, folder: str) -> "FileList":
        """The same, relative to the folder that holds them all."""
        return FileList(FileNames(name[len(folder) + 1 :] for name in self.names), self.sizes, self.mtimes_ns)


def size_and_time(path: str | os.PathLike[str]) -> list[int]:
    """Size and time of change of a file: zeros where there is none, as for a broken link."""
    try:
        stat = os.stat(path)
    except OSError:
        return [0, 0]
    return [stat.st_size, stat.st_mtime_ns]


def listed(root: str | os.PathLike[str], names: Iterable[str]) -> FileList:
    """Files by their names relative to `root`. A broken link has neither size nor time: its row becomes a reject."""
    sizes, mtimes_ns = array("q"), array("q")

    def noted() -> Iterator[str]:
        for name in names:
            size, mtime_ns = size_and_time(os.path.join(root, name))
            sizes.append(size)
            mtimes_ns.append(mtime_ns)
            yield name

    return FileList(FileNames(noted()), sizes, mtimes_ns)


def names_below(
    root: str | os.PathLike[str], folder: str = "", above: tuple[tuple[int, int], ...] = ()
) -> Iterator[str]:
    """Regular files and broken links under `root`, without hidden ones and leftovers: their names, sorted.

    Links to folders are followed, unless they lead back to a folder above. Memory holds the names in one folder.

    Args:
        folder: where to begin, relative to `root`: empty, or a name that ends with a slash.
        above: device and inode of each folder above.
    """
    path = os.path.join(root, folder)
    stat = os.stat(path)
    here = stat.st_dev, stat.st_ino
    if here in above:
        return
    with os.scandir(path) as entries:
        names = [name for entry in entries if not is_leftover(entry.name) and (name := _listed_as(entry))]
    names.sort(reverse=True)  # with the slash of folders: x.jpg lies before x/y.jpg, and x0.jpg behind
    while names:
        name = folder + names.pop()
        if name.endswith("/"):
            yield from names_below(root, name, (*above, here))
        else:
            yield name


def _listed_as(entry: os.DirEntry[str]) -> str:
    """The name of a file; that of a folder with a slash; nothing for pipes and devices, which are not read."""
    try:
        if entry.is_dir():
            return entry.name + "/"
        is_file = entry.is_file()
    except OSError:  # a link that leads to itself: broken like any other
        return entry.name
    return entry.name if is_file or not os.path.exists(entry.path) else ""


class KeyIndex:
    """Places by a key that need not be theirs alone: 12 bytes each."""

    def __init__(self, items: Iterable[tuple[Hashable, int]]) -> None:
        import numpy as np  # here, because it takes long to import

        hashes, places = array("q"), array("I")
        for key, place in items:
            hashes.append(hash(key))
            places.append(place)
        order = np.argsort(np.frombuffer(hashes, np.int64), kind="stable")
        self._hashes: NDArray[np.int64] = np.frombuffer(hashes, np.int64)[order]
        self._places: NDArray[np.uint32] = np.frombuffer(places, np.uint32)[order]

    def places_of(self, key: Hashable) -> list[int]:
        """The places of a key in the order in which they were given, and very rarely one of another key."""
        wanted = hash(key)
        place, found = int(self._hashes.searchsorted(wanted)), []
        while place < len(self._hashes) and self._hashes[place] == wanted:
            found.append(int(self._places[place]))
            place += 1
        return found
