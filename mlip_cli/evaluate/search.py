"""Search among pictures by text and by picture: vectors are made once for each picture and model, and kept."""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlip_cli.data.pictures import RejectedPictureError, open_picture
from mlip_cli.data.transforms import decode
from mlip_cli.devices import batch_named
from mlip_cli.errors import RunError, UsageError
from mlip_cli.evaluate.encoder import ImageTextEncoder
from mlip_cli.evaluate.gallery import thumbnail
from mlip_cli.evaluate.search_pictures import FoundPicture, SearchPictures, read_all
from mlip_cli.evaluate.search_results import Match, Query, SearchResult, Thumbnails
from mlip_cli.evaluate.trained_pictures import TrainedPictures, trained_pictures
from mlip_cli.evaluate.vector_files import DamagedVectorsError, Nearest, VectorFiles
from mlip_cli.machine import usable_cores
from mlip_cli.terminal.output import plural, say, warn
from mlip_cli.terminal.panel import progress

VECTORS = "search"
"""Folder of a run."""
PROTOCOL = 1
"""Raised when the same picture and weights would give another vector."""
FILE_ROWS, FILE_S = 8_192, 60
"""Vectors are written after so many of them or so many seconds: what an interruption loses."""
MAX_THREADS = 16
ATTEMPTS = 3
"""Searches until damaged files are gone: each attempt finds and deletes one at least."""


@dataclass(frozen=True)
class SearchTerm:
    """A query: a text, or a picture with its file."""

    text: str | None
    picture: FoundPicture | None


def read_query(path: Path) -> SearchTerm:
    """A picture file as a query.

    Raises:
        UsageError: it is missing, or not a picture.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"--image {path}: {error.strerror}; name a picture file") from None
    pixels = _pixels(content)
    if isinstance(pixels, RejectedPictureError):
        raise UsageError(f"--image {path}: {pixels}; name another picture")
    return SearchTerm(None, FoundPicture(str(path), content, None))


def search(
    encoder: ImageTextEncoder,
    pictures: SearchPictures,
    asked: Sequence[SearchTerm],
    *,
    images: str,
    top: int,
    batch_size: int,
) -> tuple[SearchResult, Thumbnails]:
    """The nearest pictures to each query, and small pictures of all of them.

    Args:
        images: the collection as the user named it.

    Raises:
        UsageError: none of the pictures can be decoded.
        RunError: features are not finite, or the device has no memory for the batch.
    """
    loaded = encoder.loaded
    with batch_named("--batch-size", batch_size):
        queries = _encoded_queries(encoder, asked)
        files = VectorFiles(loaded.run.folder / VECTORS / _collection(encoder, pictures.place), queries.shape[1])
        nearest, num_encoded = _nearest(files, encoder, pictures, queries, top=top, batch_size=batch_size)
    num_searched = len(pictures.keys) - len(files.missing(pictures.keys))
    if num_searched == 0:
        raise UsageError(f"--images {images}: none of its pictures can be used: {pictures.passed_over.in_words()}")
    numbers = sorted({int(item) for own in nearest for item in own.items})
    shown = {number: _read_again(pictures, number) for number in numbers}
    data = {number: pictures.data_of(number) for number in numbers}
    trained = trained_pictures(loaded, of=set(data.values()))
    result = SearchResult(
        run=loaded.label,
        step=loaded.step,
        true_merge_rate=encoder.merge_rate,
        precision=encoder.precision,
        images=images,
        num_pictures=num_searched,
        num_encoded=num_encoded,
        passed_over=pictures.passed_over.in_words() or None,
        trained_on=trained.words,
        attribution=pictures.attribution,
        queries=[_answer(encoder, own, found, shown, data, trained) for own, found in zip(asked, nearest, strict=True)],
    )
    small = {number: _small(picture) for number, picture in shown.items()}
    of_queries = [None if own.picture is None else _small(own.picture) for own in asked]
    return result, Thumbnails(of_queries, [[small[int(item)] for item in own.items] for own in nearest])


def _read_again(pictures: SearchPictures, number: int) -> FoundPicture:
    try:
        return pictures.read(number)
    except RejectedPictureError as error:
        raise RunError(f"{pictures.name(number)}: {error}; it changed during the search, so search again") from None


def _answer(
    encoder: ImageTextEncoder,
    asked: SearchTerm,
    nearest: Nearest,
    shown: dict[int, FoundPicture],
    data: dict[int, str | None],
    trained: TrainedPictures,
) -> Query:
    found = [
        Match(
            rank=rank,
            cosine=float(cosine),
            picture=shown[item].name,
            caption=shown[item].caption,
            was_trained_on=trained.hold(shown[item], data[item]),
        )
        for rank, (item, cosine) in enumerate(zip(nearest.items.tolist(), nearest.cosines, strict=True), start=1)
    ]
    is_cut = asked.text is not None and encoder.is_cut(asked.text)
    return Query(
        text=asked.text,
        picture=None if asked.picture is None else asked.picture.name,
        cut_to=encoder.context_length if is_cut else None,
        found=found,
    )


def _nearest(
    files: VectorFiles,
    encoder: ImageTextEncoder,
    pictures: SearchPictures,
    queries: NDArray[np.float32],
    *,
    top: int,
    batch_size: int,
) -> tuple[list[Nearest], int]:
    """The nearest pictures, and how many were encoded for that. What a damaged file held is encoded again."""
    files.open()
    num_encoded, passed_over = 0, deepcopy(pictures.passed_over)
    for attempt in range(ATTEMPTS):
        pictures.passed_over = deepcopy(passed_over)  # every attempt meets the same pictures that cannot be decoded
        num_encoded += _encode_missing(files, encoder, pictures, batch_size=batch_size)
        try:
            nearest = files.search(queries, pictures.keys, k=top)
            break
        except DamagedVectorsError:
            if attempt == ATTEMPTS - 1:
                raise
    try:
        files.tidy(pictures.keys)
    except OSError as error:
        warn(f"{files.folder}: {error.strerror}; vectors of pictures that are gone stay there")
    return nearest, num_encoded


def _encode_missing(files: VectorFiles, encoder: ImageTextEncoder, pictures: SearchPictures, *, batch_size: int) -> int:
    """Encode the pictures that have no vector, and keep the vectors; how many there were."""
    missing = files.missing(pictures.keys).tolist()
    if not missing:
        return 0
    of = f"{plural(len(missing), 'picture')} of {len(pictures.keys):,}"
    say(f"{of} to encode; their vectors are kept in {files.folder}")
    rows: list[int] = []
    vectors: list[NDArray[np.float32]] = []
    written, num_encoded = time.monotonic(), 0

    def flush() -> None:
        if rows:
            _add(files, pictures.keys[rows], np.concatenate(vectors))
            rows.clear()
            vectors.clear()

    with progress(len(missing), "pictures") as bar:
        for numbers, pixels in _decoded(pictures, missing, batch_size=batch_size):
            rows += numbers
            vectors.append(encoder.encode_pixels(pixels).numpy())
            num_encoded += len(numbers)
            bar.advance(bar.task_ids[0], len(numbers))
            if len(rows) >= FILE_ROWS or time.monotonic() - written > FILE_S:
                flush()
                written = time.monotonic()
    flush()
    return num_encoded


def _add(files: VectorFiles, keys: NDArray[np.uint64], vectors: NDArray[np.float32]) -> None:
    try:
        files.add(keys, vectors)
    except OSError as error:
        lost = f"{plural(len(keys), 'vector')} not kept, so the next search makes them again"
        warn(f"{files.folder}: {error.strerror}; {lost}")


def _decoded(
    pictures: SearchPictures, numbers: Sequence[int], *, batch_size: int
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Batches of decoded pictures. One thread reads, several decode; pictures that cannot be decoded are counted."""
    read = read_all(pictures, numbers)
    with ThreadPoolExecutor(min(MAX_THREADS, usable_cores())) as pool:
        while batch := list(islice(read, batch_size)):
            own: list[tuple[int, Tensor]] = []
            pixels = pool.map(_pixels, [picture.content for _, picture in batch])
            for (number, picture), found in zip(batch, pixels, strict=True):
                if isinstance(found, RejectedPictureError):
                    pictures.passed_over.add(found.reason, f"{picture.name}: {found.detail}")
                else:
                    own.append((number, found))
            if own:
                yield [number for number, _ in own], [tensor for _, tensor in own]


def _pixels(content: bytes) -> Tensor | RejectedPictureError:
    try:
        return decode(open_picture(content))
    except RejectedPictureError as error:
        return error


def _small(picture: FoundPicture) -> bytes | None:
    pixels = _pixels(picture.content)
    return None if isinstance(pixels, RejectedPictureError) else thumbnail(pixels)


def _encoded_queries(encoder: ImageTextEncoder, asked: Sequence[SearchTerm]) -> NDArray[np.float32]:
    """Vectors of all queries: (Q, E)."""
    texts = [own.text for own in asked if own.text is not None]
    images = [decode(open_picture(own.picture.content)) for own in asked if own.picture is not None]
    of_texts = iter(encoder.encode_text(texts)) if texts else iter(())
    of_images = iter(torch.cat([encoder.encode_pixels([own]) for own in images])) if images else iter(())
    return torch.stack([next(of_texts if own.text is not None else of_images) for own in asked]).numpy()


def _collection(encoder: ImageTextEncoder, place: str) -> str:
    """The name of the folder for the vectors of one collection by one model: all that the vectors depend on."""
    weights = hashlib.sha256()
    for name, tensor in sorted(encoder.loaded.model.state_dict().items()):
        weights.update(f"{name} {tuple(tensor.shape)} ".encode())
        weights.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    recipe = encoder.loaded.recipe
    data = recipe.data
    sees = [data.image_size, data.resize, data.pixel_mean, data.pixel_std]
    identity = [PROTOCOL, weights.hexdigest(), recipe.model.model_dump_json(), repr(encoder.plan), sees, place]
    if encoder.precision != "fp32":  # without it: vectors that lie there keep their name
        identity.append(encoder.precision)
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
