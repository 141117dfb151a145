"""Records: the rows of a source, with the place of a picture and its captions. Nothing here reads a picture."""

import json
import math
import operator
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from mlip_cli.paths import encodable

MAX_CAPTION_BYTES = 64 * 1024
MAX_TEXT_BYTES = 1 << 20
"""A longer text beside a picture is not read."""
MAX_CAPTIONS = 255
"""A sample keeps the first of more captions: the index counts them in a byte."""
PART_ROWS = 500
PART_BYTES = 64 << 20
"""A part ends here where its records carry the bytes of their pictures: each worker holds one."""
ADD = "add:"
LEFT_OUT, NOT_IN_UIDS = "left out by --where", "not in --uids"
WISHED = frozenset((LEFT_OUT, NOT_IN_UIDS))
"""Reasons of rejects that the user asked for: however many there are, the source is as it should be."""
MAX_HELD_OUT = 5_000
ENOUGH_HELD_OUT = 500

DAMAGED = REFUSE, USE_START = "refuse", "use-start"
"""A damaged tar ends the work, or the samples before its damage are used."""

SPLITS = ("train", "validation", "test", "combinations")
"""The last one is of the built-in source alone."""
NO_SPLIT = 255
"""In a table, in the place of a number of SPLITS: the source says no split."""
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "restval": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
"""Names of splits in sources -> one of SPLITS."""
BESIDE_SPLITS = re.compile("ilsvrc|imgs?|images?|pictures?|photos?|data|dataset|set|split|folder|seg|large|small|px")
"""Words that stand beside a split in the name of its folder: ILSVRC2012_img_val, test_set, train_large."""


@dataclass(frozen=True)
class Caption:
    """A text for a picture; `weight` is relative to the picture's other captions."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class PicturePlace:
    """Where the encoded bytes of a picture lie: a whole file, or `size` bytes of one from `offset` on."""

    path: str
    offset: int = 0
    size: int | None = None
    is_compressed: bool = False
    """`offset` counts the bytes that come out of a compressed file."""


@dataclass(frozen=True)
class PictureBytes:
    """The encoded bytes of a picture that lies in a table."""

    content: bytes


@dataclass(frozen=True)
class PictureAddress:
    """A picture that is downloaded."""

    url: str


Picture = PicturePlace | PictureBytes | PictureAddress


@dataclass(slots=True)
class Record:
    """A row of the source. It becomes a sample or a line in rejects.parquet.

    Nobody changes one; it is not frozen because that takes a third of the time of reading a list of millions.
    """

    file: str
    """File that holds the row, relative to the source."""
    row: int
    """Place of the row in that file, from 0."""
    picture: Picture | None
    captions: tuple[Caption, ...]
    split: str | None = None
    label: str | None = None
    """Class of the picture, `class` in KEY.json."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    reject: str | None = None
    """Reason why the row cannot become a sample, if that is known without its picture."""
    detail: str = ""
    """What the reason is about: a file name, a value."""
    same: str = ""
    """Equal for rows that name the same picture, which become one record; empty where each row has its own."""
    found_as: str = ""
    """File that was found by another spelling of its name."""
    num_rows: int = 1
    """Rows of the source that became this record."""


@dataclass(frozen=True)
class ReadOptions:
    """Which rows of the source to read, and which columns of a table hold them."""

    limit: int | None = None
    image_column: str | None = None
    caption_column: str | None = None
    image_folder: str | None = None
    """What paths in a table are relative to."""
    damaged: str = REFUSE
    """One of DAMAGED: what is done about a damaged tar."""
    preset: str | None = None
    """A published list, by its word in lists.py."""
    where: str | None = None
    """Condition on the columns of a row (where.py)."""
    uids: str | None = None
    """File of the ids of the rows to read."""
    captions_from: str | None = None
    """File of captions that take the place of a row's own, or add to them (add:FILE)."""

    def in_request(self) -> dict[str, Any]:
        """The options as prepared.json holds them. Those that are younger than the file are left out if not given."""
        younger = ("damaged", "preset", "where", "uids", "captions_from")
        return {
            name: value
            for name, value in vars(self).items()
            if name not in younger or value != getattr(ReadOptions, name)
        }


@dataclass(frozen=True)
class SourcePart:
    """Consecutive rows of the source, or such that are tried again. Workers prepare whole parts.

    An interrupted run keeps them.
    """

    number: int
    first_row: int
    """Place of the first record in the whole source."""
    records: tuple[Record, ...]
    places: tuple[int, ...] = ()
    """Of all records in the whole source, where they do not follow each other."""

    def place(self, position: int) -> int:
        """Place in the whole source of a record; in nine digits it is the key."""
        return self.places[position] if self.places else self.first_row + position


def parts_of(records: Iterable[Record]) -> Iterator[SourcePart]:
    """Cut a source into parts. Their size does not depend on the number of workers, so the output does not either."""
    first_row = 0
    for number, part in enumerate(_cut(records)):
        yield SourcePart(number, first_row, tuple(part))
        first_row += len(part)


def num_parts(num_rows: int) -> int:
    """How many parts so many records make whose pictures do not lie in them."""
    return -(-num_rows // PART_ROWS)


def parts_of_some(records: Iterable[Record], places: Sequence[int], *, first_number: int) -> Iterator[SourcePart]:
    """Cut the records at some places of a source into parts. `places` are in order; parts count from `first_number`."""
    wanted, done = iter(places), 0
    turn = next(wanted, None)

    def chosen() -> Iterator[Record]:
        nonlocal turn
        for place, record in enumerate(records):
            if turn is None:
                return
            if place == turn:
                turn = next(wanted, None)
                yield record

    for number, part in enumerate(_cut(chosen()), start=first_number):
        own = tuple(int(place) for place in places[done : done + len(part)])
        yield SourcePart(number, own[0], tuple(part), own)
        done += len(part)


def _cut(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Lists of at most PART_ROWS records and about PART_BYTES."""
    num_bytes = 0
    part: list[Record] = []
    for record in records:
        part.append(record)
        num_bytes += len(record.picture.content) if isinstance(record.picture, PictureBytes) else 0
        if len(part) == PART_ROWS or num_bytes >= PART_BYTES:
            yield part
            num_bytes, part = 0, []
    if part:
        yield part


def checked_captions(record: Record) -> Record:
    """`record` with its captions stripped and without empty ones, or marked as a reject."""
    if record.reject or (len(record.captions) == 1 and _is_plain(record.captions[0])):
        return record
    try:
        captions = usable_captions(record.captions)
        is_same = len(captions) == len(record.captions) and all(map(operator.is_, captions, record.captions))
        return record if is_same else replace(record, captions=captions)
    except UnusableSampleError as error:
        return replace(record, reject=str(error), detail=error.detail or record.detail or "empty")


def _is_plain(caption: Caption) -> bool:
    """Whether a caption passes as it is, as most do: quicker than to find out what is wrong with one."""
    text = caption.text
    is_short = 0 < len(text) <= MAX_CAPTION_BYTES
    return is_short and text.isascii() and text.strip() == text and 0 < caption.weight < math.inf


class UnusableSampleError(ValueError):
    """A sample cannot be used; the words are those of a reject."""

    def __init__(self, reason: str, *, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail


def usable_captions(captions: Sequence[Caption]) -> tuple[Caption, ...]:
    """The captions stripped, without the empty ones.

    Raises:
        UnusableSampleError: there are none, or one is too long, not UTF-8, or of a weight not above 0.
    """
    stripped = [(caption, text) for caption in captions if (text := caption.text.strip())]
    if not stripped:
        raise UnusableSampleError("no caption")
    for caption, text in stripped:
        try:
            num_bytes = len(text.encode())
        except UnicodeEncodeError:
            raise UnusableSampleError("caption is not UTF-8", detail="write it as UTF-8") from None
        if num_bytes > MAX_CAPTION_BYTES:
            raise UnusableSampleError("caption too long", detail=f"{num_bytes} bytes, at most {MAX_CAPTION_BYTES}")
        if not 0 < caption.weight < math.inf:
            raise UnusableSampleError("caption weight is not positive", detail=str(caption.weight))
    return tuple(caption if text == caption.text else replace(caption, text=text) for caption, text in stripped)


def plain_values(row: Mapping[str, Any], *, without: Collection[str | None] = ()) -> dict[str, Any]:
    """The texts, booleans and finite numbers of `row`, which KEY.json keeps as `meta`."""
    return {
        encodable(key): encodable(value) if isinstance(value, str) else value
        for key, value in row.items()
        if key not in without and (math.isfinite(value) if isinstance(value, float) else isinstance(value, str | int))
    }


def words_of(name: str) -> list[str]:
    """The words of a name, in lower case: train and images of TrainImages, train and a of trainA."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


def split_of_name(folder: str) -> str | None:
    """The split that a folder's name says: train2017, val_256, ILSVRC2012_img_val, but not bullet_train."""
    words = [word for word in words_of(folder) if not BESIDE_SPLITS.fullmatch(word)]
    return SPLIT_WORDS.get(words[0]) if len(words) == 1 else None


def split_in_name(name: str) -> str | None:
    """The one split among the words of a name: captions_val2017.json, train-00000-of-00002.parquet, cars_train."""
    splits = {SPLIT_WORDS[word] for word in words_of(name) if word in SPLIT_WORDS}
    return splits.pop() if len(splits) == 1 else None


def held_out_share(given: float | None, num_pictures: int) -> float:
    """The share of a source without splits that becomes validation: as given, or a tenth of a small source.

    The default falls to a fiftieth where that is enough to measure by.
    """
    return given if given is not None else min(0.1, max(0.02, ENOUGH_HELD_OUT / num_pictures))


def split_of_folder(relative: Path) -> tuple[str | None, Path]:
    """`train/dog/x.jpg` -> ("train", `dog/x.jpg`); `dog/x.jpg` -> (None, `dog/x.jpg`)."""
    split = split_of_name(relative.parts[0]) if len(relative.parts) > 1 else None
    return (split, Path(*relative.parts[1:])) if split else (None, relative)


def hash_of_text(text: str, *, num_bytes: int = 8) -> int:
    """A number of so many bytes, the same on every machine."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=num_bytes).digest())


def json_bytes(value: Any) -> bytes:
    """Compact strict JSON, the same bytes for the same value."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
