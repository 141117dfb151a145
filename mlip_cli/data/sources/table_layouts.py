"""Which files of a folder are its table, or the tables of its splits and shards."""

import mmap
import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from mlip_cli.data.sources.file_names import FileNames
from mlip_cli.data.sources.listing import is_picture, is_table, table_ending
from mlip_cli.data.sources.lists import listed_tables
from mlip_cli.data.sources.records import SPLIT_WORDS, ReadOptions, split_in_name, split_of_folder
from mlip_cli.data.sources.table_files import (
    CAPTION_COLUMNS,
    FIRST_NAMES,
    Table,
    chosen_columns,
    holds_addresses,
    open_table,
)
from mlip_cli.data.sources.text_tables import PICTURE_NAME
from mlip_cli.errors import UsageError
from mlip_cli.paths import escaped

MOST_LEVELS = 3
"""A table is looked for in a folder and so many levels below it, its own name included."""
MOST_TEXTS = 50
"""More texts or JSON files than these are not looked at, since each would be opened."""
NO_TABLES = re.compile(
    r"(dataset_infos?|state|dataset_dict|dataset|sizes|prepared|package)\.json|cache-.*\.arrow|rejects\.parquet"
)
"""Files that other programs and mlip write beside data."""
JSON_CAPTION = re.compile(
    rb'"(%s|\w*caption|[^"]*\.(jpe?g|png|webp))"\s*:' % "|".join(chain.from_iterable(CAPTION_COLUMNS)).encode()
)
SHARD = re.compile(r"(^|[-_.])(\d+-of-\d+|\d{3,})$")
SPLIT_AND_YEAR = re.compile(rf"(?<![a-z])({'|'.join(SPLIT_WORDS)})(\d{{2,4}})?(?![a-z])")


class TablePlace(NamedTuple):
    """What the name of a table says."""

    folder: str
    """The folder of the table, without that of a split."""
    series: str
    """The name of the table without split and number."""
    split: str | None
    shard: str


def found_tables(root: Path, names: FileNames, read: ReadOptions) -> tuple[list[str], dict[str, str]]:
    """The tables of a folder, and why others are not read: metadata.*, or all that name pictures and captions.

    A folder with tars has no other table than metadata.*: those of img2dataset lie beside its tars.
    """
    tables = names.where(lambda name: is_table(name) and not NO_TABLES.fullmatch(name.rpartition("/")[2]))
    if read.preset:
        return listed_tables(tables, read.preset), {}
    if metadata := [name for name in tables if is_metadata(name)]:
        return metadata, {}
    if any(name.endswith(".tar") for name in names):
        return [], {}
    opened, num_texts = [], 0
    for place, name in zip(tables.places, tables, strict=True):
        is_text = table_ending(name) in ("txt", "json")
        if name.count("/") >= MOST_LEVELS or (is_text and num_texts > MOST_TEXTS):
            continue
        if not _is_beside_picture(names, place):
            num_texts += is_text
            opened.append(name)
    if num_texts > MOST_TEXTS:
        opened = [name for name in opened if table_ending(name) not in ("txt", "json")]
    has_pictures = any(map(is_picture, names))
    problems = {name: _problem(root / name, read, has_pictures=has_pictures) for name in opened}
    return [name for name, problem in problems.items() if problem == ""], {k: v for k, v in problems.items() if v}


def _is_beside_picture(names: FileNames, place: int) -> bool:
    """Whether a picture has the name of a table but for its ending."""
    stem = names[place].removesuffix(".gz").rpartition(".")[0]
    return any(is_picture(name) and name.rpartition(".")[0] == stem for name in names.beside(place, f"{stem}."))


def wrapped_in(names: Sequence[str]) -> str:
    """The folders that hold everything, but for that of a split: `a/b`, or nothing. The names are sorted."""
    if not names:
        return ""
    shared: list[str] = []
    for first, last in zip(names[0].split("/")[:-1], names[len(names) - 1].split("/")[:-1], strict=False):
        if first.lower() in SPLIT_WORDS or first != last:
            break
        shared.append(first)
    return "/".join(shared)


def check_tables(source: str, tables: Sequence[str]) -> None:
    """Several tables are one data set where they are its splits or its numbered shards.

    Raises:
        UsageError: they are not.
    """
    places = [table_place(name) for name in tables]
    series = {(place.folder, place.series) for place in places}
    if len(series) == 1 and len(set(places)) == len(places) and not _mixed(places):
        return
    if len(tables) > 1:
        names = ", ".join(map(escaped, tables))
        folders = {str(PurePosixPath(name).parent) for name in tables}
        if "." in folders and len(folders) > 1:
            raise UsageError(f"{source}: a table here and others in folders: {names}; name one as SOURCE")
        raise UsageError(f"{source}: several tables: {names}; name one of them as SOURCE")


def missing_shards(tables: Sequence[str]) -> str:
    """`1 of 2 shards of train are here`, by the numbers in their names; empty where all are."""
    found = Counter(
        (place.split, int(place.shard.rpartition("-of-")[2]))
        for place in map(table_place, tables)
        if "-of-" in place.shard
    )
    return ", ".join(
        f"{n} of {total} shards{f' of {split}' if split else ''} are here"
        for (split, total), n in found.items()
        if n < total
    )


def table_place(name: str) -> TablePlace:
    """`data/train-00000-of-00002.parquet` -> data, .parquet, train, 00000-of-00002."""
    split, relative = split_of_folder(Path(name))
    base = relative.name.lower().removesuffix(".gz")
    ending = table_ending(base)
    stem = base.removesuffix(f".{ending}")
    shard = SHARD.search(stem)
    stem = SHARD.sub("", stem)
    own = SPLIT_AND_YEAR.search(stem)
    if own and not split and split_in_name(base):
        split, stem = SPLIT_WORDS[own[1]], SPLIT_AND_YEAR.sub("", stem)
    return TablePlace(str(relative.parent), f"{stem.strip('-_. ')}.{ending}", split, shard[2] if shard else "")


def _mixed(places: Sequence[TablePlace]) -> bool:
    """A table of no split among those of splits, or a whole one among shards."""
    return len({place.split is None for place in places}) > 1 or len({place.shard == "" for place in places}) > 1


def is_metadata(name: str) -> bool:
    """metadata.* in the source's root or in the folder of a split."""
    folder, _, base = name.rpartition("/")
    is_at_root = not folder or folder.lower() in SPLIT_WORDS
    return is_at_root and base.removesuffix(".gz").rpartition(".")[0] == "metadata"


def _problem(path: Path, read: ReadOptions, *, has_pictures: bool) -> str | None:
    """Why a table is not read: "" if it can be read, None if the file is not a table.

    Beside pictures a table of addresses tells where they are from, and is no list to download.
    """
    ending = table_ending(path.name)
    if ending == "json" and path.suffix != ".gz" and not _mentions_captions(path):
        return None
    is_any_text = ending in ("txt", "json")
    try:
        table = open_table(path)
        is_any_text = is_any_text and not _names_pictures(table)
        if not table.has_header and not _names_pictures(table):
            return None
        chosen = chosen_columns(table, read)
        if has_pictures and not read.image_column and holds_addresses(chosen.image):
            return f"column {chosen.image!r} holds addresses, and pictures are here; say --image-column {chosen.image}"
    except UsageError as error:
        return None if is_any_text else str(error).removeprefix(f"{escaped(str(path))}: ")
    return ""


def _names_pictures(table: Table) -> bool:
    """Whether most of the first rows have several cells, and one of them is a picture's name."""
    rows = list(islice(table.rows(), FIRST_NAMES))
    cells = [list(row.values()) for row in rows if isinstance(row, dict) and len(row) > 1]
    named = sum(any(PICTURE_NAME.fullmatch(str(cell).strip()) for cell in row) for row in cells)
    return named * 2 > len(rows)


def _mentions_captions(path: Path) -> bool:
    """Whether a JSON file has a caption's name in it: to parse those of object detection takes minutes."""
    if not path.stat().st_size:
        return False
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return JSON_CAPTION.search(content) is not None
