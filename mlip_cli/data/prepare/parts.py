"""Prepare one part of a source: records in, verified files out. Any worker can do any part."""

import hashlib
import json
import os
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mlip_cli.data.pictures import RejectedPictureError
from mlip_cli.data.prepare.filters import bytes_fault, with_clean_captions
from mlip_cli.data.prepare.pixels import StoredPicture, store
from mlip_cli.data.prepare.retry import PICTURE_MISSING, PICTURE_UNREADABLE
from mlip_cli.data.prepare.shards import PART_ROW, sample_parts, tar_writer, verify_tar
from mlip_cli.data.prepare.workspace import PartInHand, PartOptions, PartResult
from mlip_cli.data.sources.records import (
    MAX_CAPTIONS,
    NO_SPLIT,
    SPLITS,
    Picture,
    PictureAddress,
    PictureBytes,
    PicturePlace,
    Record,
    SourcePart,
)
from mlip_cli.data.sources.rewritten import find_captions, merged
from mlip_cli.data.tar import read_decompressed
from mlip_cli.data.tokenizer import count_tokens
from mlip_cli.files import atomic_path, write_bytes, write_json
from mlip_cli.paths import encodable, escaped

MAX_FILE_BYTES = 512 << 20
ROW_FIELDS = ("row", "sha256", "pixels", "perceptual", "split")
"""Those of PART_ROW that are known before the tar is whole."""
SAY_EVERY_S = 0.5
ONE_AT_A_TIME = threading.Lock()
"""Threads of a process that prepare parts wait for their downloads side by side, and decode one after another."""

Value = TypeVar("Value")
Sample = tuple[dict[str, Any], StoredPicture, bool, int]
"""The fields of KEY.json, the picture, whether another file has captions for its bytes, and how many captions are too
many."""


def prepare_part(
    part: SourcePart, options: PartOptions, say: Callable[[PartInHand], None] = lambda _: None
) -> PartResult:
    """Write a part's samples and rejects to files of their own, and the result last. Each file is whole or absent.

    Args:
        say: called now and then with what is done of the part.
    """
    tar = Path(options.folder, f"part-{part.number:06d}.tar")
    cleaned = [with_clean_captions(record, options.cleaning) for record in part.records]
    records = [record for record, _ in cleaned]
    rows: list[tuple[int, bytes, int, int, int]] = []
    num_tokens: list[int] = []
    num_rewritten, captions_left_out = 0, sum(num_fallen for _, num_fallen in cleaned)
    rejects: list[dict[str, Any]] = []
    with atomic_path(tar) as temporary:
        with tar_writer(temporary) as writer:
            for position, sample in in_order(counted(_samples(records, options), part.number, say)):
                record, row = records[position], part.place(position)
                if isinstance(sample, RejectedPictureError):
                    rejects.append({"place": row, **_reject(record, sample)})
                    continue
                fields, picture, is_rewritten, num_cut = sample
                key = f"{row:09d}"
                writer.write(sample_parts(key, image=picture.content, format=picture.format, fields=fields))
                split = SPLITS.index(record.split) if record.split else NO_SPLIT
                sha256 = bytes.fromhex(fields["sha256"])[:16]
                rows.append((row, sha256, picture.pixels, picture.perceptual, split))
                num_tokens.append(count_tokens(caption["text"] for caption in fields["captions"]))
                num_rewritten += is_rewritten
                captions_left_out += num_cut
        verified = verify_tar(temporary, num_tokens)
    table = np.zeros(len(rows), PART_ROW)
    for name, values in zip(ROW_FIELDS, zip(*rows, strict=True), strict=False):
        table[name] = values
    table["record"] = verified.records
    with atomic_path(tar.with_suffix(".npy")) as temporary, open(temporary, "wb") as file:
        np.save(file, table, allow_pickle=False)
    lines = "".join(json.dumps(reject) + "\n" for reject in rejects)
    write_bytes(tar.with_suffix(".rejects.jsonl"), lines.encode())
    reasons = dict(sorted(Counter(reject["reason"] for reject in rejects).items()))
    source_rows = sum(record.num_rows for record in part.records)
    result = PartResult(
        part.number, len(part.records), tar.name, reasons, source_rows, captions_left_out, num_rewritten
    )
    write_json(tar.with_suffix(".json"), asdict(result))
    return result


def _samples(records: Sequence[Record], options: PartOptions) -> Iterator[tuple[int, Sample | RejectedPictureError]]:
    """Position and sample of each record, or why it has none; downloads come in the order in which they end."""
    for position, content in _contents(records, options):
        sample: Sample | RejectedPictureError
        try:
            if isinstance(content, RejectedPictureError):
                raise content
            with ONE_AT_A_TIME:
                sample = _make_sample(records[position], content, options)
        except RejectedPictureError as reject:
            sample = RejectedPictureError(reject.reason, reject.detail)  # no traceback, whose frames hold the picture
        yield position, sample


def counted(
    samples: Iterable[tuple[int, Value | RejectedPictureError]], number: int, say: Callable[[PartInHand], None]
) -> Iterator[tuple[int, Value | RejectedPictureError]]:
    """Pass the samples of part `number` on, and say now and then how many there were."""
    reasons: dict[str, int] = {}
    said_s = time.monotonic()
    for rows, (position, sample) in enumerate(samples, start=1):
        if isinstance(sample, RejectedPictureError):
            reasons[sample.reason] = reasons.get(sample.reason, 0) + 1
        if time.monotonic() - said_s >= SAY_EVERY_S:
            said_s = time.monotonic()
            say(PartInHand(number, rows, dict(reasons)))
        yield position, sample


def _contents(
    records: Sequence[Record], options: PartOptions
) -> Iterator[tuple[int, bytes | RejectedPictureError | None]]:
    """Position and bytes of each record's picture, None where `_make_sample` reads them."""
    urls = [] if options.download is None else addresses_of(records)
    is_downloaded = {position for position, _ in urls}
    places = decompressed(records)
    for position, record in enumerate(records):
        if position not in is_downloaded:
            yield position, places.get(record.picture) if isinstance(record.picture, PicturePlace) else None
    if options.download is not None and urls:
        from mlip_cli.data.download.downloader import downloaded

        yield from downloaded(urls, options.download)


def addresses_of(records: Sequence[Record]) -> list[tuple[int, str]]:
    """Position and URL of the records whose picture is downloaded."""
    pictures = ((position, record.picture) for position, record in enumerate(records) if not record.reject)
    return [(position, picture.url) for position, picture in pictures if isinstance(picture, PictureAddress)]


def in_order(answers: Iterable[tuple[int, Value]]) -> Iterator[tuple[int, Value]]:
    """Put (position, value) into the order of positions, which are 0 to n - 1; holds what comes before its turn."""
    waiting: dict[int, Value] = {}
    turn = 0
    for position, value in answers:
        waiting[position] = value
        while turn in waiting:
            yield turn, waiting.pop(turn)
            turn += 1


def decompressed(records: Sequence[Record]) -> dict[PicturePlace, bytes]:
    """The pictures that lie in compressed files, read in the order in which they lie there, so that it is read once."""
    found = (record.picture for record in records if not record.reject)
    places = [place for place in found if isinstance(place, PicturePlace) and place.is_compressed]
    places.sort(key=lambda place: (place.path, place.offset))
    sizes = [(place, place.size or 0) for place in places]
    return {place: read_decompressed(place.path, n, place.offset) for place, n in sizes if n <= MAX_FILE_BYTES}


def _make_sample(record: Record, content: bytes | None, options: PartOptions) -> Sample:
    """The sample of a record, whose picture is read if its bytes are not at hand.

    Raises:
        RejectedPictureError: says why the record becomes a reject.
    """
    if record.reject or record.picture is None:
        raise RejectedPictureError(record.reject or "no picture", record.detail)
    content = read_picture(record.picture) if content is None else content
    if fault := bytes_fault(len(content), options.cleaning):
        raise RejectedPictureError(*fault)
    if options.render and isinstance(record.picture, PicturePlace):
        from mlip_cli.data.sources.openmoji import render

        picture = store(render(Path(record.picture.path), size=options.size), size=options.size)
    else:
        picture = store(content, size=options.size, cleaning=options.cleaning)
    sha256 = hashlib.sha256(content).hexdigest()
    found = find_captions(options.captions, sha256) if options.captions else ()
    captions = merged(record.captions, found, adds=options.adds_captions)
    fields = {
        "captions": [asdict(caption) for caption in captions[:MAX_CAPTIONS]],
        "class": None if record.label is None else encodable(record.label),
        "width": picture.width,
        "height": picture.height,
        "original_width": picture.original_width,
        "original_height": picture.original_height,
        "sha256": sha256,
        "source": _source(record),
        "meta": dict(record.meta),
    }
    return fields, picture, bool(found), max(0, len(captions) - MAX_CAPTIONS)


def _source(record: Record) -> dict[str, Any]:
    """Where a sample comes from: file, row, and the URL of a downloaded picture."""
    url = {"url": encodable(record.picture.url)} if isinstance(record.picture, PictureAddress) else {}
    return {"file": encodable(record.file), "row": record.row, **url}


def read_picture(picture: Picture) -> bytes:
    """The encoded bytes of a picture; of one in a compressed file see `decompressed`.

    Raises:
        RejectedPictureError: it is missing, too large, or cannot be read.
    """
    if isinstance(picture, PictureBytes):
        return picture.content
    if isinstance(picture, PictureAddress):
        raise RejectedPictureError("picture is an address", f"{picture.url}: download it first with mlip prepare-data")
    try:
        if not stat.S_ISREG(os.stat(picture.path).st_mode) and not os.path.isdir(picture.path):
            raise RejectedPictureError("picture is not a file", "a pipe or a device")  # reading it could wait for ever
        with open(picture.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size if picture.size is None else picture.size
            if size > MAX_FILE_BYTES:
                raise RejectedPictureError("picture too large", f"{size} bytes")
            file.seek(picture.offset)
            return file.read(size)
    except FileNotFoundError:
        raise RejectedPictureError(PICTURE_MISSING, "no such file") from None
    except (OSError, ValueError) as error:  # a folder, no permission, a bad disk block, a name with a zero byte
        raise RejectedPictureError(PICTURE_UNREADABLE, getattr(error, "strerror", None) or str(error)) from None


def _reject(record: Record, error: RejectedPictureError) -> dict[str, Any]:
    detail = error.detail if not record.detail or record.detail == error.detail else f"{record.detail}: {error.detail}"
    return {"file": escaped(record.file), "row": record.row, "reason": error.reason, "detail": escaped(detail)}
