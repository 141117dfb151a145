"""A gallery of retrieval: queries drawn at random, and the best answers of the model."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from io import BytesIO
from typing import Any

import torch
from PIL import Image
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

FoundPairs = tuple[Tensor, Tensor, Mapping[str, dict[str, Any]]]
"""Unit vectors of all pictures, unit vectors of all texts, and the recalls both ways."""

QUERIES = 8
"""Queries each way."""
ANSWERS = 5
"""Candidates that are shown for each query."""
THUMBNAIL = 160
"""Longest side of a stored picture in pixels."""


def random_queries(
    queries: Tensor,
    gallery: Tensor,
    right: Sequence[Sequence[int]],
    *,
    asked: Callable[[int], Shown],
    answer: Callable[[int], Shown],
    n: int = QUERIES,
    k: int = ANSWERS,
) -> list[GalleryQuery]:
    """Up to `n` queries drawn with seed 0, each with its `k` best candidates.

    Args:
        queries: (Q, E) unit vectors. gallery: (G, E) unit vectors.
        right: for each query the numbers of its right candidates, at least one.
        asked: number of a query -> what it shows. answer: number of a candidate -> what it shows.
    """
    order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(0))[:n].tolist()
    chosen = queries[order]
    own = [right[number] for number in order]
    places = ranks(chosen, gallery, own).tolist()
    shown = []
    for number, rights, scores, rank in zip(order, own, similarities(chosen, gallery), places, strict=True):
        found = scores.topk(min(k, len(gallery))).indices.tolist()
        first_right = rights[int(scores[list(rights)].argmax())]
        answers = [replace(answer(candidate), is_right=candidate in rights) for candidate in found]
        shown.append(GalleryQuery(asked=asked(number), rank=rank, first_right=answer(first_right), found=answers))
    return shown


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
    folder = run.pictures / f"gallery_{checkpoint_name(step)}"
    folder.mkdir(parents=True, exist_ok=True)

    def text(number: int) -> Shown:
        return Shown(text=pairs.texts[number])

    @cache
    def picture(number: int) -> Shown:
        path = folder / f"{number:06d}.webp"
        write_bytes(path, thumbnail(decoded(pairs.sample(number))))
        return Shown(text=pairs.texts[pairs.own_texts[number][0]], picture=str(path.relative_to(run.folder)))

    result = GalleryResult(
        mlip_version=__version__,
        measured_at=now(),
        step=step,
        true_merge_rate=true_rate,
        precision=run.read_recipe().train.precision,
        folders=[dataset.place for dataset in pairs.datasets],
        fingerprints=[dataset.fingerprint for dataset in pairs.datasets],
        num_images=pairs.num_pictures,
        num_texts=len(pairs.texts),
        chosen="at random with seed 0",
        scores={way: Recalls(**own) for way, own in scores.items()},
        text_to_image=random_queries(texts, images, own_images, asked=text, answer=picture),
        image_to_text=random_queries(images, texts, pairs.own_texts, asked=picture, answer=text),
    )
    result.write(run.evals / f"gallery_{checkpoint_name(step)}.json")
    for path in run.evals.glob("gallery_*.json"):
        if path.stem != folder.name:
            path.unlink()
    for path in run.pictures.glob("gallery_*"):
        if path != folder:
            shutil.rmtree(path)


def thumbnail(pixels: Tensor) -> bytes:
    """A small WebP without metadata: uint8 (3, H, W) -> its bytes."""
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    file = BytesIO()
    picture.save(file, "webp", quality=85)
    return file.getvalue()
