"""The pictures of evaluation sets as hashes, so that `--exclude` keeps them out of training.

Of data that mlip prepared, the hash of the bytes is that of the file from which a picture was stored.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlip_cli.data.dataset import BadSampleError
from mlip_cli.data.open import open_prepared
from mlip_cli.data.pictures import RejectedPictureError
from mlip_cli.data.prepare.duplicates import EVALUATION_ROW, EvaluationSet
from mlip_cli.data.prepare.evaluation_places import EvaluationPlace
from mlip_cli.data.prepare.parts import decompressed, read_picture
from mlip_cli.data.prepare.pixels import PERCEPTUAL, hash_look, hash_pixels, scaled_rgb
from mlip_cli.data.prepare.workers import run_parallel
from mlip_cli.data.sources.find import find_pictures
from mlip_cli.data.sources.records import PART_ROWS, PicturePlace, Record, SourcePart, parts_of
from mlip_cli.errors import UsageError
from mlip_cli.files import atomic_path
from mlip_cli.paths import escaped
from mlip_cli.terminal.output import plural, say, warn
from mlip_cli.terminal.panel import progress

NAME_BYTES = EVALUATION_ROW["name"].itemsize


@dataclass(frozen=True)
class PreparedPart:
    """Consecutive samples of data that mlip prepared."""

    number: int
    folder: Path
    start: int
    end: int


def hashed_set(place: EvaluationPlace, *, folder: Path, size: int, num_workers: int) -> EvaluationSet:
    """The hashes of a set, which are computed once and kept in `folder`.

    Args:
        size: that of the pictures that are compared with them, short side in pixels.

    Raises:
        UsageError: it holds no pictures, or cannot be read.
        RunError: a worker was killed, or a tar is damaged.
    """
    known_by = json.dumps([place.name, place.fingerprint, size, PERCEPTUAL])
    path = folder / f"excluded-{hashlib.sha256(known_by.encode()).hexdigest()[:32]}.npy"
    if not path.is_file():
        rows = _hashed(place, size, num_workers)
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.save(file, rows, allow_pickle=False)
    rows = np.load(path, allow_pickle=False)
    num_pictures, num_unread = plural(len(rows), "picture"), int((rows["pixels"] == 0).sum())
    say(f"{escaped(place.name)}: {num_pictures} that stay out of training")
    if num_unread:
        warn(f"{escaped(place.name)}: {num_unread:,} of {num_pictures} cannot be decoded, and are known by bytes alone")
    return EvaluationSet(place.name, rows)


def _hashed(place: EvaluationPlace, size: int, num_workers: int) -> NDArray[np.void]:
    """(m,) of EVALUATION_ROW, in the order of the set."""
    found: dict[int, NDArray[np.void]] = {}
    with progress(None, f"hashing {escaped(place.name)}") as bar:
        for number, rows in run_parallel(partial(hash_part, size=size), _parts(place), num_workers=num_workers):
            found[number] = rows
            bar.advance(bar.task_ids[0], len(rows))
    if not any(map(len, found.values())):
        raise UsageError(f"--exclude {escaped(place.name)}: no pictures in {escaped(place.path)}")
    return np.concatenate([found[number] for number in sorted(found)])


def _parts(place: EvaluationPlace) -> Iterator[SourcePart | PreparedPart]:
    if not place.is_prepared:
        _, records = find_pictures(place.absolute)
        yield from parts_of(record for record in records if record.picture is not None)
        return
    num_samples = open_prepared(Path(place.path)).num_samples
    for number, start in enumerate(range(0, num_samples, PART_ROWS)):
        yield PreparedPart(number, Path(place.path), start, min(num_samples, start + PART_ROWS))


def hash_part(part: SourcePart | PreparedPart, *, size: int) -> tuple[int, NDArray[np.void]]:
    """The number of a part, and its pictures (m,) of EVALUATION_ROW. A picture that cannot be decoded has zeros."""
    pictures = _stored(part) if isinstance(part, PreparedPart) else _contents(part.records)
    rows = [(*hashes_of(content, sha256, size=size), name) for name, content, sha256 in pictures]
    table = np.zeros(len(rows), EVALUATION_ROW)
    for field, values in zip(EVALUATION_ROW.names or (), zip(*rows, strict=True), strict=False):
        table[field] = values
    return part.number, table


def hashes_of(content: bytes, sha256: str | None, *, size: int) -> tuple[bytes, int, int]:
    """sha256 (its first half), `hash_pixels` and `hash_look` of a picture.

    Args:
        sha256: of the original bytes, where `content` is what was stored of them.
    """
    digest = bytes.fromhex(sha256) if sha256 else hashlib.sha256(content).digest()
    try:
        _, rgb = scaled_rgb(content, size=size)
    except RejectedPictureError:
        return digest[:16], 0, 0
    return digest[:16], hash_pixels(rgb), hash_look(rgb)


def _contents(records: tuple[Record, ...]) -> Iterator[tuple[bytes, bytes, str | None]]:
    """Name and bytes of each picture that can be read."""
    packed = decompressed(records)
    for record in records:
        if record.picture is None:
            continue
        known = packed.get(record.picture) if isinstance(record.picture, PicturePlace) else None
        try:
            content = read_picture(record.picture) if known is None else known
        except RejectedPictureError:
            content = b""
        yield _name(f"{record.file} row {record.row}"), content, None


def _stored(part: PreparedPart) -> Iterator[tuple[bytes, bytes, str | None]]:
    """Name, stored bytes and sha256 of the original of each sample."""
    shards = open_prepared(part.folder)
    for id in range(part.start, part.end):
        try:
            sample = shards.read(id)
        except BadSampleError as error:
            yield _name(f"{error.shard} {error.key}"), b"", None
            continue
        source = sample.info.fields.get("source", {})
        place = f"{source.get('file')} row {source.get('row')}"
        yield _name(place), sample.image, sample.info.fields.get("sha256")


def _name(text: str) -> bytes:
    return escaped(text).encode()[-NAME_BYTES:]
