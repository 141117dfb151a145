"""Tables in columns: Parquet and Arrow, with the pictures inside them or beside them."""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mlip_cli.data.sources.text_tables import Row, table_error

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 4_096
BATCH_PICTURES = 64
"""Rows that are held at once where pictures lie in the table."""
FIRST_CELLS = 20
"""This many cells tell whether a column of bytes holds text, pictures or something else."""
PICTURE_START = re.compile(rb"\xff\xd8|\x89PNG|GIF8|RIFF|BM|II[*+]|MM\0[*+]|.{4}(ftyp|jP  |JXL )|\xff\x0a", re.DOTALL)
"""First bytes of pictures: JPEG, PNG, GIF, WebP, BMP, TIFF; AVIF and HEIC, JPEG 2000, JPEG XL, which are not read."""
ARROW_FILE = b"ARROW1"
"""First bytes of Arrow's file format. Its stream format, in which `datasets` saves, has none."""


def columnar_schema(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(all columns, those whose cells hold encoded pictures).

    Raises:
        UsageError: the file is neither Parquet nor Arrow.
    """
    with _opened(path) as (schema, batches):
        holding = [field.name for field in schema if _holds_bytes(field.type)]
        cells = _first_bytes(next(batches, None)) if holding else {}
        return tuple(schema.names), tuple(name for name in holding if _may_hold_pictures(cells.get(name)))


def columnar_rows(path: Path) -> Iterator[Row]:
    """The rows. Text that is not UTF-8 becomes lone surrogates, as in CSV; times become text, of UTC.

    Columns of bytes are text where their first cells hold text: some programs write no other kind of column.

    Raises:
        UsageError: the file is damaged.
    """
    import pyarrow as pa

    are_text: dict[str, bool] = {}
    with _opened(path) as (_, batches):
        for batch in batches:
            found = _first_bytes(batch, known=are_text)
            are_text |= {name: all(map(_is_text, cells)) for name, cells in found.items() if cells}
            columns = {}
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                if are_text.get(name, name in found):  # one without content so far may be text
                    columns[name] = [_text(value) for value in column.to_pylist()]
                elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                    binary = pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()
                    columns[name] = [_text(value) for value in column.view(binary).to_pylist()]
                elif pa.types.is_timestamp(column.type):  # Python's own times have fewer years and no nanoseconds
                    columns[name] = column.cast(pa.timestamp(column.type.unit)).cast(pa.string()).to_pylist()
                else:
                    columns[name] = column.to_pylist()
            for cells in zip(*columns.values(), strict=True):
                yield dict(zip(columns, cells, strict=True))


@contextmanager
def _opened(path: Path) -> Iterator[tuple["pa.Schema", Iterator["pa.RecordBatch"]]]:
    """The schema and the rows of a file. What pyarrow raises on a file that it cannot read becomes a UsageError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    is_parquet = path.suffix.lower() == ".parquet"
    opener: Any = pq.ParquetFile if is_parquet else partial(open, mode="rb")
    try:
        with opener(path) as file:
            if is_parquet:
                has_pictures = any(_holds_bytes(field.type) for field in file.schema_arrow)
                size = BATCH_PICTURES if has_pictures else BATCH_ROWS
                groups = range(file.num_row_groups)  # one after the other: else pyarrow keeps what it has read
                yield file.schema_arrow, (b for group in groups for b in file.iter_batches(size, row_groups=[group]))
            else:
                yield _arrow_batches(file)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise table_error(path, f"not {'a Parquet' if is_parquet else 'an Arrow'} file ({reason})") from None


def _arrow_batches(file: IO[bytes]) -> tuple["pa.Schema", Iterator["pa.RecordBatch"]]:
    import pyarrow.ipc

    is_file = file.read(len(ARROW_FILE)) == ARROW_FILE
    file.seek(0)
    reader = pyarrow.ipc.open_file(file) if is_file else pyarrow.ipc.open_stream(file)
    whole = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
    return reader.schema, (
        batch.slice(start, BATCH_PICTURES) for batch in whole for start in range(0, batch.num_rows, BATCH_PICTURES)
    )


def _holds_bytes(kind: "pa.DataType") -> bool:
    """Bytes, or what `datasets` calls an image: {bytes, path}; or a list of them."""
    import pyarrow as pa

    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _holds_bytes(kind.field(place).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _first_bytes(batch: "pa.RecordBatch | None", *, known: Collection[str] = ()) -> dict[str, list[bytes]]:
    """The first cells of the columns of bytes that are not known; cells without content are left out."""
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = [] if batch is None else zip(batch.schema.names, batch.columns, strict=True)
    return {
        name: column.filter(pc.greater(pc.binary_length(column), 0)).slice(0, FIRST_CELLS).to_pylist()
        for name, column in columns
        if name not in known and (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type))
    }


def _may_hold_pictures(cells: list[bytes] | None) -> bool:
    """Whether one of the first cells of a column begins like a picture; nothing is told by other kinds of columns."""
    return not cells or any(map(PICTURE_START.match, cells))


def _is_text(cell: bytes) -> bool:
    """Whether bytes are UTF-8 without a zero byte, as no picture is that mlip reads."""
    try:
        return b"\0" not in cell and bool(cell.decode())
    except UnicodeDecodeError:
        return False


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "surrogateescape")
