"""Tables of pictures and captions as records. Paths are relative to the table, or to the folder of its pictures."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from mlip_cli.data.download.options import is_address
from mlip_cli.data.sources.captions import captions_of
from mlip_cli.data.sources.listing import ending, is_leftover, is_picture
from mlip_cli.data.sources.lists import read_as_listed
from mlip_cli.data.sources.picture_paths import PathFinder, spellings
from mlip_cli.data.sources.records import (
    SPLIT_WORDS,
    Caption,
    Picture,
    PictureAddress,
    PictureBytes,
    PicturePlace,
    ReadOptions,
    Record,
    plain_values,
    split_in_name,
    split_of_folder,
)
from mlip_cli.data.sources.rules import RowRules, TableRules
from mlip_cli.data.sources.table_files import FIRST_NAMES, Chosen, Table, chosen_columns, open_table
from mlip_cli.data.sources.text_tables import Row, table_error
from mlip_cli.errors import UsageError
from mlip_cli.paths import escaped

LONGEST_NAME = 4_096
"""Characters of a path on Linux."""
LONGEST_SHOWN = 200


@dataclass(frozen=True)
class TablePlan:
    """A table, and how it is read."""

    name: str
    """Relative to the source."""
    table: Table
    chosen: Chosen
    folder: Path
    """What the names of pictures are relative to."""
    split: str | None
    is_list: bool = False
    """Its pictures are addresses: what else a cell says, such as the path of a file here, is not followed."""

    @cached_property
    def taken(self) -> frozenset[str]:
        """Columns that do not become `meta`."""
        return frozenset((self.chosen.image, *(column for column, _ in self.chosen.captions), "split", "class"))

    @cached_property
    def has_others(self) -> bool:
        """Whether a row may have columns besides `taken`."""
        return self.table.layout is None or not self.taken.issuperset(self.table.columns)

    def in_words(self) -> str:
        """How the table is read, for the line before the work."""
        header = "" if self.table.has_header else "; the table has no header"
        if decoded := self.table.decoded:
            header += f"; column {' and '.join(map(repr, decoded))} decoded, as My+cat%21 to My cat!"
        if self.is_list:
            return f"{self.chosen.in_words()}{header}"
        beside = "" if self.folder == self.table.path.parent else f"; pictures in {escaped(str(self.folder))}"
        return self.chosen.in_words() + beside + header


def planned_tables(
    root: Path, tables: Sequence[str], read: ReadOptions, *, pictures: Sequence[str] | None
) -> list[TablePlan]:
    """How each table is read.

    Args:
        pictures: the pictures in a source that is a folder; None where the user named the tables themselves.

    Raises:
        UsageError: a table is not of its format, no column (or more than one) can hold pictures or captions, or its
            pictures lie in several folders; or a table is not of the published list that the user named.
    """
    given = Path(read.image_folder) if read.image_folder else None
    if given and not given.is_dir():
        raise UsageError(f"--image-folder {given}: no such folder; name the folder of the pictures")
    plans = []
    for name in tables:
        table, chosen = _opened(root / name, read)
        split = split_of_folder(Path(name))[0] or (split_in_name(Path(name).name) if pictures is not None else None)
        names = _first_names(table, chosen.image)
        is_list = bool(read.preset) or sum(map(is_address, names)) * 2 > len(names)
        folder = given or (table.path.parent if is_list else _picture_folder(root, table, names, pictures))
        plans.append(TablePlan(name, table, chosen, folder, split, is_list))
    return plans


def _opened(path: Path, read: ReadOptions) -> tuple[Table, Chosen]:
    """The table, and the columns that are read: those of a published list, but for what the user names."""
    table = open_table(path)
    if not read.preset:
        return table, chosen_columns(table, read)
    table, chosen = read_as_listed(table, read.preset)
    if read.image_column or read.caption_column:
        captions = read.caption_column or ",".join(column for column, _ in chosen.captions)
        named = replace(read, image_column=read.image_column or chosen.image, caption_column=captions)
        chosen = chosen_columns(table, named)
    return table, chosen


def table_records(plans: Sequence[TablePlan], rules: RowRules | None = None) -> Iterator[Record]:
    """The rows of the tables, in order. Columns `split` and `class` mean what they say; the others become `meta`.

    Raises:
        UsageError: a table is damaged.
    """
    for plan in plans:
        finder = PathFinder(plan.folder)
        own = rules.of(plan.table, plan.chosen) if rules else None
        for number, row in enumerate(plan.table.rows()):
            yield _record(plan, finder, number, row, own)


class PictureCell(NamedTuple):
    """What a cell says about a picture; fields as in Record."""

    picture: Picture | None = None
    detail: str = ""
    same: str = ""
    found_as: str = ""
    reject: str | None = None


def _record(plan: TablePlan, finder: PathFinder, number: int, row: Row, rules: TableRules | None) -> Record:
    if isinstance(row, str):
        return Record(plan.name, number, None, (), reject=row)
    if rules and (left_out := rules.left_out(row)):
        reason, detail = left_out
        return Record(plan.name, number, None, (), reject=reason, detail=detail)
    label = row.get("class")
    cell = _picture(row.get(plan.chosen.image), None if plan.is_list else finder)
    split = plan.split
    if split is None and not isinstance(cell.picture, PictureAddress):
        split = split_of_folder(Path(cell.detail))[0]
    if row.get("split") is not None:
        word = str(row["split"]).strip()
        split = SPLIT_WORDS.get(word.lower()) or split_in_name(word)
        if split is None and not cell.reject:
            cell = PictureCell(reject="unknown split", detail=str(row["split"]))
    captions = _captions(row, plan.chosen)
    return Record(
        file=plan.name,
        row=number,
        captions=rules.captions(row, captions) if rules else captions,
        split=split,
        label=None if label is None else str(label),
        meta=plain_values(row, without=plan.taken) if plan.has_others else {},
        picture=cell.picture,
        detail=cell.detail,
        same=cell.same,
        found_as=cell.found_as,
        reject=cell.reject,
    )


def _captions(row: dict[str, Any], chosen: Chosen) -> tuple[Caption, ...]:
    if len(chosen.captions) == 1:
        return captions_of(row.get(chosen.captions[0][0]))
    return tuple(
        caption if weight == 1 else replace(caption, weight=caption.weight * weight)
        for column, weight in chosen.captions
        for caption in captions_of(row.get(column))
    )


def _picture(cell: Any, finder: PathFinder | None) -> PictureCell:
    """The picture of a cell: bytes, {bytes, path}, an address, or the name of a file, if there is a finder."""
    if is_address(cell):
        address = cell.strip()
        return PictureCell(PictureAddress(address), address, address)
    if isinstance(cell, list) and len(cell) == 1:
        cell = cell[0]
    content, name = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, cell)
    if isinstance(content, bytes):
        detail = name if isinstance(name, str) else ""
        return PictureCell(PictureBytes(content), detail, blake2b(content, digest_size=16).hexdigest())
    if isinstance(cell, list) and cell:
        return PictureCell(reject="several pictures")
    if not (name := _name(name)):
        return PictureCell(reject="no file name")
    if is_address(name):
        return PictureCell(PictureAddress(name), name, name)
    if finder is None:
        return PictureCell(reject="no http(s) address", detail=name[:LONGEST_NAME])
    found = finder.find(name)
    if found.path:
        found_as = os.path.basename(found.path) if found.is_guess else ""
        return PictureCell(PicturePlace(found.path), name, finder.same(found.path), found_as)
    if "://" in name and not name.startswith("file:"):
        cure = "only http and https are downloaded"
        return PictureCell(reject="picture is an address", detail=f"{name[:LONGEST_SHOWN]}: {cure}")
    near = f"; {found.near}" if found.near else ""
    if len(name) > LONGEST_NAME:  # a picture in base64, perhaps
        return PictureCell(reject="no file name", detail=f"{name[:60]}... of {len(name):,} characters")
    return PictureCell(reject="picture missing", detail=f"{name}: no such file{near}")


def _first_names(table: Table, image: str) -> list[str]:
    """What the first rows name as their pictures."""
    names = []
    for row in islice(table.rows(), FIRST_NAMES):
        cell = row.get(image) if isinstance(row, dict) else None
        name = cell.get("path") if isinstance(cell, dict) and cell.get("bytes") is None else cell
        names.append(_name(name))
    return list(filter(None, names))


def _name(cell: Any) -> str:
    """What a cell calls a picture: a text, or the number of an id, as it would stand in a CSV; "" if it is neither."""
    is_id = isinstance(cell, int) and not isinstance(cell, bool)
    return cell.strip() if isinstance(cell, str) else str(cell) if is_id else ""


def _picture_folder(root: Path, table: Table, names: Sequence[str], pictures: Sequence[str] | None) -> Path:
    """The folder that the first names are relative to: that of the table, or the one in the source where they lie.

    Raises:
        UsageError: there are several.
    """
    here = PathFinder(table.path.parent)
    if not names or any(here.find(name).path for name in names):
        return table.path.parent
    if pictures is None:
        root, pictures = table.path.parent, _pictures_below(table.path.parent)
    for name in names:
        base = list(spellings(name))[-1].lower()
        ends = tuple({base, *(base + "." + ending(picture) for picture in pictures[:FIRST_NAMES])})
        folders = {
            picture[: len(picture) - len(end)].rstrip("/")
            for picture in pictures
            for end in ends
            if picture.lower().endswith("/" + end)
        }
        fitting = sorted(folder for folder in folders if _has_most(root / folder, names))
        if len(fitting) > 1:
            raise table_error(
                table.path,
                f"its pictures could lie in {' and '.join(map(escaped, fitting[:3]))}; say --image-folder FOLDER",
            )
        if fitting:
            return root / fitting[0]
    return table.path.parent


def _has_most(folder: Path, names: Sequence[str]) -> bool:
    finder = PathFinder(folder)
    return sum(bool(finder.find(name).path) for name in names) * 2 > len(names)


def _pictures_below(folder: Path) -> list[str]:
    """The pictures in the folders that lie in this one."""
    folders = [entry.name for entry in os.scandir(folder) if not is_leftover(entry.name) and entry.is_dir()]
    return [f"{name}/{file}" for name in sorted(folders) for file in os.listdir(folder / name) if is_picture(file)]
