"""Mosaics of four pictures of different names: which pictures meet, where each lies, and how they become one."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from mlip_cli.errors import UsageError
from mlip_cli.terminal.output import plural

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


def concepts(names: Sequence[str], labels: Sequence[int], accepted: Sequence[Sequence[int]] = ()) -> list[int]:
    """A number for each picture; pictures of one number never meet in a mosaic.

    Equal names are one concept, and so are names of which some picture accepts several (drawings with the same pixels).

    Args:
        names: by their number; they may repeat.
        labels: number of each picture's name.
        accepted: for each picture the numbers of all names that are right for it; empty where that is its own alone.
    """
    first = {name: number for number, name in reversed(list(enumerate(names)))}
    root = [first[name] for name in names]

    def find(number: int) -> int:
        while root[number] != number:
            number = root[number]
        return number

    for label, others in zip(labels, accepted, strict=bool(accepted)):
        for other in others:
            root[find(other)] = find(label)
    return [find(label) for label in labels]


def compose(concept_of: Sequence[int], *, dataset: str, seed: int = SEED) -> Mosaics:
    """Put every picture into one mosaic at a random place, beside pictures of other concepts.

    In a random order each picture goes into the first mosaic that has room and not yet its concept. What is lacking in
    the last ones (and, where one concept has more than a quarter of the pictures, in its own) is drawn again: first a
    concept, then one of its pictures. A seed always gives the same mosaics.

    Raises:
        UsageError: fewer than four pictures or concepts.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for picture, concept in enumerate(concept_of):
        members[concept].append(picture)
    for n, what, more in (
        (len(concept_of), "picture", "pictures"),
        (len(members), "different name", "pictures of other names"),
    ):
        if n < TILES:
            cure = f"add {more}, or name another data set"
            raise UsageError(f"{dataset}: {plural(n, what)}, and pointing needs {TILES}; {cure}")
    random = Random(seed)
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
