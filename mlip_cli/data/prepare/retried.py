"""Finished data that become parts again, so that pass 2 puts them together with the rows of --retry-failed.

OUT/retry.npz               hashes of all rows that passed pass 1 with the shard of each, and the places of the rejects
OUT/.prepare/earlier.json   prepared.json of before: while it is here, the work in .prepare is a retry
OUT/.prepare/parts/SPLIT/   splits of before; each shard is a part
OUT/.prepare/parts/earlier* a part without pictures: rejects that stay, and dropped rows

Every step can be killed. Until prepared.json moves, OUT is finished and whatever lies in .prepare is thrown away. After
that, whatever was in OUT moves once, by renames, and the tables of the parts follow from it, so each run makes them
again.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
from numpy.typing import NDArray

from mlip_cli.data.index import check_size, index_path, read_checked
from mlip_cli.data.prepare.job import Job
from mlip_cli.data.prepare.plan import DROPPED, Plan, PlannedShard
from mlip_cli.data.prepare.rejects import reject_places
from mlip_cli.data.prepare.retry import EARLIER, RETRY, RETRYABLE, is_begun
from mlip_cli.data.prepare.shards import PART_ROW
from mlip_cli.data.prepare.summary import CARD_PAGE, Summary
from mlip_cli.data.prepare.workspace import DONE, REJECTS, PartResult, Workspace
from mlip_cli.data.sources.formats import read_records
from mlip_cli.data.sources.records import SPLITS, Record, SourcePart, json_bytes, parts_of_some
from mlip_cli.data.sources.survey import Survey
from mlip_cli.errors import UsageError
from mlip_cli.files import atomic_path, remove, sync_folder, write_bytes
from mlip_cli.paths import escaped

HASHES = ("row", "sha256", "pixels", "perceptual", "split")
"""Fields of PART_ROW that an index does not hold."""
KEPT_ROW = np.dtype(
    [
        *((name, PART_ROW[name]) for name in HASHES),
        ("home", "u1"),  # place in SPLITS of the split that holds the sample, or DROPPED
        ("shard", "<u4"),  # its number in that split
    ]
)
"""A row that passed pass 1."""


@dataclass(frozen=True)
class Earlier:
    """What an earlier run made, as parts, and the rows that are tried again."""

    results: list[PartResult]
    """Numbered from 0."""
    places: NDArray[np.uint64]
    """(n,): of the rows that are tried again, in order."""
    captions_left_out: int
    """As the summary of before says: of all rows, of failed ones too."""

    def parts(self, records: Iterable[Record]) -> Iterator[SourcePart]:
        """The parts of the rows that are tried again; `records` are all of the source."""
        return parts_of_some(records, self.places.tolist(), first_number=len(self.results))

    def joined(self, retried: Sequence[PartResult], *, source_rows: int) -> list[PartResult]:
        """The results of all rows.

        Rows of the source and captions are counted by what was there before, which counted those of failed rows too.
        """
        *of_shards, rest = self.results
        rest = replace(rest, source_rows=source_rows, captions_left_out=self.captions_left_out)
        return [*of_shards, rest, *(replace(result, source_rows=0, captions_left_out=0) for result in retried)]


@dataclass(frozen=True)
class _Kept:
    """retry.npz."""

    rows: NDArray[np.void]
    """(n,) of KEPT_ROW, in the order of the source."""
    rejects: NDArray[np.uint64]
    """(m,): place in the whole source of each row of rejects.parquet."""

    @classmethod
    def read(cls, folder: Path, out: Path) -> "_Kept":
        """Read it, and see that rejects.parquet beside it has as many rows.

        Raises:
            UsageError: one of them is missing or damaged.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = folder / RETRY
        try:
            with np.load(path, allow_pickle=False) as file:
                rows = np.empty(file["row"].shape, KEPT_ROW)
                for name in KEPT_ROW.names or ():
                    rows[name] = file[name]
                kept = cls(rows, file["rejects"])
            num_rejects = pq.read_metadata(folder / REJECTS).num_rows
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, pa.ArrowException) as error:
            raise _unusable(out, str(error).splitlines()[0]) from None
        if num_rejects != len(kept.rejects):
            raise _unusable(out, f"{RETRY} does not fit {REJECTS}")
        return kept

    def shards(self) -> Iterator[tuple[str, NDArray[np.int64]]]:
        """SPLIT/NAME of each shard, and the places of its samples in `rows`."""
        for code, split in enumerate(SPLITS):
            rows = np.flatnonzero(self.rows["home"] == code)
            numbers = self.rows["shard"][rows]
            for own in np.split(rows, np.flatnonzero(np.diff(numbers)) + 1) if len(rows) else ():
                yield f"{split}/{split}-{int(self.rows['shard'][own[0]]):06d}.tar", own


def _unusable(out: Path, why: str) -> UsageError:
    return UsageError(f"{out}: its failed rows cannot be tried again ({why}); remove it and prepare it again")


def write_retry(path: Path, plan: Plan, shards: Sequence[PlannedShard]) -> None:
    """Write retry.npz for the shards of a plan, a column at a time, since there can be many rows."""

    def columns() -> Iterator[tuple[str, NDArray[Any]]]:
        yield from ((name, plan.tables[name]) for name in HASHES)
        yield "home", plan.splits
        numbers = np.zeros(len(plan.tables), KEPT_ROW["shard"])
        for shard in shards:
            numbers[shard.rows] = shard.number
        yield "shard", numbers
        yield "rejects", reject_places(plan)

    with atomic_path(path) as temporary, ZipFile(temporary, "w") as file:
        for name, column in columns():
            with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, column, allow_pickle=False)


def begin(work: Workspace, records: Iterable[Record], *, num_pictures: int) -> None:
    """Make a finished OUT an unfinished one. Nothing of it has changed when this raises.

    Args:
        records: all of the source. `num_pictures` is their number.

    Raises:
        UsageError, RunError: a file of OUT is missing or damaged, or rows of the source are counted otherwise now.
    """
    try:
        _check_whole(work, records, num_pictures=num_pictures)
    except BaseException:
        work.discard()
        raise
    for folder in (work.parts, work.finished):  # of a run that was killed after it wrote prepared.json
        remove(folder)
    work.parts.mkdir()
    os.replace(work.out / DONE, work.folder / EARLIER)
    sync_folder(work.folder)
    sync_folder(work.out)


def _check_whole(work: Workspace, records: Iterable[Record], *, num_pictures: int) -> None:
    """See that OUT can become parts. Args and errors are those of `begin`."""
    summary, kept = Summary.read(work.out / DONE), _Kept.read(work.out, work.out)
    for name, own in kept.shards():
        header, indexed = read_checked(index_path(work.out / name))
        check_size(work.out / name, header)
        if len(indexed) != len(own):
            raise _unusable(work.out, f"{RETRY} does not fit {name}")
    _check_places(work.out, records, _rejects(work.out, kept), is_same_number=summary.pictures == num_pictures)


def _check_places(
    out: Path, records: Iterable[Record], rejects: Iterable[dict[str, Any]], *, is_same_number: bool
) -> None:
    """See that each row that is tried again is where it was.

    Rows that name a picture are one record where it is there, and a reject each where it is missing. So a picture that
    appears can move all rows behind it, and their keys.

    Raises:
        UsageError: one is not.
    """
    wanted = (reject for reject in rejects if reject["reason"] in RETRYABLE)
    reject = next(wanted, None)
    for place, record in enumerate(records if is_same_number else ()):
        if reject is None:
            return
        if place == reject["place"]:
            if (escaped(record.file), record.row) != (reject["file"], reject["row"]):
                break
            reject = next(wanted, None)
    if reject is not None or not is_same_number:
        raise _unusable(out, "several rows name a picture that has appeared or gone since, so rows are counted anew")


def _rejects(folder: Path, kept: _Kept) -> Iterator[dict[str, Any]]:
    """The rows of rejects.parquet, each with its place."""
    import pyarrow.parquet as pq

    start = 0
    with pq.ParquetFile(folder / REJECTS) as file:
        for batch in file.iter_batches(batch_size=4096):
            places = kept.rejects[start : start + batch.num_rows].tolist()
            start += batch.num_rows
            for place, reject in zip(places, batch.to_pylist(), strict=True):
                yield {"place": place, **reject}


def earlier_of(work: Workspace, job: Job, survey: Survey, *, is_alone: bool, begins: bool = False) -> Earlier | None:
    """What the run before a retry made, as parts; None: this is no retry.

    Args:
        is_alone: this process does all that is left; else it prepares a share, or finishes what others prepared.
        begins: make OUT a retry if it is finished.

    Raises:
        UsageError: not alone.
        UsageError, RunError: a file of OUT is missing or damaged, or rows of the source are counted otherwise now.
    """
    if begins and (work.out / DONE).is_file():
        begin(work, read_records(job.source, survey.shared), num_pictures=survey.pictures)
    if not is_begun(work.folder):
        return None
    if not is_alone:
        raise UsageError(f"{work.out}: --retry-failed has begun here; run it again without --part and --finish")
    return _earlier_parts(work)


def _earlier_parts(work: Workspace) -> Earlier:
    """What was made, as parts.

    Raises:
        UsageError, RunError: a file of it is missing or damaged.
    """
    summary = Summary.read(work.folder / EARLIER)
    for name in (*summary.splits, REJECTS, RETRY, CARD_PAGE):
        if (work.out / name).exists() and not (work.parts / name).exists():
            os.replace(work.out / name, work.parts / name)
    sync_folder(work.parts)
    kept = _Kept.read(work.parts, work.out)
    results = []
    for number, (name, own) in enumerate(kept.shards()):
        tar = work.parts / name
        _write_part(tar, kept.rows[own], read_checked(index_path(tar))[1], b"")
        results.append(PartResult(number, len(own), name, {}))
    rest, places = _rest(work, kept, len(results))
    return Earlier([*results, rest], places, summary.cleaning.get("captions_left_out", 0))


def _rest(work: Workspace, kept: _Kept, number: int) -> tuple[PartResult, NDArray[np.uint64]]:
    """The part of all rows that lie in no shard, and the places of those that are tried again.

    Of a dropped row the place in its file alone is known, which `write_rejects` reads. So `earlier.tar` holds this in
    JSON one after another, and is no tar.
    """
    dropped = kept.rows[kept.rows["home"] == DROPPED]
    is_dropped = np.isin(kept.rejects, dropped["row"])
    records = np.zeros(len(dropped), PART_ROW["record"])
    places: list[int] = []
    reasons: dict[str, int] = {}
    lines: list[str] = []
    tar, num_dropped, offset = work.parts / "earlier.tar", 0, 0
    with atomic_path(tar) as temporary, open(temporary, "wb") as file:
        for was_dropped, reject in zip(is_dropped.tolist(), _rejects(work.parts, kept), strict=True):
            reason = reject["reason"]
            if was_dropped:
                content = json_bytes({"source": {"file": reject["file"], "row": reject["row"]}})
                records["offset"][num_dropped], records["json_size"][num_dropped] = offset, len(content)
                num_dropped, offset = num_dropped + 1, offset + file.write(content)
            elif reason in RETRYABLE:
                places.append(reject["place"])
            else:
                reasons[reason] = reasons.get(reason, 0) + 1
                lines.append(json.dumps(reject) + "\n")
    if num_dropped != len(dropped):
        raise _unusable(work.out, f"{RETRY} does not fit {REJECTS}")
    _write_part(tar, dropped, records, "".join(lines).encode())
    result = PartResult(number, len(dropped) + len(lines), tar.name, dict(sorted(reasons.items())))
    return result, np.array(places, np.uint64)


def _write_part(tar: Path, rows: NDArray[np.void], records: NDArray[np.void], rejects: bytes) -> None:
    """Write the table and the rejects of a part. `rows` is (n,) of KEPT_ROW, `records` (n,) of RECORD."""
    table = np.zeros(len(rows), PART_ROW)
    for name in HASHES:
        table[name] = rows[name]
    table["record"] = records
    with atomic_path(tar.with_suffix(".npy")) as temporary, open(temporary, "wb") as file:
        np.save(file, table, allow_pickle=False)
    write_bytes(tar.with_suffix(".rejects.jsonl"), rejects)
