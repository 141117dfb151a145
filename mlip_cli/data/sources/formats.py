"""A source whose format is known: its files, and its records in order.

A new format is a line in SOURCE_FORMATS and a module beside this one that makes its records.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from mlip_cli.data.sources.classes import ClassFolders, find_classes
from mlip_cli.data.sources.combinations import SPLIT_RULE
from mlip_cli.data.sources.file_names import CHUNK, ChosenNames, FileList, FileNames, size_and_time
from mlip_cli.data.sources.folders import class_records
from mlip_cli.data.sources.listing import is_picture, is_table, number_order
from mlip_cli.data.sources.openmoji import openmoji_records
from mlip_cli.data.sources.records import ReadOptions, Record, checked_captions, json_bytes
from mlip_cli.data.sources.rules import RowRules, row_rules
from mlip_cli.data.sources.sidecars import Sidecars, sidecar_records, sidecars_of
from mlip_cli.data.sources.table_layouts import found_tables, wrapped_in
from mlip_cli.data.sources.tables import TablePlan, planned_tables, table_records
from mlip_cli.data.sources.tar_samples import Columns, TarNotes
from mlip_cli.data.sources.tars import TAR_ENDINGS, tar_records
from mlip_cli.errors import RunError
from mlip_cli.paths import encodable, escaped
from mlip_cli.terminal.output import plural

if TYPE_CHECKING:  # it imports numpy
    from mlip_cli.data.sources.rewritten import Rewritten
    from mlip_cli.data.sources.shared_pictures import SharedPictures

MOST_NAMED = 5
"""Tables that are named; more are counted."""
ANY_COLUMNS = ReadOptions()
LOOKED_FOR = (
    "a table (.csv, .tsv, .txt, .json, .jsonl, .parquet, .arrow) with columns of pictures and captions; .tar files; "
    "pictures with a .txt of the same name; one folder of pictures a class"
)


@dataclass(frozen=True)
class DataSource:
    """A source whose format is known. `files` are all files that were found there, those of a folder sorted by name."""

    name: str
    """As the user wrote it."""
    format: str
    root: Path
    files: FileList
    is_folder: bool = False
    """False when the user named files one by one or by a pattern."""
    versions: tuple[str, ...] = ()
    """Of the packages that a built-in source comes from."""
    read: ReadOptions = ANY_COLUMNS
    """Columns that the user named also tell which files of a folder are tables."""
    notes: TarNotes = field(default_factory=TarNotes)
    """What is noted about tars whenever their records are read."""
    rules: RowRules | None = None
    """Which rows of tables are read, and whose captions they have."""

    def fingerprint(self) -> str:
        """Changes when a file is added, removed, resized or touched, or a built-in source is split by another rule."""
        rule = [SPLIT_RULE] if self.versions else []
        start, end = json_bytes([self.format, [], self.versions, *rule]).split(b"[]", 1)
        digest = hashlib.sha256(start + b"[")
        files = zip(map(encodable, self.names), self.files.sizes, self.files.mtimes_ns, strict=True)
        comma = b""
        while chunk := list(islice(files, CHUNK)):
            digest.update(comma + json_bytes(chunk)[1:-1])
            comma = b","
        digest.update(b"]" + end)
        return digest.hexdigest()

    @property
    def names(self) -> FileNames:
        """The names of the files."""
        return self.files.names

    @property
    def num_bytes(self) -> int:
        """What the files hold together."""
        return sum(self.files.sizes)

    @cached_property
    def _tables(self) -> tuple[list[str], dict[str, str]]:
        if self.is_folder:
            tables, unread = found_tables(self.root, self.names, self.read)
            return number_order(tables), unread
        return list(filter(is_table, self.names)), {}

    @property
    def tables(self) -> list[str]:
        """The tables that are read."""
        return self._tables[0]

    @property
    def unread_tables(self) -> dict[str, str]:
        """Other tables of a folder -> why they are not read."""
        return self._tables[1]

    @cached_property
    def sidecars(self) -> Sidecars:
        """The texts of the pictures in a folder."""
        return sidecars_of(self.names if self.is_folder else FileNames())

    def unwrapped(self) -> "DataSource":
        """The same without the folders that hold everything."""
        wrapper = wrapped_in(self.names) if self.is_folder else ""
        return replace(self, root=self.root / wrapper, files=self.files.below(wrapper)) if wrapper else self

    @cached_property
    def table_plans(self) -> list[TablePlan]:
        """How the tables are read.

        Raises:
            UsageError: a table cannot be read, its columns cannot be guessed, or its pictures lie in several folders.
        """
        return planned_tables(self.root, self.tables, self.read, pictures=self.images if self.is_folder else None)

    def with_rules(self, folder: Path) -> "DataSource":
        """The same with the rules for rows that the user gave. What they need on the disk is written to `folder`.

        Raises:
            UsageError: as `table_plans` and `row_rules`.
        """
        plans = self.table_plans if self.format == "metadata" else []
        return replace(self, rules=row_rules(self.read, [(plan.table, plan.chosen) for plan in plans], folder))

    @cached_property
    def images(self) -> ChosenNames:
        """The files with the ending of a picture."""
        return self.names.where(is_picture)

    def tars(self) -> list[str]:
        """The tars, compressed ones too."""
        return [name for name in self.names if name.lower().endswith(TAR_ENDINGS)]

    @cached_property
    def classes(self) -> ClassFolders:
        """The classes, where the format is `classes`.

        Raises:
            UsageError, RunError: as `find_classes`.
        """
        return find_classes(self.root, self.names, place=escaped(self.name))

    @property
    def rewritten_by_sha256(self) -> "Rewritten | None":
        """Captions of another file that are joined once the bytes of a picture are there."""
        rewritten = self.rules.rewritten if self.rules else None
        return rewritten if rewritten and rewritten.by_sha256 else None

    def check_unchanged(self) -> None:
        """See that the tars are as they were listed: a shorter one would give other samples than were counted.

        Raises:
            RunError: one is not.
        """
        for name, *known in zip(self.names, self.files.sizes, self.files.mtimes_ns, strict=True):
            if name.lower().endswith(TAR_ENDINGS) and known != size_and_time(self.root / name):
                raise RunError(
                    f"{self.root / name}: has changed since it was first read; start again when nothing writes to it"
                )

    def describe(self) -> str:
        """What was recognised, in words."""
        return SOURCE_FORMATS[self.format].describe(self)


def _described_tables(source: DataSource) -> str:
    names = ", ".join(map(escaped, source.tables[:MOST_NAMED]))
    num_others = len(source.tables) - MOST_NAMED
    return f"pictures in {names} and {num_others} more" if num_others > 0 else f"pictures in {names}"


def _described_sidecars(source: DataSource) -> str:
    endings = " and ".join(source.sidecars.endings())
    return f"{plural(len(source.images), 'picture')}, captions in {endings} files"


@dataclass(frozen=True)
class SourceFormat:
    """How sources of one format are recognised, read and described."""

    fits: Callable[[DataSource], bool]
    records: Callable[[DataSource], Iterator[Record]]
    describe: Callable[[DataSource], str]


SOURCE_FORMATS = {
    "openmoji": SourceFormat(
        fits=lambda found: bool(found.versions),
        records=lambda source: openmoji_records(),
        describe=lambda source: ", ".join(source.versions),
    ),
    "metadata": SourceFormat(
        fits=lambda found: bool(found.tables),
        records=lambda source: table_records(source.table_plans, source.rules),
        describe=_described_tables,
    ),
    "webdataset": SourceFormat(
        fits=lambda found: bool(found.tars()),
        records=lambda source: tar_records(
            source.root,
            source.tars(),
            Columns(source.read.image_column, source.read.caption_column),
            source.notes,
            damaged=source.read.damaged,
        ),
        describe=lambda source: plural(len(source.tars()), "webdataset tar"),
    ),
    "sidecar": SourceFormat(
        fits=lambda found: bool(found.sidecars),
        records=lambda source: sidecar_records(source.root, source.sidecars),
        describe=_described_sidecars,
    ),
    "classes": SourceFormat(
        fits=lambda found: found.is_folder and any("/" in name for name in found.images),
        records=lambda source: class_records(source.root, source.images, source.classes),
        describe=lambda source: source.classes.in_words(),
    ),
}
"""By the word of --format. Where several fit, the first is taken."""


def read_rows(source: DataSource) -> Iterator[Record]:
    """The rows of the source in their own order, captions checked.

    Raises:
        UsageError: a table cannot be read, or its columns cannot be guessed.
        DamagedTarError: a tar is not whole.
    """
    return islice(map(checked_captions, SOURCE_FORMATS[source.format].records(source)), source.read.limit)


def read_records(source: DataSource, shared: "SharedPictures") -> Iterator[Record]:
    """The rows of the source, those that share a picture as one.

    Raises:
        UsageError: as `read_rows`.
        DamagedTarError: as `read_rows`.
    """
    return shared.merged(read_rows(source))
