"""A gallery of retrieval: queries drawn at random, and the best answers of the model."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlip_cli import __version__
from mlip_cli.data.loader import decoded
from mlip_cli.evaluate.picture_results import GalleryQuery, GalleryResult, Shown
from mlip_cli.evaluate.results import Recalls
from mlip_cli.evaluate.retrieval import image_text_retrieval, images_of_texts, ranks
from mlip_cli.evaluate.validation import ValidationPairs
from mlip_cli.evaluate.zeroshot import similarities
from mlip_cli.files import write_bytes
from mlip_cli.runs.folder import Run, checkpoint_name, now
from mlip_cli.types import Encoder


@dataclass(frozen=True)
class Query:
    """One query and the candidates that come first."""

    number: int
    """Number of the query."""
    found: tuple[int, ...]
    """Numbers of the best candidates, best first."""
    is_right: tuple[bool, ...]
    """Whether each of them is one of the query's own."""
    first_right: int
    """Number of the query's own candidate that comes first."""
    rank: int
    """How many wrong candidates come before the first right one, ties counted against the model."""


def random_queries(queries: Tensor, gallery: Tensor, right: Sequence[Sequence[int]], *, n: int, k: int) -> list[Query]:
    """Up to `n` queries drawn with seed 0, each with its `k` best candidates.

    Args:
        queries: (Q, E) unit vectors. gallery: (G, E) unit vectors.
        right: for each query the numbers of its right candidates, at least one.
    """
    order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(0))[:n].tolist()
    chosen = queries[order]
    own = [right[number] for number in order]
    places = ranks(chosen, gallery, own).tolist()
    shown = []
    for number, rights, scores, rank in zip(order, own, similarities(chosen, gallery), places, strict=True):
        found = scores.topk(min(k, len(gallery))).indices.tolist()
        first_right = rights[int(scores[list(rights)].argmax())]
        is_right = tuple(candidate in rights for candidate in found)
        shown.append(Query(number, tuple(found), is_right, first_right, rank))
    return shown


FoundPairs = tuple[Tensor, Tensor, Mapping[str, dict[str, Any]]]
"""Unit vectors of all pictures, unit vectors of all texts, and the recalls both ways."""

QUERIES = 8
"""Queries each way."""
ANSWERS = 5
"""Candidates that are shown for each query."""
THUMBNAIL = 160
"""Longest side of a stored picture in pixels."""


def find_pairs(encoder: Encoder, pairs: ValidationPairs) -> FoundPairs:
    """Features and recalls of the validation pairs, by all ranks and on every rank.

    Raises:
        RunError: features are not finite, or a picture cannot be read.
    """
    images, texts = pairs.features(encoder)
    return images, texts, image_text_retrieval(images, texts, pairs.own_texts)


def write_gallery(run: Run, found: FoundPairs, pairs: ValidationPairs, *, step: int, true_rate: float) -> None:
    """Write RUN/evals/gallery_STEP.json and the pictures it names; older galleries are removed.

    Raises:
        RunError: a picture cannot be read.
    """
    images, texts, scores = found
    own_images = images_of_texts(pairs.own_texts, len(pairs.texts))
    by_text = random_queries(texts, images, own_images, n=QUERIES, k=ANSWERS)
    by_image = random_queries(images, texts, pairs.own_texts, n=QUERIES, k=ANSWERS)
    folder = run.pictures / f"gallery_{checkpoint_name(step)}"
    seen = {image for query in by_text for image in (*query.found, query.first_right)}
    thumbnails = _write_thumbnails(pairs, seen | {query.number for query in by_image}, folder)

    def text(number: int) -> Shown:
        return Shown(text=pairs.texts[number])

    def picture(number: int) -> Shown:
        path = thumbnails[number].relative_to(run.folder)
        return Shown(text=pairs.texts[pairs.own_texts[number][0]], picture=str(path))

    result = GalleryResult(
        mlip_version=__version__,
        measured_at=now(),
        step=step,
        true_merge_rate=true_rate,
        folders=[dataset.place for dataset in pairs.datasets],
        fingerprints=[dataset.fingerprint for dataset in pairs.datasets],
        num_images=pairs.num_pictures,
        num_texts=len(pairs.texts),
        chosen="at random with seed 0",
        scores={way: Recalls(**own) for way, own in scores.items()},
        text_to_image=[_shown(query, text, picture) for query in by_text],
        image_to_text=[_shown(query, picture, text) for query in by_image],
    )
    result.write(run.evals / f"gallery_{checkpoint_name(step)}.json")
    for path in run.evals.glob("gallery_*.json"):
        if path.stem != folder.name:
            path.unlink()
    for path in run.pictures.glob("gallery_*"):
        if path != folder:
            shutil.rmtree(path)


def _shown(query: Query, asked: Callable[[int], Shown], answer: Callable[[int], Shown]) -> GalleryQuery:
    """A query with its texts and pictures in the place of their numbers."""
    return GalleryQuery(
        asked=asked(query.number),
        rank=query.rank,
        first_right=answer(query.first_right),
        found=[
            replace(answer(number), is_right=is_right)
            for number, is_right in zip(query.found, query.is_right, strict=True)
        ],
    )


def _write_thumbnails(pairs: ValidationPairs, numbers: set[int], folder: Path) -> dict[int, Path]:
    """Write small pictures without metadata; their paths by number."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for number in sorted(numbers):
        picture = Image.fromarray(decoded(pairs.sample(number)).permute(1, 2, 0).numpy())
        picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        buffer = BytesIO()
        picture.save(buffer, "webp", quality=85)
        paths[number] = folder / f"{number:06d}.webp"
        write_bytes(paths[number], buffer.getvalue())
    return paths
