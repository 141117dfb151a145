"""Indexes of webdataset tars that mlip did not write, so that training reads the tars where they lie.

Nothing is copied and no picture is looked at. An index holds the places of pictures and texts, and the length of the
captions. It is made on first use and kept in the cache.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlip_cli.data.cache import ShardCache
from mlip_cli.data.index import RECORD, place_parts, write_index
from mlip_cli.data.prepare.workers import run_parallel
from mlip_cli.data.sources.find import find_source
from mlip_cli.data.sources.formats import DataSource
from mlip_cli.data.sources.listing import PassedOver
from mlip_cli.data.sources.records import MAX_CAPTIONS, UnusableSampleError, json_bytes, usable_captions
from mlip_cli.data.sources.tar_samples import Columns, TarNotes, TarSample, parts_of_sample, samples_of
from mlip_cli.data.sources.tars import SEVERAL_CAPTIONS, splits_of_tars, stated
from mlip_cli.data.tar import OpenTar, check_not_compressed, members_before_damage, open_tar
from mlip_cli.data.tokenizer import count_tokens
from mlip_cli.errors import RunError, UsageError
from mlip_cli.files import GIB, full_disk_named, read_own_object, write_json
from mlip_cli.machine import usable_cores
from mlip_cli.paths import escaped
from mlip_cli.recipe.config import Cache
from mlip_cli.terminal.output import plural, say, size_in_words, warn
from mlip_cli.terminal.panel import progress

ENOUGH_SAMPLES = 50
"""Most samples must be usable, if there are at least so many."""
RULES = 4
"""A number that is raised when samples are found in another way. Older indexes in the cache are not read then."""
PARALLEL_BYTES = GIB
"""Below this, one process has read the tars before others have started."""


@dataclass(frozen=True)
class IndexedTar:
    """What is known about a tar that was read through once; it lies beside the index as JSON."""

    num_bytes: int
    num_samples: int
    sha256: str
    """Of the keys and of the records in the index: places, sizes and lengths of captions."""
    rejects: dict[str, int]
    """Unusable samples, by reason."""
    first_reject: str
    damage: str | None
    """Where and how the tar is damaged; the samples before that point are used."""
    at_first_dot: bool
    """Where the keys of its samples end."""
    read_as: dict[str, dict[str, Any]]
    passed_over: dict[str, dict[str, Any]]

    @property
    def notes(self) -> TarNotes:
        """How the tar was read, and what of it is not read."""
        return TarNotes(PassedOver(**self.read_as), PassedOver(**self.passed_over))


def index_tars(path: str, columns: Columns, cache: Cache) -> tuple[list[Path], list[Path], dict[str, Any]]:
    """Tars, the index of each, and a card like that of prepared data; indexes are made where there are none yet.

    Damaged tars are named, unusable samples counted.

    Args:
        path: a folder of tars, one tar, or a pattern like `tars/{0000..0099}.tar` or `tars/*.tar`.
        cache: where the indexes are kept; a tar is known by its path, size and time, and by the columns.

    Raises:
        UsageError: there are no tars, they are of several splits, compressed or a stream, or no sample can be used.
        RunError: most samples cannot be used, for one reason.
    """
    source = _find(path)
    tars = [source.root / name for name in source.tars()]
    indexes, known = _indexed(path, tars, columns, ShardCache.of(cache))
    _tell(path, tars, known)
    listing = [[name, own.num_bytes, own.sha256] for name, own in zip(source.tars(), known, strict=True)]
    card = {
        "num_samples": sum(own.num_samples for own in known),
        "num_bytes": sum(own.num_bytes for own in known),
        "fingerprint": hashlib.sha256(json_bytes(listing)).hexdigest(),
        "shards": [
            {
                "name": str(tar.absolute()),
                "n": own.num_samples,
                "bytes": own.num_bytes,
                "at_first_dot": own.at_first_dot,
            }
            for tar, own in zip(tars, known, strict=True)
        ],
        "provenance": {"webdataset": path},
    }
    return [tar.absolute() for tar in tars], indexes, card


def _find(path: str) -> DataSource:
    source = find_source(path, format="webdataset")
    splits = set(splits_of_tars(source.tars()).values())
    if len(splits) > 1:
        words = ", ".join(sorted(split or "none" for split in splits))
        raise UsageError(f"{path}: tars of several splits ({words}); name the folder of one, or a pattern")
    return source


def _indexed(
    path: str, tars: Sequence[Path], columns: Columns, cache: ShardCache
) -> tuple[list[Path], list[IndexedTar]]:
    """The index of each tar, and what is known about the tar."""
    folder = cache.subfolder("tars")
    indexes = [folder / f"{_identity(tar, columns)}.idx" for tar in tars]
    missing = [(tar, index) for tar, index in zip(tars, indexes, strict=True) if not _about(index).is_file()]
    if missing:
        with cache.locked(), full_disk_named(cache.folder, "make room, or set data.cache.folder"):
            _index_all(path, [pair for pair in missing if not _about(pair[1]).is_file()], columns)
    return indexes, [
        IndexedTar(**read_own_object(_about(index), cure="remove it, and mlip makes it anew")) for index in indexes
    ]


def _index_all(path: str, pairs: Sequence[tuple[Path, Path]], columns: Columns) -> None:
    for tar, _ in pairs:
        check_not_compressed(tar, "training")
    num_bytes = sum(tar.stat().st_size for tar, _ in pairs)
    say(f"{path}: indexing {plural(len(pairs), 'tar')}, {size_in_words(num_bytes)}; this is done once")
    num_workers = min(len(pairs), usable_cores()) if num_bytes >= PARALLEL_BYTES else 1
    with progress(len(pairs), "indexes") as bar:
        for _ in run_parallel(partial(_index_one, columns=columns), pairs, num_workers=num_workers):
            bar.advance(bar.task_ids[0], 1)


def _identity(tar: Path, columns: Columns) -> str:
    stat = tar.stat()
    known_by = [RULES, escaped(str(tar.resolve())), stat.st_size, stat.st_mtime_ns, columns.image, columns.caption]
    return hashlib.sha256(json_bytes(known_by)).hexdigest()[:32]


def _about(index: Path) -> Path:
    """Where the IndexedTar of an index lies."""
    return index.with_suffix(".json")


def _index_one(pair: tuple[Path, Path], columns: Columns) -> None:
    """Write the index of a tar, and then its IndexedTar: where that exists, the index is whole."""
    tar, index = pair
    rows: list[np.void] = []
    digest = hashlib.sha256()
    rejects: Counter[str] = Counter()
    first_reject, notes = "", TarNotes()
    members, damage = members_before_damage(tar)
    samples, at_first_dot = samples_of(members, columns, notes, tar=str(tar), is_cut=damage is not None)
    with open_tar(tar) as opened:
        for sample in samples:
            try:
                rows.append(_index_record(opened, sample, columns, notes))
                digest.update(f"{sample.key}\n".encode("utf-8", "surrogateescape"))  # names are bytes of any kind
            except ValueError as error:
                rejects[str(error)] += 1
                detail = getattr(error, "detail", "")
                words = f"{error}: {escaped(detail)}" if detail else str(error)
                first_reject = first_reject or f"{tar}: sample {escaped(sample.key)}: {words}"
    records = np.array(rows, RECORD) if rows else np.zeros(0, RECORD)
    num_bytes = tar.stat().st_size
    write_index(index, records, tar_bytes=num_bytes, sha256="00" * 32)  # the pictures were not read
    digest.update(records.tobytes())
    own = IndexedTar(
        num_bytes=num_bytes,
        num_samples=len(rows),
        sha256=digest.hexdigest(),
        rejects=dict(sorted(rejects.items())),
        first_reject=first_reject,
        damage=damage,
        at_first_dot=at_first_dot,
        read_as=asdict(notes.read_as),
        passed_over=asdict(notes.passed_over),
    )
    write_json(_about(index), asdict(own))


def _index_record(tar: OpenTar, sample: TarSample, columns: Columns, notes: TarNotes) -> np.void:
    """The record of a sample; a ValueError says why the sample cannot be used."""
    parts = parts_of_sample(sample, columns)
    parts.pop("cls", None)  # a record has no place for it
    if parts["image"].size == 0:
        raise ValueError("empty picture")
    info = stated({part: tar.read(m.size, m.offset) for part, m in parts.items() if part != "image"}, columns)
    if not info.captions:
        raise UnusableSampleError("no caption", detail=info.without_captions)
    usable = usable_captions(info.captions)
    captions = usable[:MAX_CAPTIONS]
    if len(usable) > MAX_CAPTIONS:
        notes.read_as.add(
            f"samples with more than {MAX_CAPTIONS} captions, of which the first are read", f"{tar.path}: {sample.key}"
        )
    record = np.zeros(1, RECORD)[0]
    place_parts(record, parts, by_header=True)
    record["num_captions"] = len(captions)
    record["num_tokens"] = count_tokens(caption.text for caption in captions)
    if info.has_lines:
        notes.read_as.add(SEVERAL_CAPTIONS, f"{tar.path}: {sample.key}")
    return record


def _tell(path: str, tars: Sequence[Path], known: Sequence[IndexedTar]) -> None:
    """Name damaged tars and count unusable samples.

    Raises:
        UsageError: no sample can be used.
        RunError: most of them cannot, for one reason.
    """
    notes = TarNotes()
    for own in known:
        notes.add(own.notes)
        if own.damage:
            notes.add_damage(own.damage, own.num_samples)
    notes.tell_damage(path, num_tars=len(tars), warn=warn)
    rejects = sum((Counter(own.rejects) for own in known), Counter[str]())
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in rejects.most_common())
    num_samples = sum(own.num_samples for own in known)
    first = next((own.first_reject for own in known if own.first_reject), "")
    if num_samples == 0:
        why = f"{reasons} (first: {first})" if rejects else "there are none"
        raise UsageError(
            f"{path}: no sample of {plural(len(tars), 'tar')} can be used: {why}; a sample is a picture with KEY.txt "
            "or KEY.json; mlip prepare-data lists the samples that it rejects"
        )
    notes.tell_readings(path, say=say)
    if notes.passed_over.counts:
        say(f"{path}: not read: {notes.passed_over.in_words()}")
    total = num_samples + rejects.total()
    for reason, n in rejects.most_common(1) if total >= ENOUGH_SAMPLES else ():
        if n > total / 2:
            raise RunError(f"{path}: {n:,} of {total:,} samples fail for the same reason: {reason} (first: {first})")
    if rejects:
        warn(f"{path}: {rejects.total():,} samples cannot be used and {num_samples:,} can: {reasons} (first: {first})")
