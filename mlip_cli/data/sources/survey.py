"""Read a source once, without decoding pictures: what was understood is said then, and mistakes are found."""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field

from mlip_cli.data.download.options import check_installed
from mlip_cli.data.sources.captions import CaptionLooks, shortened
from mlip_cli.data.sources.formats import LOOKED_FOR, DataSource, read_rows
from mlip_cli.data.sources.listing import PassedOver, ending, is_picture, is_table, is_unread_picture, kind_of
from mlip_cli.data.sources.picture_paths import PathFinder
from mlip_cli.data.sources.records import PictureAddress, Record
from mlip_cli.data.sources.shared_pictures import SharedPictures
from mlip_cli.data.sources.sidecars import TEXT_ENDINGS
from mlip_cli.errors import RunError, UsageError
from mlip_cli.paths import escaped
from mlip_cli.terminal.output import plural

FIRST_PAIRS = 3


@dataclass
class Survey:
    """What is known of a source before the work."""

    rows: int = 0
    captions: int = 0
    addresses: int = 0
    """Rows whose picture is downloaded."""
    rejects: int = 0
    """Rows that cannot become samples, whatever their pictures hold."""
    missing: int = 0
    """Rows whose picture is not there."""
    first_missing: str = ""
    named: SharedPictures = field(default_factory=SharedPictures)
    """Pictures of rejects."""
    pictures: int = 0
    """Records that the work reads: rows that share a picture are one."""
    shared: SharedPictures = field(default_factory=SharedPictures)
    first: list[str] = field(default_factory=list)
    """The first pairs, in words."""
    looks: CaptionLooks = field(default_factory=CaptionLooks)
    spelled: PassedOver = field(default_factory=PassedOver)
    """Paths that were found by another spelling."""

    def add(self, record: Record) -> None:
        """Count a row and what it says."""
        self.rows += 1
        if record.found_as:
            name, found = (unicodedata.normalize("NFC", text) for text in (record.detail, record.found_as))
            is_form = name.endswith(found) and not record.detail.endswith(record.found_as)
            form = ", in another Unicode normal form" if is_form else ""
            self.spelled.add("paths were found by another spelling", f"{record.detail} is {record.found_as}{form}")
        if record.reject:
            self.rejects += 1
            if record.same and not isinstance(record.picture, PictureAddress):
                self.named.add(record)
            if record.reject == "picture missing":
                self.missing += 1
                self.first_missing = self.first_missing or record.detail
            return
        if isinstance(record.picture, PictureAddress):
            if not self.addresses:
                check_installed()
            self.addresses += 1
        self.captions += len(record.captions)
        self.looks.look_at(record.captions)
        if record.same:
            self.shared.add(record)
        else:
            self.pictures += 1
        if len(self.first) < FIRST_PAIRS:
            picture = record.detail or record.file
            self.first.append(f"{escaped(picture)} {' '.join(shortened(c.text) for c in record.captions[:2])}")

    def in_words(self) -> str:
        """`300 rows, 60 pictures with 5 captions each`, or the rows alone where each has a picture of its own."""
        rows = plural(self.rows, "row")
        least, most = self.shared.fewest_and_most()
        if most <= 1:
            return rows
        many = f"{least} to {most}" if least != most else str(most)
        what = "captions" if self.captions == self.rows - self.rejects else "rows"
        return f"{rows}, {plural(self.shared.num_pictures, 'picture')} with {many} {what} each"


def surveyed(source: DataSource) -> Survey:
    """Read the source once, so that a broken table or tar is found before the work starts.

    Raises:
        UsageError: no records, no picture that is there, or a table that cannot be read.
        DamagedTarError: a tar is not whole.
    """
    survey = Survey()
    for record in read_rows(source):
        survey.add(record)
    if survey.rows == 0:
        raise UsageError(f"{source.name}: read as {source.format}, it has no records; looked for {LOOKED_FOR}")
    if survey.missing == survey.rows and source.format == "metadata":
        folders = sorted({str(plan.folder) for plan in source.table_plans})
        raise UsageError(
            f"{source.name}: none of its {plural(survey.rows, 'picture')} is in {escaped(' or '.join(folders))} "
            f"(first: {escaped(survey.first_missing)}); {_cure_for_missing(survey.first_missing)}"
        )
    survey.shared.count()
    survey.named.count()
    survey.pictures += survey.rejects + survey.shared.num_pictures
    return survey


def _cure_for_missing(name: str) -> str:
    if re.match(r"[A-Za-z]:[/\\\\]|[/~]", name):
        return "its paths are those of another place: write paths from the folder of the pictures into the table"
    return "say --image-folder FOLDER, what the paths are relative to"


def passed_over(source: DataSource, survey: Survey) -> PassedOver:
    """The files of a folder that are not read, by kind.

    Raises:
        RunError: most of the pictures cannot be read.
    """
    passed = PassedOver()
    for kind, name in _unread(source, survey) if source.is_folder else ():
        passed.add(kind, name)
    passed.update(source.notes.passed_over)
    pictures = PassedOver()
    for name in filter(is_unread_picture, source.names):
        pictures.add(kind_of(name), name)
    num_read = len(source.images)
    if sum(pictures.counts.values()) > num_read and source.format == "sidecar":
        raise RunError(
            f"{source.name}: most of its pictures cannot be read: {pictures.in_words()}; {num_read:,} can; convert the "
            "others to JPEG"
        )
    return passed


def _unread(source: DataSource, survey: Survey) -> Iterator[tuple[str, str]]:
    """(kind, name) of each file that is not read."""
    read = {"metadata": source.tables, "webdataset": source.tars()}
    is_read = frozenset(read.get(source.format, []))
    is_text = source.sidecars.is_used if source.format == "sidecar" else None
    finder = PathFinder(source.root)
    for place, name in enumerate(source.names):
        if name in is_read or (is_picture(name) and source.format in ("sidecar", "classes")):
            continue
        if is_text and is_text[place]:
            continue
        if is_picture(name) and source.format == "metadata":
            same = finder.same(str(source.root / name))
            if not survey.named.rows_of(same) and not survey.shared.rows_of(same):
                yield "pictures that no row names", name
        elif source.format == "sidecar" and name.lower().endswith(TEXT_ENDINGS):
            yield "texts without a picture", name
        elif is_table(name) and ending(name) != "txt":
            yield "tables", name
        else:
            yield kind_of(name), name
