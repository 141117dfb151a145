"""Published lists of pictures by address: their columns, sizes, origins and licences, by the word of --preset."""

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from urllib.parse import unquote_plus

from mlip_cli.data.download.options import is_address
from mlip_cli.data.sources.listing import table_ending
from mlip_cli.data.sources.table_files import FIRST_NAMES, Chosen, Table, match_column
from mlip_cli.data.sources.text_tables import Row, cells_in_words, table_error, text_rows
from mlip_cli.errors import UsageError

FIRST_TEXTS = 200
"""This many rows tell whether texts are encoded."""
ENCODED = re.compile(r"\+|%[0-9A-Fa-f]{2}")
LEAST_SHARE, MOST_SHARE = 0.5, 1.1
"""A list with less or more of the published rows than these shares is worth a warning."""


@dataclass(frozen=True)
class PublishedList:
    """A list as its authors published it. Columns are matched without regard to case."""

    title: str
    file: str
    """Name of the published file, or a pattern of several."""
    endings: tuple[str, ...]
    """Of the tables that a folder of the list holds, as `table_ending` gives them."""
    image: tuple[str, ...]
    """Columns of addresses in the releases; the first that a table has is read."""
    captions: tuple[tuple[str, ...], ...]
    """Columns of captions in the releases; the first group of which a table has all is read."""
    headless: tuple[str, ...] = ()
    """The columns of the release whose tables have no header."""
    encoded: tuple[str, ...] = ()
    """Columns whose texts the release has as an address would: `My+cat%21`."""
    sizes: tuple[int, ...] = ()
    """Published numbers of rows, exact or rounded, where there are such."""
    licence: str = ""

    def form_in_words(self) -> str:
        """The columns that the list has, for an error."""
        captions = " or ".join(" and ".join(map(repr, group)) for group in self.captions)
        bare = f"; without a header the columns are {', '.join(self.headless)}" if self.headless else ""
        return f"addresses in {' or '.join(map(repr, self.image))} and captions in {captions}{bare}"


_GOOGLE = "free for any purpose, as is; Google asks to be acknowledged as the source; each picture has its own owner"
_CC_BY = "list: CC BY 4.0; each picture has its own owner"
_FLICKR = "each picture under the Creative Commons licence that its owner chose on Flickr"

LISTS = {
    "cc3m": PublishedList(
        "Conceptual Captions 3M (Google)",
        "Train_GCC-training.tsv",
        ("tsv", "csv", "parquet"),
        image=("url", "image_url"),
        captions=(("caption",), ("text",)),
        headless=("caption", "url"),
        sizes=(3_318_333,),
        licence=_GOOGLE,
    ),
    "cc12m": PublishedList(
        "Conceptual 12M (Google)",
        "cc12m.tsv",
        ("tsv", "csv", "jsonl", "parquet"),
        image=("url", "image_url"),
        captions=(("caption",), ("text",)),
        headless=("url", "caption"),
        sizes=(12_423_374,),
        licence=_GOOGLE,
    ),
    "yfcc15m_v1": PublishedList(
        "YFCC15M v1 (OpenAI's list, joined with the texts of YFCC100M)",
        "yfcc15m.csv",
        ("csv", "tsv", "jsonl", "parquet"),
        image=("downloadurl", "download_url", "image_url", "photo_url", "url"),
        captions=(("caption",), ("text",), ("title_clean", "description_clean"), ("title", "description"), ("title",)),
        encoded=("title", "description"),  # as YFCC100M has them; title_clean and description_clean are decoded
        sizes=(14_829_396,),
        licence=_FLICKR,
    ),
    "yfcc15m_v2": PublishedList(
        "YFCC15M v2 (DeCLIP's list)",
        "yfcc15m_clean_open_data.json",
        ("json", "jsonl", "csv", "tsv", "parquet"),
        image=("url", "image_url"),
        captions=(("caption",), ("text",)),
        sizes=(15_400_000,),
        licence=_FLICKR,
    ),
    "redcaps": PublishedList(
        "RedCaps (University of Michigan)",
        "annotations",
        ("json",),
        image=("url", "image_url"),
        captions=(("caption",), ("raw_caption",)),
        sizes=(12_000_000,),
        licence="list: CC BY 4.0, for research that is not commercial, under Reddit's terms; each picture has its own "
        "owner",
    ),
    "datacomp": PublishedList(
        "DataComp's CommonPool (mlfoundations)",
        "metadata",
        ("parquet",),
        image=("url",),
        captions=(("text",),),
        sizes=(12_800_000, 128_000_000, 1_280_000_000, 12_800_000_000),
        licence=_CC_BY,
    ),
    "laion": PublishedList(
        "LAION (LAION-400M, LAION-5B, Re-LAION)",
        "part-*.parquet",
        ("parquet",),
        image=("URL", "image_url"),
        captions=(("TEXT",), ("caption",)),
        licence="list: CC BY 4.0 (LAION-400M and LAION-5B); each picture has its own owner",
    ),
    "coyo": PublishedList(
        "COYO-700M (Kakao Brain)",
        "part-*.parquet",
        ("parquet",),
        image=("url",),
        captions=(("text",),),
        sizes=(746_972_269,),
        licence=_CC_BY,
    ),
}


def published_list(preset: str) -> PublishedList:
    """The list of this word.

    Raises:
        UsageError: there is none.
    """
    if preset not in LISTS:
        *words, last = LISTS
        raise UsageError(f"--preset {preset}: no such list; known are {', '.join(words)} and {last}")
    return LISTS[preset]


def listed_tables(names: Sequence[str], preset: str) -> list[str]:
    """The tables of a folder that can be of this list."""
    return [name for name in names if table_ending(name) in published_list(preset).endings]


def read_as_listed(table: Table, preset: str) -> tuple[Table, Chosen]:
    """The table with the names of its columns, and those that hold addresses and captions.

    Raises:
        UsageError: its columns are not those of the list.
    """
    known = published_list(preset)
    chosen = _chosen(table, known)
    if chosen is None and known.headless and table.layout and len(table.columns) == len(known.headless):
        layout = replace(table.layout, columns=known.headless, has_header=False)
        rows = partial(text_rows, table.path, layout)
        table = replace(table, columns=known.headless, layout=layout, rows=rows)
        chosen = _chosen(table, known)
    if chosen is None:
        raise _unlike(table, preset, f"columns {cells_in_words(table.columns)}")
    if problem := _no_addresses(table, chosen):
        raise _unlike(table, preset, problem)
    encoded = tuple(column for column in table.columns if column.strip().lower() in known.encoded)
    if encoded and _are_encoded(table, encoded):
        table = replace(table, rows=partial(_decoded_rows, table.rows, encoded), decoded=encoded)
    return table, chosen


def _are_encoded(table: Table, columns: Sequence[str]) -> bool:
    """Whether the first texts of columns are written as in an address: without a space, and some with `+` or `%21`.

    Of all columns together, since those of one can be names of files, as IMG_0520, for hundreds of rows.
    """
    rows = (row for row in islice(table.rows(), FIRST_TEXTS) if isinstance(row, dict))
    texts = [text for row in rows for column in columns if isinstance(text := row.get(column), str)]
    return not any(" " in text.strip() for text in texts) and any(map(ENCODED.search, texts))


def _decoded_rows(rows: Callable[[], Iterator[Row]], columns: Sequence[str]) -> Iterator[Row]:
    for row in rows():
        if isinstance(row, dict):
            texts = {column: text for column in columns if isinstance(text := row.get(column), str)}
            row = row | {column: unquote_plus(text, errors="surrogateescape") for column, text in texts.items()}
        yield row


def _chosen(table: Table, known: PublishedList) -> Chosen | None:
    image = next(filter(None, (match_column(table.columns, name) for name in known.image)), None)
    for group in known.captions:
        columns = [match_column(table.columns, name) for name in group]
        if image and all(columns):
            return Chosen(image, tuple((column, 1.0) for column in columns if column))
    return None


def _no_addresses(table: Table, chosen: Chosen) -> str:
    """What the first rows hold where addresses are due; empty if there is one."""
    cells = [row.get(chosen.image) for row in islice(table.rows(), FIRST_NAMES) if isinstance(row, dict)]
    if not cells or any(map(is_address, cells)):
        return ""
    return f"no http(s) address in column {chosen.image!r} of the first rows, but {cells_in_words(cells[:1])[:80]}"


def _unlike(table: Table, preset: str, found: str) -> UsageError:
    expected = LISTS[preset].form_in_words()
    return table_error(
        table.path, f"--preset {preset}: found {found}; that list has {expected}; see --image-column without a preset"
    )


def odd_size(preset: str, num_rows: int) -> str | None:
    """A warning where a list has far fewer or more rows than were published."""
    sizes = published_list(preset).sizes
    if not sizes or any(LEAST_SHARE <= num_rows / size <= MOST_SHARE for size in sizes):
        return None
    return f"--preset {preset}: {num_rows:,} rows; published were {' or '.join(f'{size:,}' for size in sizes)}"


def prepare_command(name: str, out: Path) -> str | None:
    """The line that prepares the published list of this name in `out`, for messages; None if no list is called so."""
    return shlex.join(["mlip", "prepare-data", LISTS[name].file, str(out), "--preset", name]) if name in LISTS else None
