"""From records to shards: parts in any order on any worker, then one finisher that puts them together.

`prepare_part` is a function of the part and the options alone, so the bytes of the output depend neither on the number
of workers nor on who did what when.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlip_cli.data.prepare.parts import NO_SPLIT, PartOptions, prepare_part
from mlip_cli.data.prepare.shards import StoredSamples, write_split
from mlip_cli.data.prepare.workers import run_parallel
from mlip_cli.data.prepare.workspace import PartResult, Workspace
from mlip_cli.data.sources.records import MAX_HELD_OUT, SPLITS, SourcePart
from mlip_cli.errors import RunError, Stopped, UsageError
from mlip_cli.files import full_disk_named
from mlip_cli.terminal.output import plural

FIRST_ROWS = 1_000
"""So many rows show whether the source is what it seems; fewer than FEWEST_ROWS do not."""
FEWEST_ROWS = 50

BYTES_A_PIXEL = 0.5
"""For the estimate of disk space: between JPEG and lossless WebP of photographs at 256 pixels."""
BYTES_A_SAMPLE = 4096
"""Tar headers and texts."""


class SourceError(RunError):
    """The source is not what it seems; there is nothing worth keeping."""


def prepare_parts(
    work: Workspace,
    parts: Iterable[SourcePart],
    options: PartOptions,
    *,
    num_rows: int,
    num_workers: int,
    advance: Callable[[int], None],
) -> list[PartResult]:
    """Prepare the parts that the journal lacks; all results, in the order of the source.

    Raises:
        RunError: most of the first rows fail for one reason, a worker was killed, or the disk is full.
    """
    results = work.results()
    done = set(results)
    advance(sum(result.rows for result in results.values()))
    _check_first_rows(work, results)
    todo = (part for part in parts if part.number not in done)
    for result in run_parallel(partial(prepare_part, options=options), todo, num_workers=num_workers):
        work.remember(result)
        results[result.number] = result
        advance(result.rows)
        _check_first_rows(work, results)
    if (rows := sum(result.rows for result in results.values())) != num_rows:
        raise RunError(f"{work.out}: {rows} rows where {num_rows} were counted; did the source change? Start again")
    return [results[number] for number in sorted(results)]


def _check_first_rows(work: Workspace, results: Mapping[int, PartResult], *, is_all: bool = False) -> None:
    """Stop early when the source is not what it seems: a wrong folder, a wrong column."""
    rows, reasons = 0, Counter[str]()
    for number in range(len(results)):
        if number not in results or rows >= FIRST_ROWS:
            break
        rows, reasons = rows + results[number].rows, reasons + Counter(results[number].reasons)
    if rows < (FEWEST_ROWS if is_all else FIRST_ROWS):
        return
    for reason, n in reasons.most_common(1):
        if n > rows / 2:
            example = _first_reject(work, [results[number] for number in sorted(results)])
            raise SourceError(f"{n} of the first {rows} rows fail for the same reason: {reason} (first: {example})")


def _first_reject(work: Workspace, results: Iterable[PartResult]) -> str:
    for result in results:
        for line in (work.parts / result.tar).with_suffix(".rejects.jsonl").read_text().splitlines():
            reject = json.loads(line)
            return f"{reject['file']} row {reject['row']}: {reject['detail'] or reject['reason']}"
    return "none"


@dataclass(frozen=True)
class Finished:
    """What lies in `work.finished`."""

    cards: dict[str, dict[str, Any]]
    """dataset.json of each split."""
    is_held_out: bool
    """True when validation was drawn by us; the source has no splits."""


def finish(work: Workspace, results: list[PartResult], *, holdout: float, provenance: Mapping[str, Any]) -> Finished:
    """Put the parts together to splits and rejects.parquet, in `work.finished`."""
    _check_first_rows(work, dict(enumerate(results)), is_all=True)
    rows, num_rejects = sum(result.rows for result in results), sum(result.rejects for result in results)
    if num_rejects == rows:
        raise SourceError(f"none of the {plural(rows, 'row')} became a sample (first: {_first_reject(work, results)})")
    tables = [np.load((work.parts / result.tar).with_suffix(".npy"), allow_pickle=False) for result in results]
    table = np.concatenate(tables)
    places = assign_splits(table, holdout=holdout)
    cards = {}
    work.finished.mkdir()
    for code, split in enumerate(SPLITS):
        starts = np.cumsum([0, *map(len, tables)])
        samples = []
        for result, part, start in zip(results, tables, starts[:-1], strict=True):
            chosen = part["record"][places[start : start + len(part)] == code]
            if len(chosen):
                samples.append(StoredSamples(work.parts / result.tar, chosen))
        if samples:
            cards[split] = write_split(work.finished / split, split, samples, provenance=provenance)
    num_rejects = _write_rejects(work, results)
    num_samples = sum(card["num_samples"] for card in cards.values())
    if num_samples + num_rejects != rows:
        raise RunError(f"{work.out}: {rows} rows in, but {num_samples} samples and {num_rejects} rejects out")
    return Finished(cards, is_held_out="validation" in cards and not has_own_splits(table))


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


def _write_rejects(work: Workspace, results: list[PartResult]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("file", pa.string()), ("row", pa.int64()), ("reason", pa.string()), ("detail", pa.string())])
    num_rejects = 0
    with pq.ParquetWriter(work.finished / "rejects.parquet", schema) as writer:
        for result in results:
            lines = (work.parts / result.tar).with_suffix(".rejects.jsonl").read_text().splitlines()
            writer.write_table(pa.Table.from_pylist([json.loads(line) for line in lines], schema=schema))
            num_rejects += len(lines)
    with open(work.finished / "rejects.parquet", "rb") as file:
        os.fsync(file.fileno())
    return num_rejects


def check_disk(out: Path, *, rows: int, size: int, source_bytes: int) -> None:
    """Refuse to start what cannot fit: parts and shards exist side by side for a moment.

    Raises:
        UsageError: an estimate of the space needed is more than what is free.
    """
    sample = min(BYTES_A_PIXEL * size * size * 4 / 3, 2 * source_bytes / max(1, rows) if source_bytes else float("inf"))
    needed = int(2 * rows * (sample + BYTES_A_SAMPLE))
    free = shutil.disk_usage(next(folder for folder in (out, *out.absolute().parents) if folder.exists())).free
    if needed > free:
        raise UsageError(
            f"{out}: about {needed / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free on this disk; make room, name "
            "a folder on another disk, or take a smaller --size"
        )


@contextmanager
def interruptions_named(out: Path) -> Iterator[None]:
    """Say of Ctrl-C and of a full disk where it happened and what to do."""
    try:
        with full_disk_named(out, "make room and run the same command again: it goes on"):
            yield
    except KeyboardInterrupt:
        raise Stopped(f"{out}: interrupted; run the same command again: it goes on", exit_code=130) from None
