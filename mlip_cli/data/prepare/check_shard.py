"""Check one shard that prepare-data wrote: the tar, its index, and each sample. Nothing stops at the first problem."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlip_cli.data.index import (
    CURE,
    FORMATS,
    RECORD,
    check_is_named,
    checksum,
    has_checksums,
    index_path,
    place_of,
    place_parts,
    read_checked,
)
from mlip_cli.data.pictures import RejectedPictureError, open_picture
from mlip_cli.data.tar import Member, read_members
from mlip_cli.errors import RunError, UsageError
from mlip_cli.paths import escaped
from mlip_cli.terminal.output import plural

KEYS_SHOWN = 3
"""So many samples with the same fault are named."""
WRONG_SHA256 = "its sha256 is not that which {} says: its bytes were changed"
PLACES = [f"{part}_{what}" for part in ("image", "txt", "json") for what in ("offset", "size")]


@dataclass(frozen=True)
class ShardToCheck:
    """A shard as dataset.json describes it."""

    folder: Path
    stated: Mapping[str, Any]
    """`name`, and `n`, `bytes` and `sha256` where they are known."""

    @property
    def tar(self) -> Path:
        return self.folder / self.stated["name"]


@dataclass(frozen=True)
class CheckedShard:
    """What was found."""

    shard: ShardToCheck
    num_samples: int = 0
    num_bytes: int = 0
    sha256: str | None = None
    """Of the tar that is there."""
    of_tar: tuple[str, ...] = ()
    of_index: tuple[str, ...] = ()
    of_samples: tuple[str, ...] = ()
    """Problems in words, a line for each fault."""


def check_shard(shard: ShardToCheck) -> CheckedShard:
    """Read a whole shard: size and sha256, index, each tar header, each sample's checksum, texts and picture header."""
    try:
        descriptor = os.open(shard.tar, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        missing = "missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        return CheckedShard(shard, of_tar=(missing,), of_index=tuple(_index(shard)[1]))
    try:
        return _check_open(shard, descriptor)
    except OSError as error:
        return CheckedShard(shard, of_tar=(f"cannot be read ({error.strerror})",))
    finally:
        os.close(descriptor)


def _check_open(shard: ShardToCheck, descriptor: int) -> CheckedShard:
    size = os.fstat(descriptor).st_size
    with open(shard.tar, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    found, of_index = _index(shard)
    header, records = found if found is not None else (None, None)
    stated, who = dict(shard.stated), "dataset.json"
    if "sha256" not in stated and header is not None:
        stated |= {"bytes": int(header["tar_bytes"]), "sha256": bytes(header["sha256"]).hex()}
        who = "the index"
    of_tar = []
    if stated.get("bytes", size) != size:
        of_tar.append(f"{size:,} bytes where {who} says {stated['bytes']:,}: it was cut or changed")
    if stated.get("sha256", sha256) != sha256:
        of_tar.append(WRONG_SHA256.format(who))
    samples, damage = _samples(shard.tar)
    of_tar += damage
    if records is None and not damage and stated.get("n", len(samples)) != len(samples):
        of_tar.append(f"{plural(len(samples), 'sample')} where {who} says {stated['n']:,}")
    own_crc = header is not None and has_checksums(header)
    faults: dict[str, list[str]] = {}
    for key, fault in _faults(descriptor, samples, records, own_crc=own_crc, is_whole=not damage):
        faults.setdefault(fault, []).append(key)
    n = len(samples) if records is None else len(records)
    of_samples = (_fault_words(fault, keys) for fault, keys in faults.items())
    return CheckedShard(shard, n, size, sha256, tuple(of_tar), tuple(of_index), tuple(of_samples))


def _index(shard: ShardToCheck) -> tuple[tuple[np.void, NDArray[np.void]] | None, list[str]]:
    """Header and records of the index, if it is sound, and its problems."""
    index = index_path(shard.tar)

    def words(error: Exception) -> str:
        return str(error).removeprefix(f"{index}: ").removesuffix(f"; {CURE}")

    try:
        header, records = read_checked(index)
    except RunError as error:
        return None, ["missing" if not os.path.lexists(index) else words(error)]
    except OSError as error:
        return None, [f"cannot be read ({error.strerror})"]
    problems = []
    for name in ("n", "bytes", "sha256"):
        try:
            check_is_named(index, header, {key: shard.stated[key] for key in (name,) if key in shard.stated})
        except RunError as error:
            problems.append(words(error))
    return (header, records), problems


Sample = tuple[str, dict[str, Member]]
"""Key and members by ending."""


def _samples(tar: Path) -> tuple[dict[int, Sample], list[str]]:
    """The samples of a tar by the byte at which each begins, and what ends the tar too early or hides in it."""
    samples: dict[int, Sample] = {}
    problems: list[str] = []
    keys: set[str] = set()
    try:
        for key, members in groupby(read_members(tar), key=lambda member: member.name.rpartition(".")[0]):
            own = list(members)
            names = [member.name.rpartition(".")[2] for member in own]
            if key in keys:
                problems.append(f"the key {escaped(key)} is there twice")
            if len(set(names)) < len(names) or not all(member.is_file for member in own):
                problems.append(f"the sample {escaped(key)} has a link or a member twice")
            keys.add(key)
            samples[own[0].header_offset] = (key, dict(zip(names, own, strict=True)))
    except (RunError, UsageError) as error:
        problems.append(str(error).removeprefix(f"{tar}: "))
    return samples, problems


def _faults(
    descriptor: int,
    samples: Mapping[int, Sample],
    records: NDArray[np.void] | None,
    *,
    own_crc: bool,
    is_whole: bool,
) -> Iterator[tuple[str, str]]:
    """Key and fault of each sample that has one.

    Args:
        is_whole: `samples` are all of the tar's; else a sample of the index may be missing among them.
    """
    if records is None:
        for own in samples.values():
            yield from ((escaped(own[0]), fault) for fault in _content_faults(descriptor, own))
        return
    known = set()
    for number, record in enumerate(records):
        start = int(record["offset"])
        known.add(start)
        sample = samples.get(start)
        key = f"number {number}" if sample is None else escaped(sample[0])
        if own_crc and (fault := _checksum_fault(descriptor, record)):
            yield key, fault
        if sample is not None:
            yield from ((key, fault) for fault in _place_faults(record, sample))
            yield from ((key, fault) for fault in _content_faults(descriptor, sample))
        elif is_whole:
            yield key, "no sample begins where the index says"
    for start in samples.keys() - known:
        yield escaped(samples[start][0]), "the index does not know it"


def _checksum_fault(descriptor: int, record: np.void) -> str | None:
    place = place_of(record, is_prepared=True)
    content = os.pread(descriptor, place.end - place.start, place.start)
    if len(content) < place.end - place.start:
        return "it lies behind the end of the tar"
    if checksum(record, content) != place.crc32:
        return "its bytes are not those that mlip prepare-data wrote: its checksum is wrong"
    return None


def _place_faults(record: np.void, sample: Sample) -> Iterator[str]:
    parts = {"image" if name in FORMATS else name: member for name, member in sample[1].items()}
    if parts.keys() != {"image", "json", "txt"}:
        return  # `_content_faults` tells
    there = np.zeros(1, RECORD)[0]
    place_parts(there, parts)
    if any(there[name] != record[name] for name in PLACES):
        yield "the index places its parts elsewhere"


def _content_faults(descriptor: int, sample: Sample) -> Iterator[str]:
    """What is wrong with the parts of a sample: they are read, and of the picture the header is understood."""
    _, parts = sample
    format = next((own for own in FORMATS if own in parts), "")
    if parts.keys() != {"json", "txt", format}:
        there = ", ".join(f".{escaped(name)}" for name in sorted(parts))
        yield f"it has {there}; a sample has one picture, .json and .txt"
        return
    content = {name: os.pread(descriptor, member.size, member.offset) for name, member in parts.items()}
    try:
        fields = json.loads(content["json"])
        texts = [caption["text"] for caption in fields["captions"]]
        size, first = (fields["width"], fields["height"]), " ".join(texts[0].split())
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        yield "its .json is damaged: it holds no captions and sizes of a picture"
        size, first = None, None
    if first is not None and content["txt"] != first.encode("utf-8", "replace"):
        yield "its .txt is not the first caption of its .json"
    try:
        picture = open_picture(content[format])
    except RejectedPictureError as error:
        yield f"its picture is damaged: {error.reason}"
        return
    if size is not None and (picture.width, picture.height) != size:
        yield "its picture has not the size that its .json says"


def _fault_words(fault: str, keys: list[str]) -> str:
    shown = ", ".join(keys[:KEYS_SHOWN]) + (", ..." if len(keys) > KEYS_SHOWN else "")
    return f"sample {shown}: {fault}" if len(keys) == 1 else f"{len(keys):,} samples ({shown}): {fault}"
