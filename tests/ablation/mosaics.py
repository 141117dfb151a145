"""Mosaics of four pictures of different names: which pictures meet, where each lies, and how they become one."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

SEED = 0
TILES = 4
"""Pictures in a mosaic, in reading order: 2 x 2."""


@dataclass(frozen=True)
class Mosaics:
    """A round in which every picture is asked for once."""

    pictures: Tensor
    """(M, 4) int64: number of the picture in each quadrant."""
    is_asked: Tensor
    """(M, 4) bool: False for pictures that only fill a mosaic up and are asked for in another one."""


def compose(concept_of: Sequence[int]) -> Mosaics:
    """Put every picture into one mosaic at a random place, beside pictures of other concepts.

    In a random order each picture goes into the first mosaic that has room and not yet its concept. What is lacking in
    the last ones (and, where one concept has more than a quarter of the pictures, in its own) is drawn again: first a
    concept, then one of its pictures. The mosaics are always the same.

    Raises:
        ValueError: fewer than four concepts.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for picture, concept in enumerate(concept_of):
        members[concept].append(picture)
    if len(members) < TILES:
        raise ValueError(f"{len(members)} different names; pointing needs {TILES}")
    random = Random(SEED)
    mosaics, everything = _first_fit(concept_of, random), list(members)
    rows, asked = [], []
    for own in mosaics:
        fillers = _fillers(own, concept_of, everything, members, random)
        tiles = [(picture, True) for picture in own] + [(picture, False) for picture in fillers]
        random.shuffle(tiles)
        rows.append([picture for picture, _ in tiles])
        asked.append([is_asked for _, is_asked in tiles])
    return Mosaics(torch.tensor(rows), torch.tensor(asked))


def _first_fit(concept_of: Sequence[int], random: Random) -> list[list[int]]:
    """Pictures by mosaic, up to four each. A concept's pictures go to ever later mosaics: none is looked at twice."""
    order = list(range(len(concept_of)))
    random.shuffle(order)
    mosaics: list[list[int]] = []
    next_mosaic: dict[int, int] = {}
    first_open = 0
    for picture in order:
        number = max(next_mosaic.get(concept_of[picture], 0), first_open)
        while number < len(mosaics) and len(mosaics[number]) == TILES:
            number += 1
        if number == len(mosaics):
            mosaics.append([])
        mosaics[number].append(picture)
        next_mosaic[concept_of[picture]] = number + 1
        while first_open < len(mosaics) and len(mosaics[first_open]) == TILES:
            first_open += 1
    return mosaics


def _fillers(
    own: Sequence[int],
    concept_of: Sequence[int],
    everything: Sequence[int],
    members: dict[int, list[int]],
    random: Random,
) -> Iterable[int]:
    """Pictures of other concepts, `everything` being all, for the empty places of a mosaic."""
    seen = {concept_of[picture] for picture in own}
    for _ in range(TILES - len(own)):
        concept = random.choice(everything)
        while concept in seen:  # at most three of four or more concepts
            concept = random.choice(everything)
        seen.add(concept)
        yield random.choice(members[concept])


def tile_size(image_size: int) -> int:
    """Side of the pictures that `assemble` takes: half of the mosaic's, rounded up."""
    return (image_size + 1) // 2


def assemble(tiles: Tensor, *, image_size: int) -> Tensor:
    """Four pictures in reading order to one: (B, 4, 3, s, s), s = tile_size(image_size) -> (B, 3, size, size).

    Where the size is odd, the right and the lower tiles lose the row or column that has no room: they meet the others
    in the middle pixel, which belongs to a patch that `quadrants` leaves out.
    """
    s = tiles.shape[-1]
    assert s == tile_size(image_size), (s, image_size)
    rest = image_size - s
    upper = torch.cat([tiles[:, 0], tiles[:, 1, :, :, s - rest :]], dim=-1)
    lower = torch.cat([tiles[:, 2], tiles[:, 3, :, :, s - rest :]], dim=-1)
    return torch.cat([upper, lower[:, :, s - rest :]], dim=-2)


def quadrants(grid: tuple[int, int]) -> Tensor:
    """Quadrant of each patch in reading order, -1 for patches of two or four quadrants: (h*w,) int64.

    An odd grid has a middle row or column, which sees two pictures and so can point at neither: it is left out. Then
    the quadrants have equally many patches, and a map without preference is right in a quarter of the cases.
    """
    halves = []
    for n in grid:
        index = torch.arange(n)
        halves.append(torch.where(2 * (index + 1) <= n, 0, torch.where(2 * index >= n, 1, -1)))
    rows, columns = halves[0][:, None], halves[1][None]
    return torch.where((rows < 0) | (columns < 0), -1, 2 * rows + columns).flatten()
