"""Which files of a folder count, for every command alike. Nothing here opens a file."""

import re
from collections.abc import Collection
from dataclasses import dataclass, field

from mlip_cli.paths import escaped

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
TABLE_ENDINGS = ("csv", "tsv", "jsonl", "ndjson", "parquet", "arrow", "json", "txt")
"""Endings of files that may be tables, in lower case; .gz may follow."""
LEFTOVERS = frozenset(
    ("__macosx", "thumbs.db", "desktop.ini", "lost+found", "system volume information", "$recycle.bin", "@eadir")
)
"""What systems leave in folders, in lower case."""

MOST_KINDS = 100
"""Kinds of files that are told apart: numbers as endings, as in x.00001, would be as many as files."""
OTHER_KINDS = "files of other kinds"
MANY = re.compile(r"(\.\S+ )?(file|member|text|picture|table|end|sample)s\b")
"""How kinds begin that have a singular."""


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name is passed over: hidden, or left there by a system."""
    return name.startswith(".") or name.lower() in LEFTOVERS


def ending(name: str) -> str:
    """`jpg` of a/B.JPG; "" where there is none."""
    _, dot, last = name.rpartition(".")
    return last.lower() if dot and "/" not in last else ""


def kind_of(name: str) -> str:
    """`.jpg files` of a/B.JPG, or `files without ending`."""
    return f".{ending(name)} files" if ending(name) else "files without ending"


def counted(n: int, kind: str) -> str:
    """`3 texts without a picture`, `1 text without a picture`: kinds are named in the plural."""
    many = MANY.match(kind) if n == 1 else None
    return f"{n:,} {many[0][:-1] + kind[many.end() :] if many else kind}"


def table_ending(name: str) -> str:
    """`csv` of a/B.CSV.gz."""
    return ending(name.lower().removesuffix(".gz"))


def is_table(name: str) -> bool:
    """Whether a file of this name may be a table."""
    return table_ending(name) in TABLE_ENDINGS


def is_picture(name: str) -> bool:
    """Whether a file of this name is read as a picture."""
    return ending(name) in PICTURE_ENDINGS


def is_unread_picture(name: str) -> bool:
    """Whether a file of this name is a picture that is not read."""
    return ending(name) in UNREAD_PICTURE_ENDINGS


def number_order(names: Collection[str]) -> list[str]:
    """Sorted by number where all names begin alike and with a number (2, 10; 2.cat, 10.dog; c2, c10), else as text."""
    ordered = sorted(names)
    found = {name: re.match(r"(\D*)([0-9]+)(?![^\W_])", name) for name in ordered}
    numbers = {name: int(match[2]) for name, match in found.items() if match}
    starts = {match and match[1] for match in found.values()}
    return sorted(ordered, key=numbers.__getitem__) if starts != {None} and len(starts) == 1 else ordered


@dataclass
class PassedOver:
    """What a command found and did not read, by kind, with the first of each kind."""

    counts: dict[str, int] = field(default_factory=dict)
    """Kind, such as `.heic files`, -> how many."""
    first: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, example: str) -> None:
        """Count one. What is shown of names is escaped."""
        kind = escaped(kind)
        if len(self.counts) >= MOST_KINDS and kind not in self.counts:
            kind = OTHER_KINDS
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if kind not in self.first:
            self.first[kind] = escaped(example)

    def update(self, other: "PassedOver") -> None:
        """Count what another one counts."""
        for kind, n in other.counts.items():
            self.counts[kind] = self.counts.get(kind, 0) + n
        self.first = {**other.first, **self.first}

    def in_words(self) -> str:
        """`12 .heic files (first: a/1.heic), 3 texts without a picture (first: b.txt)`, the most frequent first."""
        kinds = sorted(self.counts, key=lambda kind: (-self.counts[kind], kind))
        return ", ".join(f"{counted(self.counts[kind], kind)} (first: {self.first[kind]})" for kind in kinds)
