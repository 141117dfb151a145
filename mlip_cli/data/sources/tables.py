"""Tables of pictures and captions: metadata.csv, .tsv, .jsonl, .parquet; paths are relative to the table."""

import csv
import json
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from mlip_cli.data.sources.records import (
    SPLIT_WORDS,
    PicturePlace,
    ReadOptions,
    Record,
    captions_of,
    plain_values,
    split_of_folder,
)
from mlip_cli.errors import UsageError

IMAGE_COLUMNS = ("file_name", "image", "image_path", "filepath", "path")
CAPTION_COLUMNS = ("caption", "captions", "text", "title")
MAX_CELL = 1 << 24

Row = dict[str, Any] | str
"""Cells by column, or the reason why the row cannot be read."""


def table_records(root: Path, tables: Sequence[str], read: ReadOptions) -> Iterator[Record]:
    """The rows of the tables, in order. Columns `split` and `class` mean what they say; the others become `meta`.

    Raises:
        UsageError: a table is not of its format, or no column (or more than one) can hold pictures or captions.
    """
    for table in tables:
        path = root / table
        columns, rows = _read_table(path)
        image, caption = _chosen(path, columns, read)
        for number, row in enumerate(rows):
            if isinstance(row, str):
                yield Record(table, number, None, (), reject=row)
            else:
                yield _record(path, table, number, row, image=image, caption=caption)


def columns_in_words(root: Path, tables: Sequence[str], read: ReadOptions) -> str:
    """The columns that hold pictures and captions, named by the user or guessed.

    Raises:
        UsageError: as `table_records`.
    """
    found = {_chosen(root / table, _read_table(root / table)[0], read) for table in tables}
    return "; ".join(f"pictures: column {image!r}, captions: column {caption!r}" for image, caption in sorted(found))


def _chosen(path: Path, columns: Sequence[str], read: ReadOptions) -> tuple[str, str]:
    image = read.image_column or _guessed(path, "image", IMAGE_COLUMNS, columns)
    caption = read.caption_column or _guessed(path, "caption", CAPTION_COLUMNS, columns)
    for flag, column in (("image", image), ("caption", caption)):
        if column not in columns:
            raise UsageError(f"{path}: no column {column!r} (--{flag}-column); columns are {', '.join(columns)}")
    return image, caption


def _record(path: Path, table: str, number: int, row: dict[str, Any], *, image: str, caption: str) -> Record:
    split, _ = split_of_folder(Path(table))
    name, reason = row.get(image), None
    if row.get("split") is not None:
        split = SPLIT_WORDS.get(str(row["split"]).strip().lower())
        reason = None if split else "unknown split"
    if not (isinstance(name, str) and name.strip()):
        reason, name = "no file name", ""
    label = row.get("class")
    return Record(
        file=table,
        row=number,
        picture=PicturePlace(str(path.parent / name.strip())),
        captions=captions_of(row.get(caption)),
        split=split,
        label=None if label is None else str(label),
        meta=plain_values(row, without=(image, caption, "split", "class")),
        reject=reason,
        detail=str(row["split"]) if reason == "unknown split" else name.strip(),
    )


def _guessed(path: Path, what: str, candidates: Sequence[str], columns: Sequence[str]) -> str:
    found = [column for column in columns if column.lower() in candidates]
    if len(found) == 1:
        return found[0]
    problem = f"columns {' and '.join(found)} could both be the {what}" if found else f"no column for the {what}"
    raise UsageError(f"{path}: {problem}; columns are {', '.join(columns)}; say --{what}-column NAME")


def _read_table(path: Path) -> tuple[list[str], Iterator[Row]]:
    """Names of the columns, and the rows."""
    if path.suffix.lower() == ".jsonl":
        examples = [row for row in islice(_jsonl_rows(path), 100) if isinstance(row, dict)]
        columns = list(dict.fromkeys(chain.from_iterable(examples)))
        if not columns:
            raise UsageError(f"{path}: the table is empty, or not one JSON object a line")
        return columns, _jsonl_rows(path)
    rows = _parquet_rows(path) if path.suffix.lower() == ".parquet" else _csv_rows(path)
    return list(next(rows)), rows


def _csv_rows(path: Path) -> Iterator[Row]:
    """The header as a dict of None, then the rows.

    CSV by RFC 4180; TSV without quoting, where one lone quote would swallow the rows after it. Bytes that are not UTF-8
    become lone surrogates, which caption checking finds.
    """
    csv.field_size_limit(MAX_CELL)
    rules: dict[str, Any] = {"strict": True}
    if path.suffix.lower() == ".tsv":
        rules = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, **rules)
        try:
            columns = [column.strip() for column in next(reader, [])]
            if not columns:
                raise UsageError(f"{path}: the table is empty")
            if twice := sorted({column for column in columns if columns.count(column) > 1}):
                raise UsageError(f"{path}: column {twice[0]!r} is there twice")
            yield dict.fromkeys(columns)
            for cells in reader:
                if len(cells) == len(columns):
                    yield dict(zip(columns, cells, strict=True))
                elif cells:  # an empty line is no row
                    yield f"row of {len(cells)} cells under {len(columns)} columns"
        except csv.Error as error:
            cure = "a cell that starts with a quote must end with one and double those inside; or use .tsv or .jsonl"
            raise UsageError(f"{path}:{reader.line_num}: not CSV ({error}); {cure}") from None


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with open(path, "rb") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                yield "row is not UTF-8"
            except (json.JSONDecodeError, RecursionError):
                yield "row is not JSON"
            else:
                yield row if isinstance(row, dict) else "row is not a JSON object"


def _parquet_rows(path: Path) -> Iterator[Row]:
    """The columns as a dict of None, then the rows. Text that is not UTF-8 becomes lone surrogates, as in CSV."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        yield dict.fromkeys(file.schema_arrow.names)
        for batch in file.iter_batches():
            columns = {}
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                    binary = pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()
                    columns[name] = [_text(value) for value in column.view(binary).to_pylist()]
                else:
                    columns[name] = column.to_pylist()
            for cells in zip(*columns.values(), strict=True):
                yield dict(zip(columns, cells, strict=True))
    except pa.ArrowInvalid as error:
        raise UsageError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "surrogateescape")
