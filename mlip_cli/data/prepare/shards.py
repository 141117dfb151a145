"""Write samples to tars, index finished tars, and make a folder of shards with its card."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlip_cli.data.index import FORMATS, RECORD, checksum, place_of, place_parts, write_index
from mlip_cli.data.sources.records import json_bytes
from mlip_cli.data.tar import BLOCK, Member, read_members
from mlip_cli.errors import RunError
from mlip_cli.files import atomic_path, write_json

if TYPE_CHECKING:
    from webdataset.writer import TarWriter

SHARD_SAMPLES = 10_000
SHARD_BYTES = 512 << 20
SIZE_FIELDS = ("width", "height", "original_width", "original_height")
"""Fields of KEY.json, of which dataset.json tells minimum, median, mean and maximum."""
TAR_RECORD = 20 * BLOCK
"""Tars are padded to a multiple of this."""

CONTEXT_LENGTH = 77
"""Of the published CLIP models. dataset.json says how many captions are longer."""

KEY = re.compile(r"[0-9a-z_-]+")
FIRST_BYTES = {"jpg": (0, b"\xff\xd8\xff"), "png": (0, b"\x89PNG"), "webp": (8, b"WEBP")}
"""Format of a stored picture -> a place in its head, and the bytes that stand there."""
PART_ROW = np.dtype(
    [
        ("row", "<u8"),  # place in the whole source, the number in the key
        ("record", RECORD),  # in the part's tar
        ("sha256", "V16"),  # the first half of that of the source's bytes
        ("pixels", "<u8"),  # `hash_pixels`
        ("perceptual", "<u8"),  # `hash_look`, or 0 where nothing is compared by it
        ("split", "u1"),  # place in SPLITS; 255: the source says none
    ]
)
"""A sample of a part."""


@contextmanager
def tar_writer(path: Path) -> Iterator["TarWriter"]:
    """Write samples to a tar at `path`: the same bytes every time."""
    from webdataset.writer import TarWriter

    with open(path, "wb") as file, TarWriter(file, mtime=0, encoder=False) as writer:
        yield writer


def sample_parts(key: str, *, image: bytes, format: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A sample for `TarWriter`: KEY.json, KEY.txt (first caption, on one line) and the picture."""
    text = " ".join(fields["captions"][0]["text"].split())
    return {"__key__": key, format: image, "json": json_bytes(fields), "txt": text.encode()}


@dataclass(frozen=True)
class VerifiedTar:
    """A written tar, read again."""

    records: NDArray[np.void]
    """(n,) of RECORD."""
    sizes: NDArray[np.int64]
    """(n, 4): width and height of each picture, and both before it was stored."""
    caption_words: list[int]
    """Number of words of each caption."""
    captions: NDArray[np.int64]
    """The hash of each distinct caption; another in the next process."""
    classes: Counter[str]
    num_bytes: int
    sha256: str


def verify_tar(path: Path, num_tokens: Sequence[int] | NDArray[np.uint16]) -> VerifiedTar:
    """Read a tar of ours from the disk again and index it. `num_tokens` is (n,): tokens of each longest caption.

    Raises:
        RunError: it does not hold what was written: whole samples of picture, text and JSON with keys of their own.
    """
    records = np.zeros(len(num_tokens), RECORD)
    records["num_tokens"] = num_tokens
    sizes: list[list[int]] = []
    caption_words: list[int] = []
    captions: set[int] = set()
    classes: Counter[str] = Counter()
    keys: set[str] = set()
    with open(path, "rb") as file:
        for key, members in groupby(read_members(path), key=lambda member: member.name.rpartition(".")[0]):
            parts = {member.name.rpartition(".")[2]: member for member in members}
            if not KEY.fullmatch(key) or key in keys or len(keys) == len(records):
                raise RunError(f"{path}: read again, its sample {key!r} is not what was written; is the disk sound?")
            fields = _index_sample(path, file.fileno(), records[len(keys)], parts)
            sizes.append([fields[name] for name in SIZE_FIELDS])
            caption_words += [len(caption["text"].split()) for caption in fields["captions"]]
            captions.update(hash(caption["text"]) for caption in fields["captions"])
            classes.update([] if fields["class"] is None else [fields["class"]])
            keys.add(key)
        num_bytes = os.fstat(file.fileno()).st_size
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if len(keys) != len(records):
        raise RunError(f"{path}: read again, it has {len(keys)} of {len(records)} samples; is the disk sound?")
    distinct = np.array(list(captions), np.int64)
    numbers = np.array(sizes, np.int64).reshape(-1, len(SIZE_FIELDS))
    return VerifiedTar(records, numbers, caption_words, distinct, classes, num_bytes, sha256)


def _index_sample(path: Path, descriptor: int, record: np.void, parts: Mapping[str, Member]) -> dict[str, Any]:
    """Fill `record` except for its tokens. Returns the fields of KEY.json."""
    format = next((known for known in FORMATS if known in parts), "")
    if set(parts) != {"json", "txt", format}:
        raise RunError(f"{path}: read again, a sample has the parts {sorted(parts)}; is the disk sound?")
    place_parts(record, {"image": parts[format], "txt": parts["txt"], "json": parts["json"]})
    at, first_bytes = FIRST_BYTES[format]
    head = os.pread(descriptor, 16, parts[format].offset)
    try:
        fields: dict[str, Any] = json.loads(os.pread(descriptor, parts["json"].size, parts["json"].offset))
    except ValueError:
        fields = {}
    if not fields or head[at : at + len(first_bytes)] != first_bytes:
        raise RunError(f"{path}: read again, {parts['json'].name} or its picture is damaged; is the disk sound?")
    record["format"], record["num_captions"] = FORMATS.index(format), len(fields["captions"])
    place = place_of(record, is_prepared=True)
    record["crc32"] = checksum(record, os.pread(descriptor, place.end - place.start, place.start))
    return fields


def _statistics(tars: Sequence[VerifiedTar]) -> dict[str, Any]:
    """Minimum, median, mean and maximum of each number; formats; the 100 most frequent classes."""
    records = np.concatenate([tar.records for tar in tars])
    sizes = np.concatenate([tar.sizes for tar in tars])
    words = np.concatenate([np.array(tar.caption_words) for tar in tars])
    classes = sum((tar.classes for tar in tars), Counter[str]())
    formats = Counter(FORMATS[code] for code in records["format"])
    return {
        **{name: _spread(sizes[:, column]) for column, name in enumerate(SIZE_FIELDS)},
        "image_bytes": _spread(records["image_size"]),
        "captions": _spread(records["num_captions"]),
        "words": _spread(words),
        "distinct_captions": len(np.unique(np.concatenate([tar.captions for tar in tars]))),
        "longest_caption_tokens": _spread(records["num_tokens"]),
        f"share_over_{CONTEXT_LENGTH}_tokens": round(float((records["num_tokens"] > CONTEXT_LENGTH).mean()), 6),
        "formats": dict(sorted(formats.items())),
        "num_classes": len(classes),
        "classes": dict(sorted(classes.most_common(100))),
    }


def _spread(values: NDArray[Any]) -> dict[str, float]:
    return {
        "min": int(values.min()),
        "median": float(np.median(values)),
        "mean": round(float(values.mean()), 3),
        "max": int(values.max()),
    }


@dataclass(frozen=True)
class StoredSamples:
    """Samples of a part that go to one split, in order."""

    tar: Path
    records: NDArray[np.void]
    """(n,) of RECORD: places in `tar`."""


def write_split(
    folder: Path, split: str, samples: Sequence[StoredSamples], *, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """Copy samples from parts into the shards of a split, verify and index them, write dataset.json and sizes.json.

    Returns:
        The card that dataset.json holds.
    """
    folder.mkdir(parents=True)
    records = np.concatenate([stored.records for stored in samples])
    part_of = np.repeat(np.arange(len(samples)), [len(stored.records) for stored in samples])
    shards: list[dict[str, Any]] = []
    tars: list[VerifiedTar] = []
    for start, end in _shard_bounds(_sample_ends(records) - records["offset"].astype(np.int64)):
        path = folder / f"{split}-{len(shards):06d}.tar"
        with atomic_path(path) as temporary:
            _copy_samples(temporary, [samples[part].tar for part in part_of[start:end]], records[start:end])
            verified = verify_tar(temporary, records["num_tokens"][start:end])
        write_index(path, verified.records, tar_bytes=verified.num_bytes, sha256=verified.sha256)
        tars.append(verified)
        shards.append({"name": path.name, "n": end - start, "bytes": verified.num_bytes, "sha256": verified.sha256})
    card = {
        "split": split,
        "num_samples": sum(shard["n"] for shard in shards),
        "num_bytes": sum(shard["bytes"] for shard in shards),
        "fingerprint": hashlib.sha256(json_bytes(shards)).hexdigest(),
        "shards": shards,
        "statistics": _statistics(tars),
        "provenance": provenance,
    }
    write_json(folder / "sizes.json", {shard["name"]: shard["n"] for shard in shards})
    write_json(folder / "dataset.json", card)
    return card


def _shard_bounds(sizes: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Start and end of shards of at most SHARD_SAMPLES samples and about SHARD_BYTES."""
    start = num_bytes = 0
    for number, size in enumerate(sizes.tolist()):
        if number > start and (number - start == SHARD_SAMPLES or num_bytes + size > SHARD_BYTES):
            yield start, number
            start, num_bytes = number, 0
        num_bytes += size
    yield start, len(sizes)


def _sample_ends(records: NDArray[np.void]) -> NDArray[np.int64]:
    """Byte after the last padded member of each sample."""
    ends = [records[f"{part}_offset"].astype(np.int64) + records[f"{part}_size"] for part in ("image", "txt", "json")]
    return records["offset"].astype(np.int64) + (np.maximum.reduce(ends) + BLOCK - 1) // BLOCK * BLOCK


def _copy_samples(path: Path, tars: Sequence[Path], records: NDArray[np.void]) -> None:
    """Copy headers and bytes of each sample from its tar as they are; end the archive as `tarfile` does."""
    spans = zip(tars, records["offset"].tolist(), _sample_ends(records).tolist(), strict=True)
    with open(path, "wb") as out:
        for tar, of_tar in groupby(spans, key=lambda span: span[0]):
            with open(tar, "rb") as file:
                for _, start, end in of_tar:
                    out.write(os.pread(file.fileno(), end - start, start))
        end = out.tell() + 2 * BLOCK
        out.write(bytes(2 * BLOCK + -end % TAR_RECORD))
