"""Captions of another file, joined to the rows of a source by a column or by the sha256 of their pictures.

They lie in two files that workers map: KEYS.npy, (2, n) of u64, hashes of keys, sorted, and offsets; and LINES.jsonl,
a key and its captions a line, in the order of the file. Memory holds 40 bytes a row while they are written, and
nothing a row then.
"""

import hashlib
import json
import mmap
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from mlip_cli.data.sources.captions import captions_of
from mlip_cli.data.sources.records import (
    ADD,
    Caption,
    ReadOptions,
    UnusableSampleError,
    hash_of_text,
    json_bytes,
    usable_captions,
)
from mlip_cli.data.sources.table_files import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    Chosen,
    Table,
    chosen_columns,
    match_column,
    open_table,
)
from mlip_cli.data.sources.text_tables import cells_in_words, table_error
from mlip_cli.errors import UsageError
from mlip_cli.files import atomic_path
from mlip_cli.paths import escaped

SHA256 = "sha256"
KEYS = ("uid", "key", SHA256, "url", "image_id", "id")
"""Columns by which rows are joined, if both tables have them; the first is taken."""


@dataclass(frozen=True)
class CaptionFile:
    """The file that --captions-from names, and which of its columns are read."""

    table: Table
    adds: bool
    """Its captions add to a row's own; else they take their place."""
    caption: str

    def key_columns(self) -> tuple[str, ...]:
        """The columns that may tell whose the captions are."""
        return tuple(column for column in self.table.columns if column != self.caption)

    def fingerprint(self, key: str) -> str:
        """Changes when the file is replaced or touched, or another column joins it."""
        stat = self.table.path.stat()
        told = [str(self.table.path), stat.st_size, stat.st_mtime_ns, self.caption, key]
        return hashlib.sha256(json_bytes(told)).hexdigest()[:16]


def caption_file(option: str) -> CaptionFile:
    """The file of `--captions-from [add:]FILE`.

    Raises:
        UsageError: it is no table, or none of its columns can hold captions.
    """
    path = Path(option.removeprefix(ADD))
    if not path.is_file():
        raise UsageError(f"--captions-from {escaped(option)}: no such file; name a table of keys and captions")
    table = open_table(path)
    return CaptionFile(table, option.startswith(ADD), _caption_column(table))


def _caption_column(table: Table) -> str:
    if not table.has_header:
        return chosen_columns(table, ReadOptions()).captions[0][0]
    names = {column: column.strip().lower() for column in table.columns}
    for group in CAPTION_COLUMNS:
        if len(found := [column for column, name in names.items() if name in group]) == 1:
            return found[0]
    found = [column for column, name in names.items() if "caption" in name]
    found = found or [column for column, name in names.items() if name not in KEYS]
    if len(found) == 1:
        return found[0]
    raise table_error(
        table.path,
        f"--captions-from: which column holds the captions? columns are {cells_in_words(table.columns)}; call one "
        "caption",
    )


@dataclass(frozen=True)
class Rewritten:
    """Captions by key."""

    file: CaptionFile
    key: str
    """Column of the file."""
    by_sha256: bool
    """Joined by the bytes of the pictures, which workers know."""
    stem: Path
    """Of the two files."""
    counts: list[int] = field(default_factory=lambda: [0, 0])
    """Rows that were asked for, and those that had captions in the file."""

    def key_column_of(self, table: Table, chosen: Chosen) -> str:
        """The column of a table that is looked up in the file; "" where the bytes of pictures are."""
        return "" if self.by_sha256 else _joined(self.file, table.columns, chosen.image)[1]

    def instead_of(self, own: tuple[Caption, ...], key: Any) -> tuple[Caption, ...]:
        """The captions of a row with this key."""
        found = find_captions(str(self.stem), _key(self.key, key))
        self.counts[0] += 1
        self.counts[1] += bool(found)
        return merged(own, found, adds=self.file.adds)

    def in_words(self) -> str:
        """How the captions are joined, for the line before the work."""
        by = "the sha256 of the pictures" if self.by_sha256 else f"column {self.key!r}"
        how = "added to a row's own" if self.file.adds else "in place of a row's own"
        return f"captions of {escaped(str(self.file.table.path))}: {how}, joined by {by}"

    def counts_in_words(self) -> str:
        """How many rows have captions in the file."""
        asked, found = self.counts
        return f"{self.file.table.path.name}: captions for {found:,} of {asked:,} rows; the others keep their own"


def merged(own: tuple[Caption, ...], found: tuple[Caption, ...], *, adds: bool) -> tuple[Caption, ...]:
    """The captions of a row and those that were found for it."""
    return own + found if adds else found or own


def rewritten_captions(option: str, tables: Sequence[tuple[Table, Chosen]], folder: Path) -> Rewritten:
    """Write the captions of `[add:]FILE` by key to `folder`, unless they are there.

    Args:
        tables: of the source and the columns that are read; none for a source of other files, which is joined by the
            bytes of its pictures.

    Raises:
        UsageError: the file cannot be read, has no column that joins it, or holds no captions.
    """
    file = caption_file(option)
    joins = {_joined(file, table.columns, chosen.image)[0] for table, chosen in tables}
    by_sha256 = not tables or joins == {""}
    key = match_column(file.key_columns(), SHA256) if by_sha256 else next(iter(joins), "")
    if not key or len(joins) > 1:
        own = cells_in_words(tables[0][0].columns) if tables else "none"
        raise table_error(
            file.table.path,
            f"--captions-from: no column joins it: its columns are {cells_in_words(file.table.columns)}, those of the "
            f"source {own}; both need one of {', '.join(KEYS)}, or the file sha256 of the pictures",
        )
    stem = folder / f"captions-{file.fingerprint(key)}"
    if not stem.with_suffix(".npy").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _write(file, key, stem)
    return Rewritten(file, key, by_sha256, stem)


def _joined(file: CaptionFile, columns: tuple[str, ...], image: str) -> tuple[str, str]:
    """(column of the file, column of the table) that join them; "" and "" if none do."""
    own = file.key_columns()
    pairs = [(mine, theirs) for mine in own if (theirs := match_column(columns, mine))]
    for name in KEYS:
        for mine, theirs in pairs:
            if mine.strip().lower() == name:
                return mine, theirs
    if len(pairs) == 1 and file.table.has_header:
        return pairs[0]
    names = {name for group in IMAGE_COLUMNS for name in group}
    pictures = [mine for mine in own if mine.strip().lower() in names] if file.table.has_header else list(own)
    return (pictures[0], image) if len(pictures) == 1 else ("", "")


def _write(file: CaptionFile, key: str, stem: Path) -> None:
    hashes, offsets = array("Q"), array("Q")
    with atomic_path(stem.with_suffix(".jsonl")) as temporary, open(temporary, "wb") as lines:
        for row in file.table.rows():
            if (
                isinstance(row, dict)
                and (name := _key(key, row.get(key)))
                and (found := _usable(row.get(file.caption)))
            ):
                hashes.append(hash_of_text(name))
                offsets.append(lines.tell())
                _write_line(lines, name, found)
    if not hashes:
        stem.with_suffix(".jsonl").unlink()
        raise table_error(
            file.table.path, f"--captions-from: no row has {key!r} and a caption in column {file.caption!r}"
        )
    found_hashes = np.frombuffer(hashes, np.uint64)
    order = np.argsort(found_hashes, kind="stable")
    with atomic_path(stem.with_suffix(".npy")) as temporary, open(temporary, "wb") as index:
        np.save(index, np.stack([found_hashes[order], np.frombuffer(offsets, np.uint64)[order]]), allow_pickle=False)


def _write_line(lines: IO[bytes], key: str, captions: tuple[Caption, ...]) -> None:
    values = [[caption.text, caption.weight] for caption in captions]
    lines.write(json.dumps([key, values], separators=(",", ":")).encode() + b"\n")


def _usable(cell: Any) -> tuple[Caption, ...]:
    """The captions of a cell that a sample can have: a bad one leaves a row its own."""
    try:
        return usable_captions(captions_of(cell))
    except UnusableSampleError:
        return ()


def _key(column: str, cell: Any) -> str:
    """A cell as a key; "" if it is none."""
    key = cell.strip() if isinstance(cell, str) else str(cell) if isinstance(cell, int) else ""
    return key.lower() if column.strip().lower() == SHA256 else key


@lru_cache(maxsize=1)
def _opened(stem: str) -> tuple[memoryview, memoryview, mmap.mmap]:
    """Hashes of keys, offsets, and lines."""
    index = np.load(f"{stem}.npy", mmap_mode="r", allow_pickle=False)
    with open(f"{stem}.jsonl", "rb") as lines:
        mapped = mmap.mmap(lines.fileno(), 0, access=mmap.ACCESS_READ)
    return memoryview(index[0]), memoryview(index[1]), mapped


def find_captions(stem: str, key: str) -> tuple[Caption, ...]:
    """The captions of all rows of the file with this key, in its order."""
    return tuple(_captions_of_key(stem, key)) if key else ()


def _captions_of_key(stem: str, key: str) -> Iterator[Caption]:
    hashes, offsets, lines = _opened(stem)
    wanted = hash_of_text(key)
    place = bisect_left(hashes, wanted)
    while place < len(hashes) and hashes[place] == wanted:
        start = offsets[place]
        name, captions = json.loads(lines[start : lines.find(b"\n", start)])
        if name == key:
            yield from (Caption(text, weight) for text, weight in captions)
        place += 1
