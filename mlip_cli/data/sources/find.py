"""Find out what SOURCE is: its files and its format."""

import glob
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from mlip_cli.data.sources.file_names import listed, names_below
from mlip_cli.data.sources.formats import ANY_COLUMNS, LOOKED_FOR, MOST_NAMED, SOURCE_FORMATS, DataSource
from mlip_cli.data.sources.listing import is_unread_picture, kind_of
from mlip_cli.data.sources.openmoji import installed_versions
from mlip_cli.data.sources.records import PicturePlace, ReadOptions, Record
from mlip_cli.data.sources.sidecars import sidecar_records
from mlip_cli.data.sources.table_layouts import check_tables, is_metadata
from mlip_cli.data.sources.tables import table_records
from mlip_cli.errors import UsageError
from mlip_cli.paths import escaped
from mlip_cli.terminal.output import plural, say

ARCHIVES = (".zip", ".rar", ".7z")


def find_source(source: str, *, format: str = "auto", read: ReadOptions = ANY_COLUMNS) -> DataSource:
    """Recognise SOURCE by its files, or check that it is of the given format.

    Raises:
        UsageError: SOURCE does not exist, holds nothing usable, is not of this format, or could be of several.
    """
    if format not in ("auto", *SOURCE_FORMATS):
        *words, last = SOURCE_FORMATS
        raise UsageError(f"--format {format}: no such format; use auto, {', '.join(words)} or {last}")
    found = replace(_found(source, format), read=read)
    inner = found.unwrapped()
    for name, known in SOURCE_FORMATS.items():
        candidate = inner if name in ("metadata", "sidecar") else found
        if format in ("auto", name) and known.fits(candidate):
            recognised = replace(candidate, format=name)
            if name == "metadata":
                _check_tables(recognised, is_named=format == name)
            if name == "classes":
                recognised.classes.tell(escaped(source))
            return recognised
    if format != "auto":
        raise UsageError(f"{source}: not of format {format}: {_what_is_there(found)}; looked for {LOOKED_FOR}")
    reasons = [f"{escaped(name)}: {reason}" for name, reason in islice(inner.unread_tables.items(), MOST_NAMED)]
    why = "; ".join([f"{_what_is_there(found)}{_missing(found)}", *_cures(found), *reasons])
    raise UsageError(f"{source}: {why}; looked for {LOOKED_FOR}")


def find_pictures(source: str) -> tuple[DataSource, Iterator[Record]]:
    """Recognise SOURCE where pictures need no captions, and its records, whose captions are not checked.

    A folder with pictures gives them all, with the captions of its tables, else of the texts beside them. Everything
    else is read as `find_source` says.

    Raises:
        UsageError: as `find_source`.
    """
    found = _found(source, "auto")
    inner = found.unwrapped()
    if inner.is_folder and inner.images:
        return inner, _all_pictures(inner)
    known = find_source(source)
    return known, SOURCE_FORMATS[known.format].records(known)


def _all_pictures(folder: DataSource) -> Iterator[Record]:
    """The rows of the tables of a folder, then its other pictures."""
    named = set()
    try:
        for record in table_records(folder.table_plans):
            if isinstance(record.picture, PicturePlace):
                named.add(os.path.realpath(record.picture.path))
            yield record
    except UsageError as error:
        say(f"captions of tables are not read: {error}")
    others = folder.sidecars.where(lambda name: os.path.realpath(folder.root / name) not in named)
    yield from sidecar_records(folder.root, others)


def _missing(found: DataSource) -> str:
    """What a source of no known format lacks."""
    if found.images:
        return ", but no captions for the pictures"
    return ", no pictures" if found.is_folder and found.names else ""


def _cures(found: DataSource) -> Iterator[str]:
    """What to do about files that are not read as they are."""
    stems = {name.rpartition(".")[0] for name in found.images}
    if any(name.endswith(".json") and name.rpartition(".")[0] in stems for name in found.names):
        yield "a .json beside a picture is not read: write its caption to a .txt"
    if found.images:
        return
    if any(map(is_unread_picture, found.names)):
        yield "convert its pictures to JPEG"
    if packed := [name for name in found.names if name.lower().endswith(ARCHIVES)]:
        yield f"unpack {escaped(packed[0])} first"


def _check_tables(source: DataSource, *, is_named: bool) -> None:
    if not source.is_folder or source.read.preset:
        return
    check_tables(source.name, source.tables)
    if source.sidecars and not is_named and not any(map(is_metadata, source.tables)):
        raise UsageError(
            f"{source.name}: captions in {', '.join(map(escaped, source.tables))} and in "
            f"{plural(len(source.sidecars), 'text')} of pictures; say --format metadata or --format sidecar"
        )


def _found(source: str, format: str) -> DataSource:
    """The files at SOURCE, whose format is not known yet."""
    if format == "openmoji" or (format == "auto" and source == "openmoji"):
        return DataSource(source, "", Path(), listed("", ()), versions=installed_versions(source))
    path = Path(source)
    if path.is_dir():
        return DataSource(source, "", path, listed(path, names_below(path)), is_folder=True)
    if matches := [path] if path.is_file() else _expanded(source):
        root = Path(os.path.commonpath([match.parent for match in matches]))
        return DataSource(source, "", root, listed(root, (str(match.relative_to(root)) for match in matches)))
    cure = " (download this file first; the pictures that it lists are downloaded then)" if "://" in source else ""
    raise UsageError(f"{source}: no such file or folder{cure}; SOURCE is a folder, a table, tars, or openmoji")


def _what_is_there(found: DataSource) -> str:
    if not found.names:
        return "the folder is empty"
    if not found.is_folder:
        return "a file of no known kind"
    counts = Counter(kind_of(name).removesuffix(" files") for name in found.names)
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:5]
    return ", ".join(f"{n} {escaped(kind)}" for kind, n in most)


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
