"""Which files of a folder count, for every command alike. Nothing here opens a file."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PICTURE_ENDINGS = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff")
"""Endings of file names, in lower case, by which pictures are found."""
UNREAD_PICTURE_ENDINGS = (
    "heic",
    "heif",
    "avif",
    "jxl",
    "jp2",
    "svg",
    "psd",
    "dng",
    "cr2",
    "nef",
    "arw",
    "dcm",
    "ppm",
    "tga",
)
"""Endings of pictures that are not read. They are named, so that nobody misses them later."""
LEFTOVERS = frozenset(
    ("__macosx", "thumbs.db", "desktop.ini", "lost+found", "system volume information", "$recycle.bin", "@eadir")
)
"""What systems leave in folders, in lower case."""


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name is passed over: hidden, or left there by a system."""
    return name.startswith(".") or name.lower() in LEFTOVERS


def walk(folder: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    """Regular files and broken links under `folder`, without hidden ones and leftovers, in no order.

    Links to folders are followed, unless they lead back to a folder above.
    """
    stat = folder.stat()
    here = stat.st_dev, stat.st_ino
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_leftover(entry.name):
                continue
            path = Path(entry.path)
            if entry.is_dir():
                yield from walk(path, (*above, here))
            elif entry.is_file() or not path.exists():  # reading a pipe or a device would wait for ever
                yield path


def number_order(names: list[str]) -> list[str]:
    """Sorted as numbers where all names are numbers, else as text."""
    return sorted(names, key=int) if all(re.fullmatch(r"[0-9]+", name) for name in names) else sorted(names)


@dataclass
class PassedOver:
    """What a command found and did not read, by kind, with the first of each kind."""

    counts: dict[str, int] = field(default_factory=dict)
    """Kind, such as `.heic files`, -> how many."""
    first: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, example: str) -> None:
        """Count one."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.first.setdefault(kind, example)

    def update(self, other: "PassedOver") -> None:
        """Count what another one counts."""
        for kind, n in other.counts.items():
            self.counts[kind] = self.counts.get(kind, 0) + n
        self.first = {**other.first, **self.first}

    def in_words(self) -> str:
        """`12 .heic files (first: a/1.heic), 3 texts without a picture (first: b.txt)`, the most frequent first."""
        kinds = sorted(self.counts, key=lambda kind: (-self.counts[kind], kind))
        return ", ".join(f"{self.counts[kind]:,} {kind} (first: {self.first[kind]})" for kind in kinds)
