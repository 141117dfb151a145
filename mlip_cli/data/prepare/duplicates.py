"""Which rows repeat a picture: a pure function of the table of all rows, in the order of the source.

A row is a duplicate if an earlier one that passed the filters has the same bytes, the same pixels or a hash that is
near, whether or not that one is itself left out. So its fate does not depend on the order of the work. Rows of the
source's own validation and test splits stay as they are, and no row is the duplicate of one of them: see `overlaps`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlip_cli.data.prepare.filters import OWN_SPLITS, Cleaning
from mlip_cli.data.prepare.near import (
    AnyPlaces,
    Hashes,
    ShortPlaces,
    earlier_equal,
    near_among,
    near_earlier,
    place_among,
)
from mlip_cli.data.prepare.part_tables import Rows, blocks
from mlip_cli.data.sources.records import NO_SPLIT, SPLITS

HOW = ("", "same bytes", "same pixels", "looks the same")
"""How two pictures are found to be one."""
BYTES, PIXELS, LOOK = 1, 2, 3
LOOKED_FOR_ROWS = 1 << 20
"""Rows that are looked for in an evaluation set at once; one takes some 100 bytes."""
EVALUATION_ROW = np.dtype([("sha256", "V16"), ("pixels", "<u8"), ("perceptual", "<u8"), ("name", "S160")])
"""A picture of an evaluation set; the fields are those of PART_ROW, and the last bytes of a longer name."""


@dataclass(frozen=True)
class EvaluationSet:
    """Pictures that should stay out of training."""

    name: str
    rows: NDArray[np.void]
    """(m,) of EVALUATION_ROW."""


@dataclass(frozen=True)
class Drops:
    """The fate of each row."""

    codes: NDArray[np.uint8]
    """(n,): 0 for a row that is kept, else the place of its reason in `words`."""
    words: tuple[str, ...]
    """The first ones are `duplicate: ` and those of HOW; one for each evaluation set follows."""
    how: NDArray[np.uint8]
    """(n,): place in HOW."""
    twins: ShortPlaces
    """(n,): place among the rows of the one that this one repeats, or in the rows of the evaluation set; -1."""

    @property
    def kept(self) -> NDArray[np.bool_]:
        """(n,): whether the row is kept."""
        return self.codes == 0

    def set_of(self, row: int) -> int | None:
        """Number of the evaluation set, in the order of `--exclude`, that has the picture of a row."""
        number = int(self.codes[row]) - len(HOW)
        return number if number >= 0 else None


def drops(rows: Rows, cleaning: Cleaning, sets: Sequence[EvaluationSet] = ()) -> Drops:
    """Say which rows, in the order of the source, are left out.

    Args:
        sets: the evaluation sets that `cleaning.exclude` names besides OWN_SPLITS.
    """
    excluded_words = tuple(f"in evaluation data: {name}" for name in cleaning.exclude)
    words = ("", *(f"duplicate: {how}" for how in HOW[1:]), *excluded_words)
    n = len(rows)
    fate = Drops(np.zeros(n, np.uint8), words, np.zeros(n, np.uint8), np.full(n, -1, np.int32))
    train = _places(_trains(rows))
    rest = {own.name: own.rows for own in sets}
    for number, name in enumerate(cleaning.exclude):
        if name in OWN_SPLITS:
            places = _places(_is_of(rows, name))
            twins, how = _matches(rows, train, _compared(rows, places), cleaning.excluded_radius)
            twins[twins >= 0] = places[twins[twins >= 0]]
        else:
            twins, how = _matches(rows, train, _compared(rest[name]), cleaning.excluded_radius)
        _mark(fate, train, twins, how, len(HOW) + number)
    if cleaning.dedupe != "none":
        _mark_duplicates(fate, rows, train, cleaning)
    return fate


def num_repeats(rows: Rows, kept: NDArray[np.bool_]) -> int:
    """How many rows of training have the pixels of an earlier one. Of the rows, those that are `kept` (n,) count."""
    pixels = rows["pixels"][kept & _trains(rows)]
    pixels.sort()
    return int((pixels[1:] == pixels[:-1]).sum())


def overlaps(rows: Rows, kept: NDArray[np.bool_]) -> dict[str, int]:
    """Split of the source -> how many rows of training have the bytes or the pixels of a picture in it.

    Of the rows, those that are `kept` (n,) count.
    """
    train = _places(kept & _trains(rows))
    found = {}
    for split in OWN_SPLITS:
        others = _places(kept & _is_of(rows, split))
        found[split] = 0
        if len(others):
            is_there = np.zeros(len(train), bool)
            for keys in (_halves(rows["sha256"])[:, 0], rows["pixels"]):
                is_there |= place_among(keys[train], keys[others]) >= 0
            found[split] = int(is_there.sum())
    return found


def _trains(rows: Rows) -> NDArray[np.bool_]:
    """Rows that go to training, or to the validation split that we draw."""
    return (rows["split"] == SPLITS.index("train")) | (rows["split"] == NO_SPLIT)


def _is_of(rows: Rows, split: str) -> NDArray[np.bool_]:
    is_of: NDArray[np.bool_] = rows["split"] == SPLITS.index(split)
    return is_of


def _places(mask: NDArray[np.bool_]) -> ShortPlaces:
    return np.flatnonzero(mask).astype(np.int32)


def _mark(fate: Drops, rows: AnyPlaces, twins: AnyPlaces, how: NDArray[np.uint8], code: int) -> None:
    """Note that these rows fall, if they have a twin and are not marked yet: (k,), (k,), (k,)."""
    new = (twins >= 0) & (fate.codes[rows] == 0)
    fate.codes[rows[new]], fate.how[rows[new]], fate.twins[rows[new]] = code, how[new], twins[new]


def _mark_duplicates(fate: Drops, rows: Rows, train: ShortPlaces, cleaning: Cleaning) -> None:
    """Each column is held only while it is compared."""

    def mark(earlier: ShortPlaces, code: int) -> None:
        has_one = np.flatnonzero(earlier >= 0)
        _mark(fate, train[has_one], train[earlier[has_one]], np.full(len(has_one), code, np.uint8), code)

    mark(_same_bytes(rows["sha256"], train), BYTES)
    if cleaning.dedupe != "bytes":
        mark(earlier_equal(rows["pixels"][train]), PIXELS)
    if cleaning.radius is not None:
        mark(near_earlier(rows["perceptual"][train], cleaning.radius), LOOK)


def _same_bytes(sha256: NDArray[np.void], train: ShortPlaces) -> ShortPlaces:
    """Place in `train` of the first row with the same bytes, if that is an earlier one, else -1: (n,), (k,) -> (k,).

    It is looked for by the first 8 bytes of the hash, which two of 12 million files share with a chance of 4e-6.
    """
    halves = _halves(sha256)
    earlier = earlier_equal(halves[train, 0])
    has_one = np.flatnonzero(earlier >= 0)
    differs = halves[train[has_one], 1] != halves[train[earlier[has_one]], 1]
    earlier[has_one[differs]] = -1
    return earlier


Compared = tuple[Hashes, Hashes, Hashes]
"""By what pictures are compared, in the order of HOW: three times (n,)."""


def _compared(rows: Rows, places: ShortPlaces | None = None) -> Compared:
    """All rows, or those at some places."""
    own = slice(None) if places is None else places
    return _halves(rows["sha256"])[own, 0], rows["pixels"][own], rows["perceptual"][own]


def _matches(rows: Rows, train: ShortPlaces, others: Compared, radius: int) -> tuple[ShortPlaces, NDArray[np.uint8]]:
    """Place in `others` of the picture of each row of training, or -1, and how it was found: (k,), (k,)."""
    mine = _compared(rows)
    twins, how = np.full(len(train), -1, np.int32), np.zeros(len(train), np.uint8)
    for block in blocks(len(train), LOOKED_FOR_ROWS):
        sha256, pixels, looks = (column[train[block]] for column in mine)
        found = (
            place_among(sha256, others[0]),
            place_among(pixels, others[1]),
            near_among(looks, others[2], radius),
        )
        for code, places in zip((BYTES, PIXELS, LOOK), found, strict=True):
            new = (twins[block] < 0) & (places >= 0)
            twins[block][new], how[block][new] = places[new], code
    return twins, how


def _halves(sha256: NDArray[Any]) -> Hashes:
    """(n,) of 16 bytes -> (n, 2)."""
    return np.ascontiguousarray(sha256).view("<u8").reshape(-1, 2)
