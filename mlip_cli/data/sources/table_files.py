"""One table: its columns, its rows, and which columns hold pictures and captions."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from mlip_cli.data.sources.columnar import columnar_rows, columnar_schema
from mlip_cli.data.sources.json_tables import json_columns, json_line_rows, json_rows
from mlip_cli.data.sources.listing import table_ending
from mlip_cli.data.sources.records import ReadOptions
from mlip_cli.data.sources.text_tables import (
    PICTURE_NAME,
    Layout,
    Row,
    cells_in_words,
    table_error,
    text_layout,
    text_rows,
)
from mlip_cli.errors import UsageError

IMAGE_COLUMNS = (
    ("file_name", "image", "image_path", "filepath", "path"),
    ("filename", "image_name", "img", "img_path", "img_name", "images", "image_file", "image_filename", "imagepath",
     "imagename", "file", "file_path", "filepaths", "picture", "photo", "jpg", "png"),
    ("image_id", "image_uid"),
    ("image_url", "img_url", "image_link", "imageurl", "picture_url", "photo_url", "downloadurl", "download_url"),
    ("url",),
)  # fmt: skip
CAPTION_COLUMNS = (
    ("caption", "captions", "text", "title"),
    ("comment", "comments", "raw", "description", "sentence", "sentences", "prompt", "alt", "alt_text", "alttext",
     "conversations", "messages", "txt"),
)  # fmt: skip
"""Names that tell what a column holds, in lower case. The first group of which a table has a name decides."""
KNOWN_COLUMNS = tuple(name for group in (*IMAGE_COLUMNS, *CAPTION_COLUMNS) for name in group)
ADDRESS_COLUMNS = frozenset(name for group in IMAGE_COLUMNS[-2:] for name in group)
"""Those among them that hold the addresses of pictures."""
FIRST_NAMES = 20
"""This many rows tell that a table names pictures, and which folder the names are relative to."""


@dataclass(frozen=True)
class Table:
    """A table that can be read."""

    path: Path
    columns: tuple[str, ...]
    rows: Callable[[], Iterator[Row]]
    holding_pictures: tuple[str, ...] = ()
    """Columns whose cells are encoded pictures."""
    layout: Layout | None = None
    """How the cells of a text table lie."""
    decoded: tuple[str, ...] = ()
    """Columns whose texts the file has as in an address, `My+cat%21`, and the rows as `My cat!`."""

    @property
    def has_header(self) -> bool:
        """False for a text table whose columns have places and no names."""
        return self.layout is None or self.layout.has_header


@dataclass(frozen=True)
class Chosen:
    """The columns that are read."""

    image: str
    captions: tuple[tuple[str, float], ...]
    """Column and weight of each."""

    def in_words(self) -> str:
        """Which columns are read, for the line before the work."""
        captions = " and ".join(
            repr(column) if weight == 1 else f"{column!r} of weight {weight:g}" for column, weight in self.captions
        )
        return f"pictures: column {self.image!r}, captions: column {captions}"


def open_table(path: Path) -> Table:
    """A table by the ending of its name.

    Raises:
        UsageError: it is not of this format, or empty.
    """
    ending = table_ending(path.name)
    if ending in ("parquet", "arrow"):
        columns, holding_pictures = columnar_schema(path)
        return Table(path, columns, partial(columnar_rows, path), holding_pictures=holding_pictures)
    if ending in ("json", "jsonl", "ndjson"):
        rows = partial(json_rows if ending == "json" else json_line_rows, path)
        return Table(path, json_columns(path, rows), rows)
    layout = text_layout(path, ending=ending, known=KNOWN_COLUMNS)
    return Table(path, layout.columns, partial(text_rows, path, layout), layout=layout)


def chosen_columns(table: Table, read: ReadOptions) -> Chosen:
    """The columns that hold pictures and captions, named by the user or guessed.

    Raises:
        UsageError: no column (or more than one) can hold them.
    """
    if not table.has_header and not (read.image_column and read.caption_column):
        return _chosen_by_content(table, read)
    named = _named(table, "image", read.image_column) if read.image_column else None
    return Chosen(named or _guessed(table, "image", IMAGE_COLUMNS), _captions(table, read.caption_column))


def _captions(table: Table, option: str | None) -> tuple[tuple[str, float], ...]:
    """The columns of --caption-column: one name, or several with weights, `title:2,text`."""
    if option is None:
        return ((_guessed(table, "caption", CAPTION_COLUMNS), 1.0),)
    chosen: dict[str, float] = {}
    for part in [option] if match_column(table.columns, option) is not None else option.split(","):
        name, colon, number = part.rpartition(":")
        if not colon or match_column(table.columns, part) is not None:
            name, number = part, "1"
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not 0 < weight < float("inf"):
            raise UsageError(f"--caption-column {part.strip()}: {number!r} is not a weight above 0; say NAME:WEIGHT")
        chosen[_named(table, "caption", name.strip())] = weight
    return tuple(chosen.items())


def match_column(columns: Sequence[str], name: str) -> str | None:
    """The column of this name, or the one that differs in case only."""
    if name in columns:
        return name
    alike = [column for column in columns if column.strip().lower() == name.strip().lower()]
    return alike[0] if len(alike) == 1 else None


def _named(table: Table, what: str, name: str) -> str:
    if (column := match_column(table.columns, name)) is None:
        header = "" if table.has_header else "; the table has no header, so its columns are numbers"
        raise table_error(
            table.path, f"no column {name!r} (--{what}-column); columns are {cells_in_words(table.columns)}{header}"
        )
    return column


def _guessed(table: Table, what: str, groups: Sequence[Sequence[str]]) -> str:
    holding = [column for column in table.holding_pictures if not _names_captions(column)]
    if what == "image" and len(holding) == 1:
        return holding[0]
    names = {column: _plain(column) for column in table.columns}
    found: list[str] = []
    for group in groups:
        found = found or [column for column, name in names.items() if name in group]
    if what == "caption":
        found = found or list(filter(_names_captions, names))
    if len(found) == 1:
        return found[0]
    problem = f"columns {' and '.join(found)} could both be the {what}" if found else f"no column for the {what}"
    is_whole = len(table.columns) == 1 and table_ending(table.path.name) in ("csv", "tsv", "txt")
    several = ", or NAME,NAME for several" if what == "caption" else ""
    cure = "part its cells by commas or tabs" if is_whole else f"say --{what}-column NAME{several}"
    raise table_error(table.path, f"{problem}; {_columns(table)}; {cure}")


def _plain(column: str) -> str:
    return column.strip().lower().replace(" ", "_").replace("-", "_")


def _names_captions(column: str) -> bool:
    name = _plain(column)
    return name.endswith("caption") or any(name in group for group in CAPTION_COLUMNS)


def holds_addresses(column: str) -> bool:
    """Whether a column of this name holds addresses of pictures."""
    return _plain(column) in ADDRESS_COLUMNS


def _columns(table: Table) -> str:
    what = "the only column is" if len(table.columns) == 1 else "columns are"
    return f"{what} {cells_in_words(table.columns)}"


def _chosen_by_content(table: Table, read: ReadOptions) -> Chosen:
    """The columns of a table without a header: of two, one names a picture in the first row and one does not.

    Raises:
        UsageError: there are more, or they cannot be told apart.
    """
    row: Any = next((row for row in islice(table.rows(), 1) if isinstance(row, dict)), {})
    pictures = [column for column, cell in row.items() if PICTURE_NAME.match(cell.strip())]
    if len(table.columns) == 2 and len(pictures) == 1 and not (read.image_column or read.caption_column):
        caption = next(column for column in table.columns if column != pictures[0])
        return Chosen(pictures[0], ((caption, 1.0),))
    raise table_error(
        table.path,
        f"no header: the first row is {cells_in_words(row.values())}; say --image-column N and "
        f"--caption-column N, from 1 to {len(table.columns)}, or give the table a header",
    )
