"""Find out what SOURCE is: its format, its files, and their records in order.

A new format is a line in SOURCE_FORMATS and a module beside this one that makes its records.
"""

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from mlip_cli.data.sources.folders import class_folder, class_records, sidecar_records
from mlip_cli.data.sources.listing import PICTURE_ENDINGS, walk
from mlip_cli.data.sources.openmoji import installed_versions, openmoji_records
from mlip_cli.data.sources.records import (
    SPLIT_WORDS,
    ReadOptions,
    Record,
    checked_captions,
    json_bytes,
    printable,
)
from mlip_cli.data.sources.tables import table_records
from mlip_cli.data.sources.tar_samples import Columns, TarNotes
from mlip_cli.data.sources.tars import TAR_ENDINGS, tar_records
from mlip_cli.errors import UsageError
from mlip_cli.terminal.output import plural

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
LOOKED_FOR = (
    "metadata.csv, .tsv, .jsonl or .parquet; .tar files; pictures with a .txt of the same name; one folder of pictures "
    "a class"
)


@dataclass(frozen=True)
class SourceFile:
    """A file of the source, relative to its root."""

    name: str
    size: int
    mtime_ns: int

    @property
    def suffix(self) -> str:
        """`.jpg` of `a/B.JPG`."""
        return Path(self.name).suffix.lower()


@dataclass(frozen=True)
class DataSource:
    """A source whose format is known. `files` are all files that were found there, sorted by name."""

    name: str
    """As the user wrote it."""
    format: str
    root: Path
    files: tuple[SourceFile, ...]
    is_folder: bool = False
    """False when the user named files one by one or by a pattern."""
    versions: tuple[str, ...] = ()
    """Of the packages that a built-in source comes from."""
    notes: TarNotes = field(default_factory=TarNotes)
    """Of tars, each time that their records are read."""

    def fingerprint(self) -> str:
        """Changes when a file is added, removed, resized or touched."""
        listing = [[printable(file.name), file.size, file.mtime_ns] for file in self.files]
        return hashlib.sha256(json_bytes([self.format, listing, self.versions])).hexdigest()

    def tables(self) -> list[str]:
        """The files with metadata: those of a folder are named metadata.* and lie in it or in a split's folder."""
        tables = [file.name for file in self.files if file.suffix in TABLE_SUFFIXES]
        return [name for name in tables if _is_metadata(Path(name))] if self.is_folder else tables

    def images(self) -> list[str]:
        """The files with the ending of a picture."""
        return [file.name for file in self.files if file.suffix[1:] in PICTURE_ENDINGS]

    def tars(self) -> list[str]:
        """The tars, compressed ones too."""
        return [file.name for file in self.files if file.name.lower().endswith(TAR_ENDINGS)]

    def describe(self) -> str:
        """What was recognised, in words."""
        return SOURCE_FORMATS[self.format].describe(self)


def _has_sidecars(found: DataSource) -> bool:
    names = {file.name for file in found.files}
    return found.is_folder and any(str(Path(image).with_suffix(".txt")) in names for image in found.images())


def _described_pictures(source: DataSource, captions: str, files_per_picture: int) -> str:
    num_images = len(source.images())
    others = len(source.files) - num_images * files_per_picture
    ignored = f" ({plural(others, 'other file')} {'is' if others == 1 else 'are'} not read)" if others > 0 else ""
    return f"{plural(num_images, 'picture')}, {captions}{ignored}"


@dataclass(frozen=True)
class SourceFormat:
    """How sources of one format are recognised, read and described."""

    fits: Callable[[DataSource], bool]
    records: Callable[[DataSource, ReadOptions], Iterator[Record]]
    describe: Callable[[DataSource], str]


SOURCE_FORMATS = {
    "openmoji": SourceFormat(
        fits=lambda found: bool(found.versions),
        records=lambda source, read: openmoji_records(skin_tones=read.skin_tones),
        describe=lambda source: ", ".join(source.versions),
    ),
    "metadata": SourceFormat(
        fits=lambda found: bool(found.tables()),
        records=lambda source, read: table_records(source.root, source.tables(), read),
        describe=lambda source: f"pictures in {', '.join(source.tables())}",
    ),
    "webdataset": SourceFormat(
        fits=lambda found: bool(found.tars()),
        records=lambda source, read: tar_records(
            source.root, source.tars(), Columns(read.image_column, read.caption_column), source.notes
        ),
        describe=lambda source: plural(len(source.tars()), "webdataset tar"),
    ),
    "sidecar": SourceFormat(
        fits=_has_sidecars,
        records=lambda source, read: sidecar_records(source.root, source.images()),
        describe=lambda source: _described_pictures(source, "captions in .txt files", 2),
    ),
    "classes": SourceFormat(
        fits=lambda found: found.is_folder and any(map(class_folder, found.images())),
        records=lambda source, read: class_records(source.root, source.images()),
        describe=lambda source: _described_pictures(source, "a folder a class", 1),
    ),
}
"""By the word of --format. Where several fit, the first is taken."""


def find_source(source: str, *, format: str = "auto") -> DataSource:
    """Recognise SOURCE by its files, or check that it is of the given format.

    Raises:
        UsageError: SOURCE does not exist, holds nothing usable, or is not of this format.
    """
    if format not in ("auto", *SOURCE_FORMATS):
        *words, last = SOURCE_FORMATS
        raise UsageError(f"--format {format}: no such format; use auto, {', '.join(words)} or {last}")
    found = _found(source, format)
    possible = [name for name, known in SOURCE_FORMATS.items() if known.fits(found)]
    if format != "auto" and format not in possible:
        raise UsageError(f"{source}: not of format {format}: {_what_is_there(found)}; looked for {LOOKED_FOR}")
    if not possible:
        nothing = ", no pictures" if found.is_folder and found.files else ""
        missing = ", but no captions for the pictures" if found.images() else nothing
        raise UsageError(f"{source}: {_what_is_there(found)}{missing}; looked for {LOOKED_FOR}")
    recognised = replace(found, format=possible[0] if format == "auto" else format)
    if recognised.format == "metadata":
        _check_tables(recognised)
    return recognised


def read_records(source: DataSource, read: ReadOptions) -> Iterator[Record]:
    """The records of the source in their own order, captions checked.

    Raises:
        UsageError: a table cannot be read, or its columns cannot be guessed.
        DamagedTarError: a tar is not whole.
    """
    return islice(map(checked_captions, SOURCE_FORMATS[source.format].records(source, read)), read.limit)


def count_records(source: DataSource, read: ReadOptions) -> int:
    """Read the source once, without pictures, so that a broken table or tar is found before the work starts.

    Raises:
        UsageError: no records, or a table that cannot be read.
        DamagedTarError: a tar is not whole.
    """
    num_records = sum(1 for _ in read_records(source, read))
    if num_records == 0:
        raise UsageError(f"{source.name}: read as {source.format}, it has no records; looked for {LOOKED_FOR}")
    return num_records


def _found(source: str, format: str) -> DataSource:
    """The files at SOURCE, whose format is not known yet."""
    if format == "openmoji" or (format == "auto" and source == "openmoji"):
        return DataSource(source, "", Path(), (), versions=installed_versions(source))
    path = Path(source)
    if path.is_dir():
        files = sorted((_file(path, entry) for entry in walk(path)), key=lambda file: file.name)
        return DataSource(source, "", path, tuple(files), is_folder=True)
    if matches := [path] if path.is_file() else _expanded(source):
        root = Path(os.path.commonpath([match.parent for match in matches]))
        return DataSource(source, "", root, tuple(_file(root, match) for match in matches))
    cure = " (download it first, for example with img2dataset)" if "://" in source else ""
    raise UsageError(f"{source}: no such file or folder{cure}; SOURCE is a folder, a table, tars, or openmoji")


def _what_is_there(found: DataSource) -> str:
    if not found.files:
        return "the folder is empty"
    if not found.is_folder:
        return "a file of no known kind"
    counts = Counter(file.suffix or "files without ending" for file in found.files)
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:5]
    return ", ".join(f"{n} {suffix}" for suffix, n in most)


def _check_tables(source: DataSource) -> None:
    folders = [str(Path(name).parent) for name in source.tables()]
    for folder in folders:
        if folders.count(folder) > 1:
            names = ", ".join(name for name in source.tables() if str(Path(name).parent) == folder)
            raise UsageError(f"{source.name}: several tables: {names}; name one of them as SOURCE")
    if "." in folders and len(folders) > 1:
        raise UsageError(
            f"{source.name}: a table here and others in folders: {', '.join(source.tables())}; name one as SOURCE"
        )


def _is_metadata(name: Path) -> bool:
    """metadata.* in the source's root or in the folder of a split."""
    is_at_root = len(name.parts) == 1 or (len(name.parts) == 2 and name.parts[0].lower() in SPLIT_WORDS)
    return is_at_root and name.stem == "metadata" and name.suffix in TABLE_SUFFIXES


def _file(root: Path, path: Path) -> SourceFile:
    try:
        stat = path.stat()
    except FileNotFoundError:  # a broken link: its row becomes a reject later
        return SourceFile(str(path.relative_to(root)), 0, 0)
    return SourceFile(str(path.relative_to(root)), stat.st_size, stat.st_mtime_ns)


def _expanded(pattern: str) -> list[Path]:
    """Files of a pattern like `shards/{00000..00010}.tar` or `shards/*.tar`, sorted within each brace expansion."""
    from braceexpand import braceexpand

    try:
        patterns = list(braceexpand(pattern))
    except ValueError:  # unbalanced braces: a file name like any other
        patterns = [pattern]
    if len(patterns) > 1 and (missing := [p for p in patterns if not glob.glob(p)]):
        raise UsageError(f"{pattern}: {len(missing)} of {len(patterns)} files are missing, the first is {missing[0]}")
    matches = [Path(match) for p in patterns for match in sorted(glob.glob(p))]
    return [match for match in matches if match.is_file()]
