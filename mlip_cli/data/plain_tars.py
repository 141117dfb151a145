"""webdataset tars that mlip did not write, read where they lie, in any order, through indexes made on first use.

Nothing is copied and no picture is looked at: an index holds the places of pictures and texts, and the length of the
captions. Headers are checked again when a sample is read, so a tar that changes meanwhile gives bad samples, never a
picture with another's caption.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlip_cli.data.cache import ShardCache
from mlip_cli.data.dataset import UNREADABLE, BadSampleError, RawSample, ShardDataset
from mlip_cli.data.index import RECORD, read_records, write_index
from mlip_cli.data.prepare.workers import run_parallel
from mlip_cli.data.remote import is_url
from mlip_cli.data.sources.find import DataSource, find_source
from mlip_cli.data.sources.records import PICTURE_ENDINGS, Record, checked_captions, json_bytes, split_of_folder
from mlip_cli.data.sources.tars import MAX_PART_BYTES, TEXTS, UnusableTextsError, key_of, known_members, stated
from mlip_cli.data.tar import TAR_BLOCK, DamagedTarError, Member, checked_header, read_members
from mlip_cli.data.tokenizer import count_tokens
from mlip_cli.errors import UsageError
from mlip_cli.files import GIB, full_disk_named, write_json
from mlip_cli.recipe.config import Cache
from mlip_cli.terminal.output import plural, say, warn
from mlip_cli.terminal.panel import progress

FORMATS = {"jpg": 0, "jpeg": 0, "png": 1, "webp": 2}
"""Endings of pictures that training decodes -> their place in the index's formats."""
MOST_NAMED = 10
PARALLEL_BYTES = GIB
"""Below this, one process has read the tars before others have started."""


@dataclass(frozen=True)
class IndexedTar:
    """What is known of a tar that was read through once; beside its index as JSON."""

    num_bytes: int
    num_samples: int
    sha256: str
    """Of the keys, and of the records in the index: places, sizes and lengths of captions."""
    rejects: dict[str, int]
    """Samples without use, by reason."""
    first_reject: str
    damage: str | None
    """What ended the tar too early, and where."""


class PlainTars(ShardDataset):
    """The samples of webdataset tars as those of a prepared data set, in the order of tars and of what lies in them.

    Args:
        path: a folder of tars, one of them, or a pattern like `tars/{0000..0099}.tar` or `tars/*.tar`.
        cache: the indexes lie there, by path, size and time of the tars.

    Raises:
        UsageError: no tars there, tars of several splits, a stream, or no sample that can be used.
    """

    def __init__(self, path: str, cache: Cache) -> None:
        self.folder = Path(path)
        self.remote = None
        source = _find(path)
        tars = [source.root / name for name in source.tars()]
        known, self._indexes = _indexed(path, tars, ShardCache.of(cache))
        _tell(path, tars, known)
        shards = [
            {"name": str(tar.absolute()), "n": own.num_samples, "bytes": own.num_bytes}
            for tar, own in zip(tars, known, strict=True)
        ]
        listing = [[name, own.num_bytes, own.sha256] for name, own in zip(source.tars(), known, strict=True)]
        card = {
            "num_samples": sum(own.num_samples for own in known),
            "num_bytes": sum(own.num_bytes for own in known),
            "fingerprint": hashlib.sha256(json_bytes(listing)).hexdigest(),
            "shards": shards,
            "provenance": {"webdataset": path},
        }
        self._start(card)

    def read(self, id: int) -> RawSample:
        """The sample with this number, in two or three reads of the disk.

        Raises:
            BadSampleError: what lies there is not the sample that the index describes.
        """
        number, row = self._place(id)
        shard = self._opened(number)
        record = shard.records[row]
        name, place = str(self._tar(number)), f"at byte {int(record['offset'])}"
        members = {}
        try:
            for part in ("image", "txt", "json"):
                if size := int(record[f"{part}_size"]):
                    at = int(record["offset"]) + int(record[f"{part}_offset"])
                    members[part] = _member(shard.descriptor, at, size)
            keys = {key for key, _ in members.values()}
            if len(keys) != 1:
                raise ValueError(f"its members belong to {' and '.join(sorted(keys))}")
            fields = _fields({part: content for part, (_, content) in members.items() if part != "image"})
        except UNREADABLE as error:
            raise BadSampleError(name, place, str(error)) from error
        return RawSample(key=keys.pop(), image=members["image"][1], record=fields, shard=name)

    def _index(self, number: int) -> Path:
        return self._indexes[number]

    def _records(self, number: int) -> NDArray[np.void]:
        return read_records(self._index(number))[1]


def _find(path: str) -> DataSource:
    if path.startswith("pipe:") or is_url(path):
        raise UsageError(
            f"{path}: a stream is read once and from its start: a run could neither shuffle all of it nor go on; "
            "save it as tars and name these, or prepare them (mlip prepare-data TARS OUT)"
        )
    source = find_source(path, format="webdataset")
    splits = {split_of_folder(Path(name))[0] for name in source.tars()}
    if len(splits) > 1:
        words = ", ".join(sorted(split or "none" for split in splits))
        raise UsageError(f"{path}: tars of several splits ({words}); name the folder of one")
    return source


def _indexed(path: str, tars: Sequence[Path], cache: ShardCache) -> tuple[list[IndexedTar], list[Path]]:
    """What is known of each tar, and its index."""
    folder = cache.subfolder("tars")
    indexes = [folder / f"{_identity(tar)}.idx" for tar in tars]
    missing = [(tar, index) for tar, index in zip(tars, indexes, strict=True) if not _card(index).is_file()]
    if missing:
        with cache.locked(), full_disk_named(cache.folder, "make room, or set data.cache.folder"):
            _index_all(path, [pair for pair in missing if not _card(pair[1]).is_file()])
    return [IndexedTar(**json.loads(_card(index).read_bytes())) for index in indexes], indexes


def _index_all(path: str, pairs: Sequence[tuple[Path, Path]]) -> None:
    num_bytes = sum(tar.stat().st_size for tar, _ in pairs)
    say(f"{path}: making the indexes of {plural(len(pairs), 'tar')}, {num_bytes / GIB:.2f} GiB, once")
    num_workers = min(len(pairs), os.cpu_count() or 1) if num_bytes >= PARALLEL_BYTES else 1
    with progress(len(pairs), "indexes") as bar:
        for _ in run_parallel(_index_one, pairs, num_workers=num_workers):
            bar.advance(bar.task_ids[0], 1)


def _identity(tar: Path) -> str:
    stat = tar.stat()
    return hashlib.sha256(json_bytes([str(tar.resolve()), stat.st_size, stat.st_mtime_ns])).hexdigest()[:32]


def _card(index: Path) -> Path:
    return index.with_suffix(".json")


def _index_one(pair: tuple[Path, Path]) -> None:
    """Write the index of a tar, and after it what `IndexedTar` says."""
    tar, index = pair
    rows: list[np.void] = []
    digest = hashlib.sha256()
    rejects: Counter[str] = Counter()
    first_reject, damage = "", None
    descriptor = os.open(tar, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for key, members in _samples(tar):
            try:
                rows.append(_index_record(descriptor, members))
                digest.update(f"{key}\n".encode("utf-8", "surrogateescape"))  # names are bytes of any kind
            except ValueError as error:
                rejects[str(error)] += 1
                first_reject = first_reject or f"{tar}: sample {key}: {error}"
    except DamagedTarError as error:
        damage = str(error)
    finally:
        os.close(descriptor)
    records = np.array(rows, RECORD) if rows else np.zeros(0, RECORD)
    num_bytes = tar.stat().st_size
    write_index(index, records, tar_bytes=num_bytes, sha256="00" * 32)  # nobody read the pictures
    digest.update(records.tobytes())
    own = IndexedTar(num_bytes, len(rows), digest.hexdigest(), dict(sorted(rejects.items())), first_reject, damage)
    write_json(_card(index), asdict(own))


def _samples(tar: Path) -> Iterator[tuple[str, list[tuple[str, Member]]]]:
    """(key, members that we read) of each sample; the one in which a damaged tar ends is not whole and left out."""
    for key, members in groupby(read_members(tar), key=lambda member: key_of(member.name)):
        if known := known_members(members):
            yield key, known


def _index_record(descriptor: int, members: Sequence[tuple[str, Member]]) -> np.void:
    """ValueError says why the sample cannot be used."""
    pictures = [(ending, member) for ending, member in members if ending in PICTURE_ENDINGS]
    if len(pictures) != 1:
        raise ValueError("several pictures" if pictures else "no picture")
    if pictures[0][0] not in FORMATS:
        raise ValueError("a picture that is neither JPEG nor PNG nor WebP; mlip prepare-data reads it")
    parts = {"image": pictures[0][1]}
    texts = {ending: member for ending, member in members if ending not in PICTURE_ENDINGS}
    if pictures[0][1].size == 0:
        raise ValueError("empty picture")
    for part, endings in (("txt", TEXTS), ("json", ("json",))):
        if found := [texts[ending] for ending in endings if ending in texts]:
            parts[part] = found[0]
    if any(member.size > MAX_PART_BYTES for part, member in parts.items() if part != "image"):
        raise ValueError("caption too long")
    contents = {p: os.pread(descriptor, m.size, m.offset) for p, m in parts.items() if p != "image" and m.size}
    record = np.zeros(1, RECORD)[0]
    said = _stated(contents)
    record["offset"] = first = min(member.header_offset for member in parts.values())
    for part, member in parts.items():
        if member.offset + member.size - first >= 2**32:
            raise ValueError("larger than 4 GiB")
        record[f"{part}_offset"], record[f"{part}_size"] = member.offset - first, member.size
    record["format"], record["num_captions"] = FORMATS[pictures[0][0]], len(said.captions)
    record["num_tokens"] = count_tokens(said)
    return record


def _stated(texts: Mapping[str, bytes]) -> Record:
    """A record with the captions, class and meta that `txt` and `json` state; ValueError says why there are none."""
    said = stated(texts)
    record = checked_captions(Record("", 0, None, said.captions, label=said.label, meta=said.meta))
    if record.reject:
        raise UnusableTextsError(record.reject)
    return record


def _fields(texts: Mapping[str, bytes]) -> dict[str, Any]:
    """As in a KEY.json of ours."""
    record = _stated(texts)
    return {
        "captions": [asdict(caption) for caption in record.captions],
        "class": record.label,
        "meta": dict(record.meta),
    }


def _member(descriptor: int, at: int, size: int) -> tuple[str, bytes]:
    """Key and content of the member whose `size` bytes lie at `at`; ValueError unless its header says so too."""
    content = os.pread(descriptor, TAR_BLOCK + size, at - TAR_BLOCK)
    name, found = checked_header(content[:TAR_BLOCK])
    if found != size:
        raise ValueError(f"{name!r} of {found} bytes where the index says {size}")
    if len(content) != TAR_BLOCK + size:
        raise ValueError(f"the shard ends {TAR_BLOCK + size - len(content)} bytes too early")
    is_posix = content[257:263] == b"ustar\0"  # other forms keep other things there
    folder = content[345:500].split(b"\0", 1)[0].decode("ascii", "replace") if is_posix else ""
    return key_of(f"{folder}/{name}" if folder else name), content[TAR_BLOCK:]


def _tell(path: str, tars: Sequence[Path], known: Sequence[IndexedTar]) -> None:
    """Name damaged tars and count samples without use.

    Raises:
        UsageError: no sample is of use.
    """
    damaged = [own for own in known if own.damage]
    for own in damaged[:MOST_NAMED]:
        warn(f"{own.damage}; {plural(own.num_samples, 'sample')} before it are used")
    if len(damaged) > MOST_NAMED:
        warn(f"{path}: {len(damaged) - MOST_NAMED} more tars are damaged, {len(damaged)} of {len(tars)}")
    rejects = sum((Counter(own.rejects) for own in known), Counter[str]())
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in rejects.most_common())
    num_samples = sum(own.num_samples for own in known)
    if num_samples == 0:
        raise UsageError(
            f"{path}: no sample of {plural(len(tars), 'tar')} can be used ({reasons or 'there are none'}); one is a "
            "picture and KEY.txt or KEY.json, and mlip prepare-data names each that is none"
        )
    if rejects:
        first = next(own.first_reject for own in known if own.first_reject)
        warn(f"{path}: {rejects.total():,} samples cannot be used and {num_samples:,} can: {reasons} (first: {first})")
