"""Tables as text: their encoding, what separates their cells, and whether their first row names the columns."""

import codecs
import csv
import gzip
import io
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from mlip_cli.data.sources.listing import PICTURE_ENDINGS, UNREAD_PICTURE_ENDINGS
from mlip_cli.errors import UsageError
from mlip_cli.paths import escaped

MAX_CELL = 1 << 24
TOO_LONG = f"row of more than {MAX_CELL:,} characters"
"""A line, or an item of a JSON document that is streamed; it is never held in memory as a whole."""
FIRST_LINES = 20
"""This many lines tell what separates the cells."""

Row = dict[str, Any] | str
"""Cells by column, or the reason why the row cannot be read."""

GZIP = b"\x1f\x8b"
ENCODINGS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""First bytes -> encoding; the longer ones first. All other text is UTF-8."""

SEPARATORS = (",", "\t", ";", "|")
PICTURE_NAME = re.compile(
    rf"\w+://\S|.*\.({'|'.join((*PICTURE_ENDINGS, *UNREAD_PICTURE_ENDINGS))})(#[0-9]+)?$", re.IGNORECASE | re.DOTALL
)
"""A cell that names a picture: an address, or a file name, perhaps with the number of a caption (`1000.jpg#0`)."""


@dataclass(frozen=True)
class Layout:
    """How the cells of a text table lie."""

    columns: tuple[str, ...]
    """Their names; without a header their places from 1 on."""
    separator: str
    is_quoted: bool
    """Quotes around a cell are not a part of it."""
    has_header: bool


@contextmanager
def opened_text(path: Path) -> Iterator[io.TextIOWrapper]:
    """The text of a file, unpacked if it is gzip, decoded by its byte order mark.

    Bytes that are not UTF-8 become lone surrogates, which caption checking finds.

    Raises:
        UsageError: it cannot be opened, is not gzip to its end, or not of the encoding that its first bytes promise.
    """
    try:
        with open(path, "rb") as file:
            is_gzip = file.read(2) == GZIP
        with gzip.open(path) if is_gzip else open(path, "rb") as binary:
            head = binary.peek(4)[:4]
            encoding = _encoding(head)
            errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"
            with io.TextIOWrapper(binary, encoding=encoding, errors=errors, newline="") as text:
                yield text
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise table_error(path, f"not gzip to its end ({error}); unpack or download it again") from None
    except UnicodeError as error:
        raise table_error(path, f"damaged text ({error}); save it as UTF-8") from None
    except OSError as error:
        raise table_error(path, f"cannot be read ({error.strerror})") from None


def decode_text(content: bytes) -> str | None:
    """Text by its byte order mark, else UTF-8; None if it is not such text."""
    try:
        return content.decode(_encoding(content))
    except UnicodeDecodeError:
        return None


def _encoding(head: bytes) -> str:
    return next((name for mark, name in ENCODINGS if head.startswith(mark)), "utf-8-sig")


def lines_of(file: IO[str]) -> Iterator[str | None]:
    """The lines of a text; None in the place of one that is TOO_LONG."""
    while line := file.readline(MAX_CELL + 1):
        is_long = len(line) > MAX_CELL
        while is_long and line and line[-1] not in "\r\n":
            line = file.readline(MAX_CELL)
        yield None if is_long else line


def text_layout(path: Path, *, ending: str, known: Sequence[str]) -> Layout:
    """Find what separates the cells, and whether the first row is a header.

    Args:
        ending: of the table: csv, tsv or txt. known: names of columns that tell a header.

    Raises:
        UsageError: the table is empty or not text, two of its columns have one name, or its cells can be read in
            several ways.
    """
    with opened_text(path) as file:
        lines = [line for line in islice(iter(lambda: file.readline(MAX_CELL), ""), FIRST_LINES) if line.strip()]
    if not lines:
        raise table_error(path, "the table is empty")
    if re.fullmatch(r"sep=.?\s*", lines[0]):
        raise table_error(
            path, f"its first line is {escaped(lines[0].strip())}, which Excel alone reads; remove that line"
        )
    if "\0" in lines[0]:
        raise table_error(path, "its text holds zero bytes; save the table as UTF-8")
    separator = _separator(path, lines, ending=ending, known=known)
    is_quoted = _is_quoted(lines[0], separator, ending=ending)
    first = [cell.strip() for cell in next(iter(_cells(lines, separator, is_quoted=is_quoted)), [])]
    if any(_names_a_picture(path, cell) or _is_stem(path, cell) for cell in first if cell.lower() not in known):
        return Layout(tuple(str(place) for place, _ in enumerate(first, 1)), separator, is_quoted, has_header=False)
    if twice := sorted({column for column in first if first.count(column) > 1}):
        raise table_error(path, f"column {twice[0]!r} is there twice")
    return Layout(tuple(first), separator, is_quoted, has_header=True)


def text_rows(path: Path, layout: Layout) -> Iterator[Row]:
    """The rows below the header. An empty line is not a row.

    Raises:
        UsageError: a quote is not closed, or the text is damaged.
    """
    columns = layout.columns
    with opened_text(path) as file:
        rules = _rules(layout.separator, is_quoted=layout.is_quoted)
        reader = csv.reader(_csv_lines(file), strict=rules["quoting"] != csv.QUOTE_NONE, **rules)
        try:
            for cells in islice(_used(reader), layout.has_header, None):
                if len(cells) == len(columns):
                    yield dict(zip(columns, map(str.strip, cells) if layout.separator == "|" else cells, strict=True))
                else:
                    yield f"row of {len(cells)} cells under {len(columns)} columns"
        except csv.Error as error:
            cure = "a cell that starts with a quote must end with one and double those inside; or use .tsv or .jsonl"
            raise table_error(path, f"not CSV ({error}); {cure}", line=reader.line_num) from None


def _csv_lines(file: IO[str]) -> Iterator[str]:
    for line in lines_of(file):
        if line is None:
            raise csv.Error(TOO_LONG)
        yield line


def _is_quoted(first: str, separator: str, *, ending: str) -> bool:
    """Whether quotes are those of CSV (RFC 4180).

    Tabs and pipes go without quoting, where one lone quote would swallow the rows after it, unless all cells of the
    first line are quoted. Excel and pandas quote cells of .csv files also where tabs separate them.
    """
    if separator in ",;" or (separator == "\t" and ending == "csv"):
        return True
    return all(re.fullmatch(r'\s*"[^"]*"\s*', cell) for cell in first.split(separator))


def _rules(separator: str, *, is_quoted: bool) -> dict[str, Any]:
    csv.field_size_limit(MAX_CELL)
    quoting: Any = csv.QUOTE_MINIMAL if is_quoted else csv.QUOTE_NONE
    return {"delimiter": separator, "quoting": quoting, "skipinitialspace": is_quoted and separator != "\t"}


def _used(rows: Iterator[list[str]]) -> Iterator[list[str]]:
    """The rows without empty lines."""
    return (cells for cells in rows if cells and (len(cells) > 1 or cells[0].strip()))


def _cells(lines: Sequence[str], separator: str, *, is_quoted: bool) -> list[list[str]]:
    """The cells of the first lines, without the last row of several: its quotes may close further down."""
    try:
        rows = list(_used(csv.reader(lines, **_rules(separator, is_quoted=is_quoted))))
    except csv.Error:
        return []
    return rows[:-1] if len(rows) > 2 else rows


def _separator(path: Path, lines: Sequence[str], *, ending: str, known: Sequence[str]) -> str:
    """The one that splits all first rows alike, and the first row into cells that we know."""
    own = "\t" if ending == "tsv" else ","
    fitting = [separator for separator in SEPARATORS if separator in lines[0]]
    if len(fitting) <= 1:
        return (*fitting, own)[0]
    rows = {s: _cells(lines, s, is_quoted=_is_quoted(lines[0], s, ending=ending)) for s in fitting}
    regular = [separator for separator in fitting if len({len(cells) for cells in rows[separator]}) == 1] or fitting

    def tells(cell: str, separator: str) -> bool:
        is_whole = {separator}.issuperset(set(cell).intersection(fitting))
        return cell.strip().lower() in known or (is_whole and _names_a_picture(path, cell))

    telling = [s for s in regular if any(tells(cell, s) for cell in next(iter(rows[s]), []))]
    best = telling or regular
    if own in best or len(best) == 1:
        return own if own in best else best[0]
    if "\t" in best:
        return "\t"
    raise table_error(path, f"{' and '.join(map(repr, best))} could both separate its cells; save it with commas")


def _names_a_picture(path: Path, cell: str) -> bool:
    cell = cell.strip()
    return bool(cell) and (bool(PICTURE_NAME.match(cell)) or os.path.isfile(path.parent / cell))


def _is_stem(path: Path, cell: str) -> bool:
    """Whether a picture beside the table, or in a folder beside it, has this name and an ending."""
    if not cell or "/" in cell or "\0" in cell:
        return False
    with os.scandir(path.parent) as entries:
        folders = [str(path.parent), *(entry.path for entry in entries if entry.is_dir())]
    names = [f"{cell}.{ending}" for known in PICTURE_ENDINGS for ending in (known, known.upper())]
    return any(os.path.isfile(os.path.join(folder, name)) for folder in folders for name in names)


def table_error(path: Path, problem: str, *, line: int | None = None) -> UsageError:
    """The error to raise for a table that cannot be read."""
    return UsageError(f"{escaped(str(path))}{'' if line is None else f':{line}'}: {problem}")


def cells_in_words(cells: Iterable[Any]) -> str:
    """Cells or columns in a message, on one line."""
    return ", ".join(escaped(str(cell)) for cell in cells)
