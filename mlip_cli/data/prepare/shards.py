"""Samples into tars, finished tars into indexes, and a folder of shards with its card."""

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
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mlip_cli.data.index import FORMATS, RECORD, write_index
from mlip_cli.data.sources.records import json_bytes
from mlip_cli.data.tar import BLOCK, Member, read_members
from mlip_cli.errors import RunError
from mlip_cli.files import atomic_path, write_json

SHARD_SAMPLES = 10_000
SHARD_BYTES = 512 << 20
TAR_RECORD = 20 * BLOCK
"""Tars are padded to a multiple of this."""

CONTEXT_LENGTH = 77
"""Of the published CLIP models; dataset.json counts the captions that are longer."""

KEY = re.compile(r"[0-9a-z_-]+")
MAGIC = {"jpg": (0, b"\xff\xd8\xff"), "png": (0, b"\x89PNG"), "webp": (8, b"WEBP")}
PART_ROW = np.dtype([("record", RECORD), ("pixels", "<u8"), ("split", "u1")])
"""A sample of a part: its index record there, hash of its pixels, place of its split in SPLITS (255: none stated)."""


class SampleWriter(Protocol):
    """webdataset's TarWriter, as far as it is used."""

    def write(self, sample: Mapping[str, Any]) -> int: ...


@contextmanager
def tar_writer(path: Path) -> Iterator[SampleWriter]:
    """Write samples to a tar at `path`: the same bytes every time."""
    from webdataset.writer import TarWriter

    with open(path, "wb") as file, TarWriter(file, mtime=0, encoder=False) as writer:
        yield writer


def sample_parts(key: str, *, image: bytes, format: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What `TarWriter` wants: KEY.json, KEY.txt (first caption, on one line) and the picture."""
    text = " ".join(fields["captions"][0]["text"].split())
    return {"__key__": key, format: image, "json": json_bytes(fields), "txt": text.encode()}


@dataclass(frozen=True)
class VerifiedTar:
    """What a second look at a written tar found."""

    records: NDArray[np.void]
    """(n,) of RECORD."""
    statistics: "Statistics"
    num_bytes: int
    sha256: str


def verify_tar(path: Path, num_tokens: Sequence[int] | NDArray[np.uint16]) -> VerifiedTar:
    """Read a tar of ours from the disk again and index it; `num_tokens` is of each sample's longest caption.

    Raises:
        RunError: it does not hold what was written: whole samples of picture, text and JSON with keys of their own.
    """
    records = np.zeros(len(num_tokens), RECORD)
    records["num_tokens"] = num_tokens
    statistics = Statistics()
    keys: set[str] = set()
    with open(path, "rb") as file:
        for key, members in groupby(read_members(path), key=lambda member: member.name.rpartition(".")[0]):
            parts = {member.name.rpartition(".")[2]: member for member in members}
            if not KEY.fullmatch(key) or key in keys or len(keys) == len(records):
                raise RunError(f"{path}: read again, its sample {key!r} is not what was written; is the disk sound?")
            fields = _index_sample(path, file.fileno(), records[len(keys)], parts)
            statistics.add(fields, image_bytes=int(records[len(keys)]["image_size"]))
            keys.add(key)
        num_bytes = os.fstat(file.fileno()).st_size
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if len(keys) != len(records):
        raise RunError(f"{path}: read again, it has {len(keys)} of {len(records)} samples; is the disk sound?")
    statistics.tokens += records["num_tokens"].tolist()
    statistics.formats.update(FORMATS[code] for code in records["format"])
    return VerifiedTar(records, statistics, num_bytes, sha256)


def _index_sample(path: Path, descriptor: int, record: np.void, parts: Mapping[str, Member]) -> dict[str, Any]:
    """Fill `record` but for its tokens; the fields of KEY.json."""
    format = next((known for known in FORMATS if known in parts), "")
    if set(parts) != {"json", "txt", format}:
        raise RunError(f"{path}: read again, a sample has the parts {sorted(parts)}; is the disk sound?")
    record["offset"] = min(member.header_offset for member in parts.values())
    for field, part in (("image", format), ("txt", "txt"), ("json", "json")):
        record[f"{field}_offset"] = parts[part].offset - int(record["offset"])
        record[f"{field}_size"] = parts[part].size
    at, magic = MAGIC[format]
    head = os.pread(descriptor, 16, parts[format].offset)
    try:
        fields: dict[str, Any] = json.loads(os.pread(descriptor, parts["json"].size, parts["json"].offset))
    except ValueError:
        fields = {}
    if not fields or head[at : at + len(magic)] != magic:
        raise RunError(f"{path}: read again, {parts['json'].name} or its picture is damaged; is the disk sound?")
    record["width"], record["height"] = fields["width"], fields["height"]
    record["format"], record["num_captions"] = FORMATS.index(format), len(fields["captions"])
    return fields


class Statistics:
    """Numbers about the samples of a split, for its card."""

    def __init__(self) -> None:
        self.formats: Counter[str] = Counter()
        self.classes: Counter[str] = Counter()
        self.values: dict[str, list[int]] = {
            name: []
            for name in ("width", "height", "original_width", "original_height", "image_bytes", "captions", "words")
        }
        self.tokens: list[int] = []

    def add(self, fields: Mapping[str, Any], *, image_bytes: int) -> None:
        """Count one sample."""
        for name in ("width", "height", "original_width", "original_height"):
            self.values[name].append(fields[name])
        self.values["image_bytes"].append(image_bytes)
        self.values["captions"].append(len(fields["captions"]))
        self.values["words"] += [len(caption["text"].split()) for caption in fields["captions"]]
        if fields["class"] is not None:
            self.classes[fields["class"]] += 1

    def merge(self, other: "Statistics") -> None:
        """Count another tar's samples too."""
        self.formats += other.formats
        self.classes += other.classes
        self.tokens += other.tokens
        for name, values in other.values.items():
            self.values[name] += values

    def summary(self) -> dict[str, Any]:
        """Minimum, median, mean and maximum of each number; formats; classes, the 100 most frequent of them."""
        spreads = {
            name: _spread(values) for name, values in (*self.values.items(), ("longest_caption_tokens", self.tokens))
        }
        too_long = sum(tokens > CONTEXT_LENGTH for tokens in self.tokens)
        return spreads | {
            f"share_over_{CONTEXT_LENGTH}_tokens": round(too_long / max(1, len(self.tokens)), 6),
            "formats": dict(sorted(self.formats.items())),
            "num_classes": len(self.classes),
            "classes": dict(sorted(self.classes.most_common(100))),
        }


def _spread(values: Sequence[int]) -> dict[str, float]:
    array = np.asarray(values)
    return {
        "min": int(array.min()),
        "median": float(np.median(array)),
        "mean": round(float(array.mean()), 3),
        "max": int(array.max()),
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
    shards: list[dict[str, Any]] = []
    statistics = Statistics()
    for number, run in enumerate(_shard_runs(samples)):
        path = folder / f"{split}-{number:06d}.tar"
        with atomic_path(path) as temporary:
            _copy_samples(temporary, run)
            verified = verify_tar(temporary, np.concatenate([stored.records["num_tokens"] for stored in run]))
        write_index(path, verified.records, tar_bytes=verified.num_bytes, sha256=verified.sha256)
        statistics.merge(verified.statistics)
        n = len(verified.records)
        shards.append({"name": path.name, "n": n, "bytes": verified.num_bytes, "sha256": verified.sha256})
    card = {
        "split": split,
        "num_samples": sum(shard["n"] for shard in shards),
        "num_bytes": sum(shard["bytes"] for shard in shards),
        "fingerprint": hashlib.sha256(json_bytes(shards)).hexdigest(),
        "shards": shards,
        "statistics": statistics.summary(),
        "provenance": provenance,
    }
    write_json(folder / "sizes.json", {shard["name"]: shard["n"] for shard in shards})
    write_json(folder / "dataset.json", card)
    return card


def _shard_runs(samples: Sequence[StoredSamples]) -> Iterator[list[StoredSamples]]:
    """Cut the samples of a split into shards of at most SHARD_SAMPLES and about SHARD_BYTES."""
    run: list[StoredSamples] = []
    num_samples = num_bytes = 0
    for stored in samples:
        start = 0
        sizes = _sample_ends(stored.records) - stored.records["offset"].astype(np.int64)
        for i, size in enumerate(sizes.tolist()):
            if num_samples and (num_samples == SHARD_SAMPLES or num_bytes + size > SHARD_BYTES):
                yield [part for part in (*run, StoredSamples(stored.tar, stored.records[start:i])) if len(part.records)]
                run, start, num_samples, num_bytes = [], i, 0, 0
            num_samples, num_bytes = num_samples + 1, num_bytes + size
        run.append(StoredSamples(stored.tar, stored.records[start:]))
    if num_samples:
        yield [part for part in run if len(part.records)]


def _sample_ends(records: NDArray[np.void]) -> NDArray[np.int64]:
    """Byte after the last padded member of each sample."""
    ends = [records[f"{part}_offset"].astype(np.int64) + records[f"{part}_size"] for part in ("image", "txt", "json")]
    return records["offset"].astype(np.int64) + (np.maximum.reduce(ends) + BLOCK - 1) // BLOCK * BLOCK


def _copy_samples(path: Path, run: Sequence[StoredSamples]) -> None:
    """Headers and bytes as they are, then the end of archive as `tarfile` writes it."""
    with open(path, "wb") as out:
        for stored in run:
            with open(stored.tar, "rb") as file:
                ends = _sample_ends(stored.records)
                for start, end in zip(stored.records["offset"].tolist(), ends.tolist(), strict=True):
                    out.write(os.pread(file.fileno(), end - start, start))
        end = out.tell() + 2 * BLOCK
        out.write(bytes(2 * BLOCK + -end % TAR_RECORD))
