"""Paths in tables, as other programs and systems write them, and the one file that each can mean."""

import difflib
import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from mlip_cli.data.sources.file_names import FileNames, KeyIndex
from mlip_cli.data.sources.listing import is_picture

MOST_FOLDERS = 256
"""The most folders of which something is kept,"""
MOST_NAMES = 1_000_000
"""and the most names in their listings together, about 60 bytes each; a larger listing is the only one."""
MOST_COMPARED = 20_000
"""The most names among which the nearest is looked for."""
MOST_NEAREST = 100
"""The most searches for a nearest name: each takes a while."""

ANY_ENDING = ".*"
"""Behind the key of a picture's name without its ending."""
LEAST_NEAR = 0.85
"""A name is near another if at least this share of their characters is equal. 3.png is not near 4.png."""


@dataclass(frozen=True)
class FoundPath:
    """A picture's file. `path` is empty where there is none, and then `near` says what there is."""

    path: str
    near: str = ""
    is_guess: bool = False
    """Another spelling of the name led to it."""


def spellings(name: str) -> Iterator[str]:
    """The names that a cell can mean, from what it says to what is furthest from it."""
    yield name
    for pattern, replacement in ((r"^file://(localhost)?(?=/)", ""), (r"\\", "/")):
        name = re.sub(pattern, replacement, name)
        yield name
    name = unquote(name, errors="surrogateescape") if "%" in name else name
    yield name
    for pattern in (r"^(\./)*/+", r"#[0-9]+$"):  # /p0.jpg as a web server means it; 1000.jpg#0, the first caption
        name = re.sub(pattern, "", name)
        yield name


class _Listing:
    """The names in a folder, found by what all their spellings share."""

    def __init__(self, folder: str) -> None:
        self.names = FileNames(_names_in(folder))
        self._places = KeyIndex((key, place) for place, name in enumerate(self.names) for key in _keys(name))

    def named(self, key: str) -> list[str]:
        """The names with this key, sorted."""
        found = {self.names[place] for place in self._places.places_of(key)}
        return sorted(name for name in found if key in _keys(name))


@dataclass
class PathFinder:
    """Finds the files that the cells of a table name, under one folder."""

    folder: Path
    listings: dict[str, _Listing] = field(default_factory=dict)
    real_folders: dict[str, str] = field(default_factory=dict)
    num_names: int = 0
    """In the listings."""
    num_nearest: int = 0

    def find(self, name: str) -> FoundPath:
        """The file of this name, or the one file that it can mean in another spelling.

        Unicode normal forms, upper and lower case, and a missing ending are looked up in the folder's listing. What a
        guess leads to lies in `folder`.
        """
        path = os.path.join(self.folder, name)
        if "\0" not in name and os.path.lexists(path):
            return FoundPath(path)
        for spelling in dict.fromkeys(spellings(name)):
            if "\0" in spelling or ".." in spelling.split("/"):
                continue
            if spelling.startswith("/"):
                if name.startswith("file:") and os.path.isfile(spelling):
                    return FoundPath(spelling, is_guess=True)
                continue
            matches = self._matches(str(self.folder), [part for part in spelling.split("/") if part not in ("", ".")])
            if len(matches) == 1:
                return FoundPath(matches[0], is_guess=True)
            if matches:
                return FoundPath("", f"{' and '.join(map(os.path.basename, matches))} could be meant")
        return FoundPath("", self._nearest(name))

    def same(self, path: str) -> str:
        """One name for all paths to a file."""
        folder, name = os.path.split(path)
        if folder not in self.real_folders:
            if len(self.real_folders) == MOST_FOLDERS:
                self.real_folders.clear()
            self.real_folders[folder] = os.path.realpath(folder)
        real = os.path.join(self.real_folders[folder], name)
        return os.path.realpath(real) if os.path.islink(real) else real

    def _matches(self, folder: str, parts: list[str]) -> list[str]:
        """The files that a path of these parts can mean."""
        if not parts:
            return []
        first, rest = parts[0], parts[1:]
        listing = self._listing(folder)
        names = listing.named(_key(first))
        if first in names:
            names = [first]
        if not rest:
            names = names or listing.named(_key(first) + ANY_ENDING)
            return [path for name in names if os.path.isfile(path := os.path.join(folder, name))]
        return [match for name in names for match in self._matches(os.path.join(folder, name), rest)]

    def _listing(self, folder: str) -> _Listing:
        if folder not in self.listings:
            listing = _Listing(folder)
            self.num_names += len(listing.names)
            if len(self.listings) == MOST_FOLDERS or self.num_names > MOST_NAMES:
                self.listings.clear()
                self.num_names = len(listing.names)
            self.listings[folder] = listing
        return self.listings[folder]

    def _nearest(self, name: str) -> str:
        *folders, base = list(spellings(name))[-1].split("/")
        if self.num_nearest == MOST_NEAREST or ".." in folders or any("\0" in folder for folder in folders):
            return ""
        names = self._listing(os.path.join(self.folder, *folders)).names
        if len(names) > MOST_COMPARED:
            return ""
        self.num_nearest += 1
        pictures = {_key(name): name for name in sorted(names) if is_picture(name)}
        near = difflib.get_close_matches(_key(base), pictures, 1, LEAST_NEAR)
        return f"the nearest is {pictures[near[0]]}" if near else ""


def _names_in(folder: str) -> Iterator[str]:
    """The names in a folder; none if there is no such folder or it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            yield from (entry.name for entry in entries)
    except OSError:
        return


def _keys(name: str) -> Iterator[str]:
    """By what a name is found: its spelling, and that of a picture also without its ending."""
    yield _key(name)
    if is_picture(name):
        yield _key(name.rpartition(".")[0]) + ANY_ENDING


def _key(name: str) -> str:
    """What all spellings of a name share: case and Unicode normal form make no difference."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
