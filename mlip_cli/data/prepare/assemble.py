"""From a source to shards: workers prepare its parts in any order, then one process puts them together.

`prepare_part` depends on the part and the options alone, so the bytes of the output depend neither on the number of
workers nor on the order of their work.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlip_cli import __version__
from mlip_cli.data.download.options import DEFAULTS, PARTS_AT_ONCE, DownloadOptions
from mlip_cli.data.prepare import downloads
from mlip_cli.data.prepare.parts import NO_SPLIT, prepare_part
from mlip_cli.data.prepare.shards import StoredSamples, write_split
from mlip_cli.data.prepare.summary import SplitSummary, Summary, next_commands
from mlip_cli.data.prepare.workers import run_parallel
from mlip_cli.data.prepare.workspace import PartOptions, PartResult, Workspace, opened
from mlip_cli.data.sources.find import DataSource, read_records
from mlip_cli.data.sources.listing import PassedOver, is_unread_picture
from mlip_cli.data.sources.openmoji import attribution, split_words
from mlip_cli.data.sources.records import MAX_HELD_OUT, SPLITS, ReadOptions, held_out_share, parts_of
from mlip_cli.data.sources.survey import Survey, passed_over, surveyed
from mlip_cli.data.sources.table_layouts import missing_shards
from mlip_cli.errors import RunError, UsageError, interrupted_as
from mlip_cli.files import GIB, free_bytes, full_disk_named
from mlip_cli.paths import escaped
from mlip_cli.terminal.output import plural, say, warn
from mlip_cli.terminal.panel import progress

FIRST_ROWS = 1_000
"""This many rows are enough to see that most rows of a source fail. Fewer than FEWEST_ROWS are not."""
FEWEST_ROWS = 10
CURES = {
    "caption is not UTF-8": "save the texts as UTF-8, for example with iconv -f latin1 -t utf-8",
    "caption too long": "cut the texts: training reads the first words alone",
    **downloads.CURES,
}
"""What helps where most rows fail for a reason that does not say it."""

BYTES_A_PIXEL = 0.5
"""Estimate for the check of disk space: between JPEG and lossless WebP of photographs at 256 pixels."""
BYTES_A_SAMPLE = 4096
"""Tar headers and texts."""


class SourceError(RunError):
    """Most rows of the source fail; nothing of the work is worth keeping."""


def prepare(
    source: DataSource,
    out: Path,
    read: ReadOptions,
    request: dict[str, Any],
    *,
    num_workers: int,
    download: DownloadOptions = DEFAULTS,
) -> Summary:
    """Prepare a source in OUT. An interrupted run is continued.

    Args:
        request: format, size, holdout and fingerprint of the source; it goes to prepared.json.

    Raises:
        UsageError: the source cannot be read, the disk is too small, or another process writes to OUT.
        RunError: most rows fail, a worker was killed, or the disk is full.
        Stopped: Ctrl-C.
    """
    started = time.monotonic()
    with progress(None, "counting rows"):
        survey = surveyed(source, read)
    passed = passed_over(source, survey)
    _say_understood(source, survey, passed)
    source_bytes = 0 if survey.addresses else sum(file.size for file in source.files)
    _check_disk(out, num_rows=survey.pictures, size=request["size"], source_bytes=source_bytes)
    provenance = {"tool": f"mlip-cli {__version__}", "source": source.name, **request}
    holds: dict[str, str] = {}
    if source.format == "openmoji":
        provenance |= {"packages": list(source.versions), **attribution()}
        holds = split_words(read.limit)
    again = "run the same command again: it goes on"
    with (
        interrupted_as(f"{out}: interrupted; {again}"),
        full_disk_named(out, f"make room and {again}"),
        opened(out, request) as work,
    ):
        try:
            options = PartOptions(str(work.parts), request["size"], render=source.format == "openmoji")
            if survey.addresses:
                options = replace(options, download=downloads.share(survey.addresses, download, num_workers))
            results = _prepare_parts(work, source, read, survey, options, num_workers=num_workers)
            share = held_out_share(request["holdout"], survey.pictures)
            splits, is_held_out = _write_splits(work, results, holdout=share, provenance=provenance, holds=holds)
        except SourceError as error:
            work.discard()
            raise SourceError(f"{source.name}: {error}; nothing was kept") from None
        num_rejects = _write_rejects(work, results)
        num_samples = sum(split.num_samples for split in splits.values())
        if num_samples + num_rejects != survey.pictures:
            raise RunError(
                f"{out}: {survey.pictures} pictures in, but {num_samples} samples, {num_rejects} rejects out"
            )
        summary = Summary(
            out=str(out),
            source=source.name,
            request=request,
            rows=survey.rows,
            rejects=num_rejects,
            reasons=dict(_reasons(results).most_common()),
            splits=splits,
            held_out=is_held_out,
            attribution=provenance.get("attribution"),
            seconds=round(time.monotonic() - started, 2),
            next=next_commands(source.format, out, splits),
            pictures=survey.pictures,
            passed_over=passed.counts | survey.spelled.counts,
        )
        work.publish(summary)
    return summary


def _say_understood(source: DataSource, survey: Survey, passed: PassedOver) -> None:
    """What was understood of the source, the first pairs, what is not read, and what looks wrong."""
    say(f"{source.name}: {source.describe()}; {survey.in_words()}")
    source.notes.tell_readings(source.name, say=say)
    if source.format == "metadata":
        say("; ".join(dict.fromkeys(plan.in_words() for plan in source.table_plans)))
    if survey.first:
        say(f"first: {'; '.join(survey.first)}")
    if survey.spelled.counts:
        say(survey.spelled.in_words())
    if passed.counts:
        cure = "; convert the pictures among them to JPEG" if any(map(is_unread_picture, source.names)) else ""
        say(f"not read: {passed.in_words()}{cure}")
    if source.is_folder and source.format == "metadata" and (missing := missing_shards(source.tables)):
        warn(missing)
    for name, why in source.unread_tables.items() if source.format == "classes" else ():
        warn(f"{escaped(name)}: not read as a table: {why}")
    for text in survey.looks.warnings(are_classes=source.format == "classes"):
        warn(text)


def _prepare_parts(
    work: Workspace,
    source: DataSource,
    read: ReadOptions,
    survey: Survey,
    options: PartOptions,
    *,
    num_workers: int,
) -> list[PartResult]:
    """Prepare the parts that are not finished yet. Returns all results, in the order of the source.

    Raises:
        SourceError: most of the first rows fail for one reason.
        RunError: a worker was killed, or the source has changed.
    """
    results = work.results()
    done = frozenset(results)
    todo = (part for part in parts_of(read_records(source, read, survey.shared)) if part.number not in done)
    prepared, at_once = partial(prepare_part, options=options), PARTS_AT_ONCE if options.download else 1
    reasons = _reasons(list(results.values()))
    with progress(survey.pictures, "preparing") as bar:
        bar.advance(bar.task_ids[0], sum(result.rows for result in results.values()))
        _check_first_rows(work, results)
        for result in run_parallel(prepared, todo, num_workers=num_workers, at_once=at_once):
            results[result.number] = result
            reasons.update(result.reasons)
            if options.download:
                bar.update(bar.task_ids[0], description=downloads.outcomes_in_words(results.values(), reasons))
            bar.advance(bar.task_ids[0], result.rows)
            _check_first_rows(work, results)
    if (rows := sum(result.source_rows for result in results.values())) != survey.rows:
        raise RunError(f"{work.out}: {rows} rows where {survey.rows} were counted; did the source change? Start again")
    ordered = [results[number] for number in sorted(results)]
    _check_reasons(work, ordered, enough=FEWEST_ROWS, which="")
    return ordered


def _check_first_rows(work: Workspace, results: Mapping[int, PartResult]) -> None:
    """Stop early if the source is a wrong folder or a wrong column is read."""
    first: list[PartResult] = []
    while len(first) in results and sum(result.rows for result in first) < FIRST_ROWS:
        first.append(results[len(first)])
    _check_reasons(work, first, enough=FIRST_ROWS, which="first ")


def _check_reasons(work: Workspace, results: Sequence[PartResult], *, enough: int, which: str) -> None:
    """Check that the rows do not mostly fail for one reason. `which` says which rows these are.

    Raises:
        SourceError: they do.
    """
    rows = sum(result.rows for result in results)
    for reason, n in _reasons(results).most_common(1):
        if rows >= enough and n > rows * downloads.most_alike(reason, is_first=bool(which)):
            example = _first_reject(work, results)
            cure = f"; {CURES[reason]}" if reason in CURES else ""
            same = f"{n} of the {which}{rows} rows fail for the same reason: {reason} (first: {example}){cure}"
            raise SourceError(same)


def _reasons(results: Sequence[PartResult]) -> Counter[str]:
    """Number of rejects by reason."""
    return sum((Counter(result.reasons) for result in results), Counter[str]())


def _rejects(work: Workspace, result: PartResult) -> list[dict[str, Any]]:
    """file, row, reason and detail of each reject of a part."""
    lines = (work.parts / result.tar).with_suffix(".rejects.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _first_reject(work: Workspace, results: Sequence[PartResult]) -> str:
    reject = next(reject for result in results for reject in _rejects(work, result))
    return f"{reject['file']} row {reject['row']}: {reject['detail'] or reject['reason']}"


def _write_splits(
    work: Workspace,
    results: Sequence[PartResult],
    *,
    holdout: float,
    provenance: Mapping[str, Any],
    holds: Mapping[str, str],
) -> tuple[dict[str, SplitSummary], bool]:
    """Put the parts together to splits in `work.finished`. The second value is True if we drew validation.

    Args:
        holds: what a split holds, in words, where the source says more than its name.

    Raises:
        SourceError: no row became a sample.
    """
    tables = [np.load((work.parts / result.tar).with_suffix(".npy"), allow_pickle=False) for result in results]
    table = np.concatenate(tables)
    if not len(table):
        rows = plural(sum(result.rows for result in results), "row")
        reasons = ", ".join(f"{n:,} x {reason}" for reason, n in _reasons(results).most_common())
        raise SourceError(f"none of the {rows} became a sample: {reasons} (first: {_first_reject(work, results)})")
    starts = np.cumsum([len(part) for part in tables])[:-1]
    places = np.split(assign_splits(table, holdout=holdout), starts)
    work.finished.mkdir()
    splits = {}
    for code, split in enumerate(SPLITS):
        samples = [
            StoredSamples(work.parts / result.tar, part["record"][place == code])
            for result, part, place in zip(results, tables, places, strict=True)
        ]
        if any(len(stored.records) for stored in samples):
            own = {**provenance, "holds": holds[split]} if split in holds else provenance
            card = write_split(work.finished / split, split, samples, provenance=own)
            splits[split] = SplitSummary(
                card["num_samples"],
                card["num_bytes"],
                card["fingerprint"],
                num_shards=len(card["shards"]),
                distinct_captions=card["statistics"]["distinct_captions"],
                holds=holds.get(split),
            )
    return splits, "validation" in splits and not has_own_splits(table)


def assign_splits(table: NDArray[np.void], *, holdout: float) -> NDArray[np.uint8]:
    """Place in SPLITS of each sample: (n,) of PART_ROW -> (n,).

    Splits of the source are kept. If it has neither validation nor test, the samples whose pixel hash lies in the
    lowest `holdout` of all hashes become validation, at most 5,000. Equal pixels stay together, and adding data never
    moves a sample from one side to the other (until the cap is reached).
    """
    splits = table["split"].copy()
    splits[splits == NO_SPLIT] = SPLITS.index("train")
    if has_own_splits(table):
        return splits
    hashes = table["pixels"]
    below = hashes < np.uint64(int(holdout * 2.0**64))
    if below.sum() > MAX_HELD_OUT:
        below = hashes < np.sort(hashes)[MAX_HELD_OUT]
    splits[below] = SPLITS.index("validation")
    return splits


def has_own_splits(table: NDArray[np.void]) -> bool:
    """True when a sample (of PART_ROW) comes from a validation or test split of the source."""
    return bool(((table["split"] != NO_SPLIT) & (table["split"] != SPLITS.index("train"))).any())


def _write_rejects(work: Workspace, results: Sequence[PartResult]) -> int:
    """Write rejects.parquet in `work.finished`. Returns the number of its rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("file", pa.string()), ("row", pa.int64()), ("reason", pa.string()), ("detail", pa.string())])
    path, num_rejects = work.finished / "rejects.parquet", 0
    with pq.ParquetWriter(path, schema) as writer:
        for result in results:
            rejects = _rejects(work, result)
            writer.write_table(pa.Table.from_pylist(rejects, schema=schema))
            num_rejects += len(rejects)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return num_rejects


def _check_disk(out: Path, *, num_rows: int, size: int, source_bytes: int) -> None:
    """Refuse to start what cannot fit. Parts and shards exist side by side for a moment.

    Raises:
        UsageError: the estimated need is more than the free space.
    """
    sample = BYTES_A_PIXEL * size * size * 4 / 3
    if source_bytes:
        sample = min(sample, 2 * source_bytes / max(1, num_rows))
    needed = int(2 * num_rows * (sample + BYTES_A_SAMPLE))
    free = free_bytes(out)
    if needed > free:
        raise UsageError(
            f"{out}: about {needed / GIB:.1f} GiB needed, {free / GIB:.1f} GiB free on this disk; make room, name a "
            "folder on another disk, or take a smaller --size"
        )
