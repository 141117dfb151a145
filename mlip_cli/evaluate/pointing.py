"""Do patch tokens know what they show? In a mosaic of four pictures, each name should be most similar to its own.

The pointing game (Zhang et al., "Top-down neural attention by excitation backprop", ECCV 2016) on 2 x 2 mosaics, whose
places are known without boxes or masks. Chance is a quarter.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlip_cli.errors import UsageError
from mlip_cli.evaluate.datasets.pictures import Pictures
from mlip_cli.evaluate.mosaics import Mosaics, assemble, compose, concepts, quadrants, tile_size
from mlip_cli.evaluate.statistics import by_cluster, cluster_interval
from mlip_cli.evaluate.zeroshot import finite_rows, require_finite

CHANCE = 0.25
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
    """Of the run, for messages."""
    image_size: int
    grid: tuple[int, int]
    device: torch.device
    queries: Callable[[Sequence[str]], Queries]
    """Names -> what pictures are compared with."""
    maps: tuple[Callable[[Tensor, Queries], Maps], ...]
    """Mosaics (B, 3, H, W) and four queries each (B, 4, ·) -> maps (B, 4, N)."""


@torch.no_grad()
def measure_pointing(
    pictures: Pictures,
    tiles: Iterable[tuple[Tensor, Tensor]],
    pointers: Sequence[Pointer],
    *,
    dataset: str,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda _: None,
) -> list[list[dict[str, Any]]]:
    """Scores of each merge rate of each model, in their order; strict JSON, fractions in [0, 1].

    `pointing` holds the accuracy of each reading with its 95 % interval: `feature`, and where the model has token heads
    `tokens` and `frequency_tokens`. `right` holds for each reading one number a picture, and `mosaic` the mosaic that
    asked for it, in one line each: pictures of one mosaic are not independent, so paired tests draw mosaics.

    All pictures are in memory at half size: 0.75 * image_size^2 bytes each.

    Args:
        pictures: classes are the names that are asked for.
        tiles: uint8 pictures (B, 3, s, s) of half the models' image size (see `tile_size`), and their classes (B,).
        pointers: models of one image size.
        batch_size: mosaics per forward pass.
        on_batch: called with the number of pictures that were read, and again when they have been asked for.

    Raises:
        UsageError: fewer than four pictures or names, or a patch grid with less than two rows or columns.
        RunError: features that are not finite, or a picture that cannot be read.
    """
    [image_size] = {pointer.image_size for pointer in pointers}
    for pointer in pointers:
        if min(pointer.grid) < 2:
            h, w = pointer.grid
            raise UsageError(f"{pointer.label}: a grid of {h} x {w} patches cannot point; use smaller patches")
    halves, labels = _read(pictures, tiles, tile_size(image_size), on_batch)
    accepted = pictures.names.accepted if pictures.names else ()
    concept_of = concepts(pictures.class_names, labels.tolist(), accepted)
    mosaics = compose(concept_of, dataset=dataset)
    askings = [_Asking(pointer, pictures.class_names, labels, mosaics, dataset) for pointer in pointers]
    for numbers in torch.arange(len(mosaics.pictures)).split(batch_size):
        images = assemble(halves[mosaics.pictures[numbers]], image_size=image_size)
        for asking in askings:
            asking.see(images, numbers)
        on_batch(int(mosaics.is_asked[numbers].sum()))
    shared = {
        "n": len(labels),
        "num_names": len({pictures.class_names[label] for label in labels.tolist()}),
        "num_mosaics": len(mosaics.pictures),
        "chance": CHANCE,
    }
    return [[{**shared, **scores} for scores in asking.scores()] for asking in askings]


def _read(
    pictures: Pictures, tiles: Iterable[tuple[Tensor, Tensor]], size: int, on_batch: Callable[[int], None]
) -> tuple[Tensor, Tensor]:
    """All pictures (n, 3, size, size) uint8 and their classes (n,)."""
    halves = torch.empty(pictures.num_pictures, 3, size, size, dtype=torch.uint8)
    labels: list[Tensor] = []
    start = 0
    for images, classes in tiles:
        halves[start : start + len(images)] = images
        labels.append(classes)
        start += len(images)
        on_batch(len(images))
    assert start == pictures.num_pictures, (start, pictures.num_pictures)
    return halves, torch.cat(labels) if labels else torch.empty(0, dtype=torch.int64)


class _Asking:
    """One model on its way through the mosaics, at all of its merge rates."""

    def __init__(self, pointer: Pointer, names: Sequence[str], labels: Tensor, mosaics: Mosaics, dataset: str) -> None:
        self.pointer, self.mosaics, self.where = pointer, mosaics, f"{dataset}: {pointer.label}"
        used = labels.unique()
        self.name_of = torch.searchsorted(used, labels)
        self.queries = pointer.queries([names[number] for number in used.tolist()])
        for vectors in self.queries.values():
            require_finite(finite_rows(vectors), "text", place=self.where)
        self.quadrants = quadrants(pointer.grid).to(pointer.device)
        shape = (len(pointer.maps), *mosaics.pictures.shape)
        self.shares = {reading: torch.zeros(shape) for reading in self.queries}
        self.is_finite = torch.ones(shape, dtype=torch.bool)

    def see(self, images: Tensor, numbers: Tensor) -> None:
        """Ask for the pictures of the mosaics (B, 3, H, W) with these numbers (B,)."""
        images = images.to(self.pointer.device)
        asked = self.name_of[self.mosaics.pictures[numbers]].to(self.pointer.device)
        queries = {reading: vectors[asked] for reading, vectors in self.queries.items()}
        for rate, maps_of in enumerate(self.pointer.maps):
            for reading, maps in maps_of(images, queries).items():
                self.shares[reading][rate, numbers] = right_shares(maps, self.quadrants).cpu()
                self.is_finite[rate, numbers] &= maps.isfinite().all(-1).cpu()

    def scores(self) -> list[dict[str, Any]]:
        """Scores at each merge rate."""
        is_asked = self.mosaics.is_asked
        pictures, mosaic = self.mosaics.pictures[is_asked], is_asked.nonzero()[:, 0]
        order = pictures.argsort()
        mosaic_of = mosaic[order].tolist()
        found = []
        for rate in range(len(self.pointer.maps)):
            require_finite(self.is_finite[rate][is_asked], "image", place=self.where)
            right = {reading: shares[rate][is_asked][order].tolist() for reading, shares in self.shares.items()}
            found.append(
                {
                    "patch_grid": list(self.pointer.grid),
                    "patches_left_out": int((self.quadrants < 0).sum()),
                    "pointing": {reading: accuracy(shares, mosaic_of) for reading, shares in right.items()},
                    "right": {
                        reading: " ".join(f"{share:.6g}" for share in shares) for reading, shares in right.items()
                    },
                    "mosaic": " ".join(map(str, mosaic_of)),
                }
            )
        return found


def right_shares(maps: Tensor, quadrant_of: Tensor) -> Tensor:
    """How surely each name points at its own quadrant: (B, 4, N), (N,) -> (B, 4) in [0, 1].

    The patch of largest similarity points; of several, each is as likely (merged patches are always equal). Names stand
    in the order of their quadrants.
    """
    points = torch.where(quadrant_of < 0, -torch.inf, maps)
    best = points >= points.amax(-1, keepdim=True) - TIE
    inside = quadrant_of == torch.arange(4, device=maps.device)[:, None]
    return (best & inside).sum(-1) / best.sum(-1).clamp(min=1)


def accuracy(shares: Sequence[float], mosaic_of: Sequence[int]) -> dict[str, Any]:
    """Mean share of right answers with its 95 % interval by a bootstrap over mosaics."""
    sums, counts = by_cluster(shares, mosaic_of)
    return {"accuracy": sum(sums) / sum(counts), "accuracy_interval": cluster_interval(sums, counts)}
