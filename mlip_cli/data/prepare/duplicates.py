"""Which rows repeat a picture: a pure function of the table of all rows, in the order of the source.

A row is a duplicate if an earlier one that passed the filters has the same bytes, the same pixels or a hash that is
near, whether or not that one is itself left out. So its fate does not depend on the order of the work. Rows of the
source's own validation and test splits stay as they are, and no row is the duplicate of one of them: see `overlaps`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlip_cli.data.prepare.filters import OWN_SPLITS, Cleaning
from mlip_cli.data.prepare.near import Hashes, Places, first_of_equal, near_among, near_earlier, place_among
from mlip_cli.data.sources.records import NO_SPLIT, SPLITS

HOW = ("", "same bytes", "same pixels", "looks the same")
"""How two pictures are found to be one."""
BYTES, PIXELS, LOOK = 1, 2, 3
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
    twins: Places
    """(n,): place in the table of the row that this one repeats, or in the rows of the evaluation set; -1."""

    @property
    def kept(self) -> NDArray[np.bool_]:
        """(n,): whether the row is kept."""
        return self.codes == 0

    def set_of(self, row: int) -> int | None:
        """Number of the evaluation set, in the order of `--exclude`, that has the picture of a row."""
        number = int(self.codes[row]) - len(HOW)
        return number if number >= 0 else None


def drops(rows: NDArray[np.void], cleaning: Cleaning, sets: Sequence[EvaluationSet] = ()) -> Drops:
    """Say which rows (n,) of PART_ROW, in the order of the source, are left out.

    Args:
        sets: the evaluation sets that `cleaning.exclude` names besides OWN_SPLITS.
    """
    excluded_words = tuple(f"in evaluation data: {name}" for name in cleaning.exclude)
    words = ("", *(f"duplicate: {how}" for how in HOW[1:]), *excluded_words)
    fate = Drops(np.zeros(len(rows), np.uint8), words, np.zeros(len(rows), np.uint8), np.full(len(rows), -1, np.int64))
    train = np.flatnonzero(_trains(rows))
    rest = {own.name: own for own in sets}
    for number, name in enumerate(cleaning.exclude):
        others = rows[_is_of(rows, name)] if name in OWN_SPLITS else rest[name].rows
        twins, how = _matches(rows, train, others, cleaning.excluded_radius)
        places = np.flatnonzero(_is_of(rows, name)) if name in OWN_SPLITS else np.arange(len(others))
        _mark(fate, train, np.where(twins >= 0, places[twins], -1) if len(places) else twins, how, len(HOW) + number)
    if cleaning.dedupe != "none":
        _mark_duplicates(fate, rows, train, cleaning)
    return fate


def num_repeats(rows: NDArray[np.void]) -> int:
    """How many rows of training have the pixels of an earlier one."""
    pixels = rows["pixels"][_trains(rows)]
    return len(pixels) - len(np.unique(pixels))


def overlaps(rows: NDArray[np.void]) -> dict[str, int]:
    """Split of the source -> how many rows of training have the bytes or the pixels of a picture in it."""
    train = np.flatnonzero(_trains(rows))
    found = {}
    for split in OWN_SPLITS:
        others = np.flatnonzero(_is_of(rows, split))
        by_bytes = place_among(_prefixes(rows, train), _prefixes(rows, others)) >= 0
        by_pixels = place_among(rows["pixels"][train], rows["pixels"][others]) >= 0
        found[split] = int((by_bytes | by_pixels).sum())
    return found


def _trains(rows: NDArray[np.void]) -> NDArray[np.bool_]:
    """Rows that go to training, or to the validation split that we draw."""
    return (rows["split"] == SPLITS.index("train")) | (rows["split"] == NO_SPLIT)


def _is_of(rows: NDArray[np.void], split: str) -> NDArray[np.bool_]:
    return rows["split"] == SPLITS.index(split)


def _mark(fate: Drops, rows: Places, twins: Places, how: NDArray[np.uint8], code: int) -> None:
    """Note that these rows fall, if they have a twin and are not marked yet: (k,), (k,), (k,)."""
    new = (twins >= 0) & (fate.codes[rows] == 0)
    fate.codes[rows[new]], fate.how[rows[new]], fate.twins[rows[new]] = code, how[new], twins[new]


def _mark_duplicates(fate: Drops, rows: NDArray[np.void], train: Places, cleaning: Cleaning) -> None:
    def mark(earlier: Places, code: int) -> None:
        has_one = earlier >= 0
        twins = np.full(len(train), -1, np.int64)
        twins[has_one] = train[earlier[has_one]]
        _mark(fate, train, twins, np.full(len(train), code, np.uint8), code)

    mark(_earlier_equal(_prefixes(rows, train), _suffixes(rows, train)), BYTES)
    if cleaning.dedupe != "bytes":
        mark(_earlier_equal(rows["pixels"][train]), PIXELS)
    if cleaning.radius is not None:
        mark(near_earlier(rows["perceptual"][train], cleaning.radius), LOOK)


def _earlier_equal(keys: Hashes, more: Hashes | None = None) -> Places:
    """Place of the first row with the same key, if that is an earlier one, else -1. `more` must be equal too."""
    first = first_of_equal(keys)
    is_later = first != np.arange(len(keys))
    if more is not None:
        is_later &= more == more[first]
    return np.where(is_later, first, -1)


def _matches(
    rows: NDArray[np.void], train: Places, others: NDArray[np.void], radius: int
) -> tuple[Places, NDArray[np.uint8]]:
    """Place in `others` of the picture of each row of training, or -1, and how it was found: (k,), (k,)."""
    all_others = np.arange(len(others))
    found = (
        place_among(_prefixes(rows, train), _prefixes(others, all_others)),
        place_among(rows["pixels"][train], others["pixels"].copy()),
        near_among(rows["perceptual"][train], others["perceptual"].copy(), radius),
    )
    twins, how = np.full(len(train), -1, np.int64), np.zeros(len(train), np.uint8)
    for code, places in zip((BYTES, PIXELS, LOOK), found, strict=True):
        new = (twins < 0) & (places >= 0)
        twins[new], how[new] = places[new], code
    return twins, how


def _prefixes(rows: NDArray[np.void], places: Places) -> Hashes:
    """The first 8 bytes of the hash of the bytes. Two of 12 million files share them with a chance of 4e-6."""
    return _halves(rows, places)[:, 0]


def _suffixes(rows: NDArray[np.void], places: Places) -> Hashes:
    return _halves(rows, places)[:, 1]


def _halves(rows: NDArray[np.void], places: Places) -> NDArray[np.uint64]:
    return rows["sha256"][places].view("<u8").reshape(len(places), 2)
