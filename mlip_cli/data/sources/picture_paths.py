"""Paths in tables, as other programs and systems write them, and the one file that each can mean."""

import difflib
import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from mlip_cli.data.sources.listing import is_picture

MOST_FOLDERS = 256
"""The most folders of which something is kept,"""
MOST_NAMES = 200_000
"""and the most names in their listings together; a larger listing is the only one."""
MOST_COMPARED = 20_000
"""The most names among which the nearest is looked for."""
MOST_NEAREST = 100
"""The most searches for a nearest name: each takes a while."""

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


@dataclass
class PathFinder:
    """Finds the files that the cells of a table name, under one folder."""

    folder: Path
    listings: dict[str, dict[str, list[str]]] = field(default_factory=dict)
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
        names = listing.get(_key(first), [])
        if first in names:
            names = [first]
        if not rest:
            names = names or listing.get(_key(first) + ".*", [])
            return [path for name in names if os.path.isfile(path := os.path.join(folder, name))]
        return [match for name in names for match in self._matches(os.path.join(folder, name), rest)]

    def _listing(self, folder: str) -> dict[str, list[str]]:
        """The names in a folder by what all their spellings share; pictures also without their ending."""
        if folder not in self.listings:
            listing: dict[str, list[str]] = {}
            try:
                names = sorted(os.listdir(folder))
            except OSError:  # no folder, or one that cannot be listed: nothing is found there
                names = []
            self.num_names += len(names)
            if len(self.listings) == MOST_FOLDERS or self.num_names > MOST_NAMES:
                self.listings.clear()
                self.num_names = len(names)
            for name in names:
                listing.setdefault(_key(name), []).append(name)
                if is_picture(name):
                    listing.setdefault(_key(name.rpartition(".")[0]) + ".*", []).append(name)
            self.listings[folder] = listing
        return self.listings[folder]

    def _nearest(self, name: str) -> str:
        *folders, base = list(spellings(name))[-1].split("/")
        if ".." in folders or any("\0" in folder for folder in folders):
            return ""
        listing = self._listing(os.path.join(self.folder, *folders))
        pictures = [key for key in listing if is_picture(key)]
        if self.num_nearest == MOST_NEAREST or len(pictures) > MOST_COMPARED:
            return ""
        self.num_nearest += 1
        near = difflib.get_close_matches(_key(base), pictures, 1, LEAST_NEAR)
        return f"the nearest is {listing[near[0]][0]}" if near else ""


def _key(name: str) -> str:
    """What all spellings of a name share: case and Unicode normal form make no difference."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
