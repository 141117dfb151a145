"""Tables as JSON: an object a line, one array of objects, COCO's captions, Karpathy's splits, captions by file name."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeGuard

from mlip_cli.data.sources.json_streams import streamed_array, streamed_items
from mlip_cli.data.sources.text_tables import MAX_CELL, PICTURE_NAME, TOO_LONG, Row, lines_of, opened_text, table_error

EXAMPLE_ROWS = 100
"""This many rows tell the columns."""


def json_columns(path: Path, rows: Callable[[], Iterator[Row]]) -> tuple[str, ...]:
    """The names in the first objects.

    Raises:
        UsageError: there are no objects.
    """
    examples = [row for row in islice(rows(), EXAMPLE_ROWS) if isinstance(row, dict)]
    columns = tuple(dict.fromkeys(chain.from_iterable(examples)))
    if not columns:
        raise table_error(path, "the table is empty, or not one JSON object a line")
    return columns


def json_line_rows(path: Path) -> Iterator[Row]:
    """The rows of a file with a JSON object a line.

    Raises:
        UsageError: the text is damaged.
    """
    with opened_text(path) as file:
        for line in lines_of(file):
            if line is None:
                yield TOO_LONG
            elif line.strip():
                yield _object(line)


def json_rows(path: Path) -> Iterator[Row]:
    """The rows of a file that is one JSON document, or has an object a line.

    Raises:
        UsageError: it is not JSON, or of a form that we do not know.
    """
    stat = path.stat()
    form = _form(path, stat.st_size, stat.st_mtime_ns)
    if form is None:
        yield from json_line_rows(path)
    elif not isinstance(form, str):
        yield from form
    else:
        try:
            for row in streamed_items(path, form):
                yield _listed_row(row, in_object=bool(form))
        except (ValueError, RecursionError) as error:
            raise table_error(path, f"not JSON ({error})") from None


def _listed_row(row: Any, *, in_object: bool) -> Row:
    if not isinstance(row, dict):
        return "row is not a JSON object"
    return _with_folder(row) if in_object else row


@lru_cache(maxsize=256)
def _array_of(path: Path, size: int, mtime_ns: int) -> str | None:
    return streamed_array(path)


def _form(path: Path, size: int, mtime_ns: int) -> Sequence[Row] | str | None:
    """Where the rows are: the name of an array ("" if it is the document), the rows themselves, None if in lines."""
    if _is_in_lines(path):
        return None
    name = _array_of(path, size, mtime_ns)
    return _document_rows(path, size, mtime_ns) if name is None else name


def _is_in_lines(path: Path) -> bool:
    """Whether the first line is an object by itself and others follow."""
    with opened_text(path) as file:
        lines = (line for line in iter(partial(file.readline, MAX_CELL), "") if line.strip())
        first = next(lines, "")
        return isinstance(_object(first), dict) and next(lines, None) is not None


@lru_cache(maxsize=1)
def _document_rows(path: Path, size: int, mtime_ns: int) -> Sequence[Row]:
    """The rows of a JSON document that is not streamed. It is parsed once."""
    with opened_text(path) as file:
        text = file.read()
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise table_error(path, f"not JSON ({error})") from None
    rows = _rows_of(document)
    if rows is None:
        raise table_error(
            path,
            "JSON of no known form; known are an array of objects (pandas: orient='records'), COCO's images and "
            "annotations of captions, and captions by file name",
        )
    return rows


def _rows_of(document: Any) -> list[Row] | None:
    if not isinstance(document, dict):
        return None
    images, annotations = document.get("images"), document.get("annotations")
    if _are_objects(images) and _are_objects(annotations):
        return _coco_rows(images, annotations)
    tables = [value for value in document.values() if _are_objects(value)]
    if document and all(PICTURE_NAME.match(name) for name in islice(document, EXAMPLE_ROWS)):
        return [
            {"image": name, **value} if isinstance(value, dict) else {"image": name, "caption": value}
            for name, value in document.items()
        ]
    is_row = any(isinstance(value, str) for value in document.values())  # columns hold lists or objects
    return [document] if is_row and not tables else None


def _coco_rows(images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> list[Row] | None:
    """A row for each annotation, then one for each image without any. None if the annotations are not captions."""
    if not any("caption" in annotation for annotation in annotations):
        return None
    by_id = {str(image.get("id")): image for image in images}
    bare = dict(by_id)
    rows: list[Row] = []
    for annotation in annotations:
        image_id = str(annotation.get("image_id"))
        bare.pop(image_id, None)
        image = by_id.get(image_id)
        rows.append(_merged(image, annotation) if image else f"no image of id {image_id}")
    return rows + [_merged(image, {"caption": None}) for image in bare.values()]


def _merged(image: dict[str, Any], annotation: dict[str, Any]) -> dict[str, Any]:
    return {**image, **annotation, "id": image.get("id")}


def _with_folder(row: dict[str, Any]) -> dict[str, Any]:
    """Karpathy's JSON of COCO has the folder in `filepath` and the name in `filename`."""
    folder, name = row.get("filepath"), row.get("filename")
    if isinstance(folder, str) and isinstance(name, str) and not PICTURE_NAME.match(folder):
        return {key: value for key, value in row.items() if key != "filepath"} | {
            "filename": os.path.join(folder, name)
        }
    return row


def _are_objects(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _object(line: str) -> Row:
    try:
        line.encode()
    except UnicodeEncodeError:
        return "row is not UTF-8"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return "row is not JSON"
    return row if isinstance(row, dict) else "row is not a JSON object"
