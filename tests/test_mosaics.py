"""Mosaics: which pictures meet, where each lies, and what each patch sees."""

import itertools
from collections import Counter

import pytest
import torch

from mlip_cli.errors import UsageError
from mlip_cli.evaluate.mosaics import assemble, compose, concepts, quadrants, tile_size


@pytest.mark.parametrize("size", [6, 7, 9])
def test_tiles_lie_in_reading_order_and_meet_in_the_middle(size: int) -> None:
    s = tile_size(size)
    tiles = torch.arange(2 * 4 * 3 * s * s).reshape(2, 4, 3, s, s)
    mosaic = assemble(tiles, image_size=size)
    assert mosaic.shape == (2, 3, size, size)
    for row, column in itertools.product(range(size), repeat=2):
        lower, right = row >= s, column >= s
        y = s - (size - row) if lower else row  # the outer edges stay, whatever the middle loses
        x = s - (size - column) if right else column
        assert torch.equal(mosaic[:, :, row, column], tiles[:, 2 * lower + right, :, y, x])


@pytest.mark.parametrize("grid", [(2, 2), (3, 3), (4, 5), (7, 7), (1, 4)])
def test_quadrants_are_those_of_every_pixel_of_a_patch(grid: tuple[int, int]) -> None:
    h, w = grid
    p = 2  # pixels a patch, so that every middle lies between two pixels
    found = quadrants(grid).reshape(h, w)
    for row, column in itertools.product(range(h), range(w)):
        pixels = itertools.product(range(p * row, p * row + p), range(p * column, p * column + p))
        seen = {2 * (2 * y >= p * h) + (2 * x >= p * w) for y, x in pixels}
        assert found[row, column] == (seen.pop() if len(seen) == 1 else -1)


@pytest.mark.parametrize(
    "concept_of",
    [
        list(range(4)),
        list(range(103)),
        [i % 10 for i in range(98)],
        [i % 4 for i in range(41)],
        [0] * 60 + [1, 2, 3],  # most pictures have one name
        [i // 30 for i in range(120)],
    ],
)
def test_each_picture_is_asked_for_once_beside_three_other_names(concept_of: list[int]) -> None:
    mosaics = compose(concept_of, dataset="set")
    asked = mosaics.pictures[mosaics.is_asked].tolist()
    assert sorted(asked) == list(range(len(concept_of)))
    for row in mosaics.pictures.tolist():
        assert len({concept_of[picture] for picture in row}) == 4
    assert mosaics.is_asked.any(dim=1).all()
    most = max(Counter(concept_of).values())
    assert len(mosaics.pictures) <= max(-(-len(concept_of) // 4) + 3, most)
    assert torch.equal(compose(concept_of, dataset="set").pictures, mosaics.pictures)
    if len(concept_of) > 4:
        assert not torch.equal(compose(concept_of, dataset="set", seed=1).pictures, mosaics.pictures)


def test_places_are_random() -> None:
    concept_of = [0] * 40 + list(range(1, 9))  # most mosaics have one picture that is asked for, and fillers
    asked, all_of_one = torch.zeros(4), torch.zeros(4)
    for seed in range(20):
        mosaics = compose(concept_of, dataset="set", seed=seed)
        asked += mosaics.is_asked.sum(0)
        all_of_one += (mosaics.pictures < 40).sum(0)
    for places in (asked, all_of_one):
        assert places.min() > 0.2 * places.sum()


def test_equal_names_and_equal_pictures_never_meet() -> None:
    names = ["crane", "boat", "crane", "dot", "disc", "circle"]
    assert concepts(names, [0, 1, 2, 3]) == [0, 1, 0, 3]
    found = concepts(names, [3, 4, 5, 1], [[3, 4], [4, 3], [4, 5], [1]])  # dot = disc, disc = circle
    assert len(set(found[:3])) == 1
    assert found[3] not in found[:3]
    assert len(set(concepts(names[1:4], [0, 1, 2], [[0, 1], [1, 2], [2]]))) == 1  # a chain


@pytest.mark.parametrize(
    ("concept_of", "message"),
    [
        ([], "set: 0 pictures, and pointing needs 4; add pictures, or name another data set"),
        ([0, 1, 2], "set: 3 pictures, and pointing needs 4; add pictures, or name another data set"),
        (
            [0, 1, 2, 2, 1],
            "set: 3 different names, and pointing needs 4; add pictures of other names, or name another data set",
        ),
        (
            [0] * 9,
            "set: 1 different name, and pointing needs 4; add pictures of other names, or name another data set",
        ),
    ],
)
def test_too_little_for_a_mosaic(concept_of: list[int], message: str) -> None:
    with pytest.raises(UsageError) as error:
        compose(concept_of, dataset="set")
    assert str(error.value) == message
