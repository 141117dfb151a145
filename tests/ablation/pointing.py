"""Do patch tokens know what they show? In a mosaic of four pictures, each name should be most similar to its own.

The pointing game (Zhang et al., "Top-down neural attention by excitation backprop", ECCV 2016) on 2 x 2 mosaics, whose
places are known without boxes or masks. Chance is a quarter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from ablation.mosaics import assemble, compose, quadrants
from torch import Tensor

from mlip_cli.evaluate.zeroshot import finite_rows, require_finite

TIE = 1e-6
"""Cosines that differ by less are equal: in fp32, rounding alone explains more than 1e-7."""

Queries = dict[str, Tensor]
"""By reading, one vector a text: (n, ·)."""
Maps = dict[str, Tensor]
"""By reading, the similarity of each text to each original patch: (B, Q, N)."""


@dataclass(frozen=True)
class Pointer:
    """A model that points, and the ways in which it encodes pictures (its merge rates)."""

    label: str
    """Of the data set and the run, for messages."""
    image_size: int
    grid: tuple[int, int]
    device: torch.device
    queries: Callable[[Sequence[str]], Queries]
    """Names -> the vectors that patches are compared with."""
    maps: tuple[Callable[[Tensor, Queries], Maps], ...]
    """Mosaics (B, 3, H, W) and four queries each (B, 4, ·) -> maps (B, 4, N)."""


@torch.no_grad()
def measure_pointing(
    tiles: Tensor, names: Sequence[str], pointer: Pointer, *, batch_size: int
) -> list[dict[str, float]]:
    """Accuracy of each merge rate by reading, in [0, 1].

    `feature`, and where the model has token heads `tokens` and `frequency_tokens`.

    Args:
        tiles: (n, 3, s, s) uint8, pictures of half the model's image size (see `tile_size`).
        names: of each picture; pictures of one name never meet in a mosaic.
        batch_size: mosaics per forward pass.

    Raises:
        ValueError: fewer than four names, or a patch grid with less than two rows or columns.
        RunError: features that are not finite.
    """
    if min(pointer.grid) < 2:
        raise ValueError(f"{pointer.label}: a grid of {pointer.grid} patches cannot point; use smaller patches")
    different = sorted(set(names))
    number = {name: i for i, name in enumerate(different)}
    name_of = torch.tensor([number[name] for name in names])
    mosaics = compose(name_of.tolist())
    queries = pointer.queries(different)
    for vectors in queries.values():
        require_finite(finite_rows(vectors), "text", place=pointer.label)
    quadrant_of = quadrants(pointer.grid).to(pointer.device)
    shape = (len(pointer.maps), *mosaics.pictures.shape)
    shares = {reading: torch.zeros(shape) for reading in queries}
    is_finite = torch.ones(shape, dtype=torch.bool)
    for numbers in torch.arange(len(mosaics.pictures)).split(batch_size):
        images = assemble(tiles[mosaics.pictures[numbers]], image_size=pointer.image_size).to(pointer.device)
        asked = name_of[mosaics.pictures[numbers]].to(pointer.device)
        own = {reading: vectors[asked] for reading, vectors in queries.items()}
        for rate, maps_of in enumerate(pointer.maps):
            for reading, maps in maps_of(images, own).items():
                shares[reading][rate, numbers] = right_shares(maps, quadrant_of).cpu()
                is_finite[rate, numbers] &= maps.isfinite().all(-1).cpu()
    require_finite(is_finite[:, mosaics.is_asked], "image", place=pointer.label)
    return [
        {reading: own[rate][mosaics.is_asked].double().mean().item() for reading, own in shares.items()}
        for rate in range(len(pointer.maps))
    ]


def right_shares(maps: Tensor, quadrant_of: Tensor) -> Tensor:
    """How surely each name points at its own quadrant: (B, 4, N), (N,) -> (B, 4) in [0, 1].

    The patch of largest similarity points; of several, each is as likely (merged patches are always equal). Names stand
    in the order of their quadrants.
    """
    points = torch.where(quadrant_of < 0, -torch.inf, maps)
    best = points >= points.amax(-1, keepdim=True) - TIE
    inside = quadrant_of == torch.arange(4, device=maps.device)[:, None]
    return (best & inside).sum(-1) / best.sum(-1).clamp(min=1)
