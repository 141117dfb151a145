"""From a source to shards: workers prepare its parts in any order, then one process puts them together.

`prepare_part` depends on the part and the options alone, so the bytes of the output depend neither on the number of
workers and machines nor on the order of their work.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from mlip_cli import __version__
from mlip_cli.data.download.options import PARTS_AT_ONCE
from mlip_cli.data.prepare import downloads, shards
from mlip_cli.data.prepare.duplicates import EvaluationSet
from mlip_cli.data.prepare.fates import decided
from mlip_cli.data.prepare.filters import REASONS
from mlip_cli.data.prepare.finish import Finished, write_splits
from mlip_cli.data.prepare.job import Job
from mlip_cli.data.prepare.parts import prepare_part
from mlip_cli.data.prepare.pixels import PERCEPTUAL
from mlip_cli.data.prepare.rejects import rejects_of
from mlip_cli.data.prepare.retried import Earlier, begin, earlier_parts, is_begun
from mlip_cli.data.prepare.summary import SharePrepared, Summary, next_commands
from mlip_cli.data.prepare.workers import run_parallel
from mlip_cli.data.prepare.workspace import (
    DONE,
    EVERYTHING,
    PartOptions,
    PartResult,
    Share,
    Workspace,
    opened,
    refuse_links,
)
from mlip_cli.data.sources.find import DataSource, read_records
from mlip_cli.data.sources.listing import PassedOver, is_unread_picture
from mlip_cli.data.sources.lists import published_list
from mlip_cli.data.sources.openmoji import attribution, split_words
from mlip_cli.data.sources.records import WISHED, SourcePart, held_out_share, parts_of, parts_of_some
from mlip_cli.data.sources.rules import list_warnings
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
SHARDS_BESIDE_PARTS = 3
"""What the disk holds beside the data themselves: a shard of each of two splits, and one that is being written."""
MOST_MISSING = 2
"""Parts that are named; more are counted."""


ASKED_FOR = REASONS | WISHED
"""Reasons of rejects that the user asked for: however many there are, the source is as it should be."""


class SourceError(RunError):
    """Most rows of the source fail; nothing of the work is worth keeping."""


def prepare(job: Job, *, finish_only: bool = False, retry: bool = False) -> Summary:
    """Prepare a source in OUT. An interrupted run is continued.

    Args:
        finish_only: other processes have prepared all parts.
        retry: OUT is finished; try the rows again that failed and can pass.

    Raises:
        UsageError: the source cannot be read, the disk is too small, another process writes to OUT, or there are parts
            left to prepare though `finish_only`.
        RunError: most rows fail, a worker was killed, or the disk is full.
        Stopped: Ctrl-C.
    """
    started = time.monotonic()
    out = job.out
    job, survey, passed = _understood(job)
    source = job.source
    _check_disk(job, survey)
    provenance = _provenance(job)
    holds = split_words(job.read.limit) if source.format == "openmoji" else {}
    with _at_work(job, may_be_finished=retry) as work:
        if retry and (work.out / DONE).is_file():
            begin(work, read_records(source, job.read, survey.shared), num_pictures=survey.pictures)
        earlier = _earlier(work, is_alone=not finish_only)
        try:
            if finish_only:
                _check_gaps(work, (part.number for part in parts_of(read_records(source, job.read, survey.shared))))
            sets = _evaluation_sets(work, job)
            results = _prepare_parts(work, job, survey) if earlier is None else _retry(work, job, survey, earlier)
            share = held_out_share(job.request["holdout"], survey.pictures)
            finished = write_splits(
                work,
                results,
                holdout=share,
                provenance=provenance,
                holds=holds,
                decide=partial(decided, cleaning=job.cleaning, sets=sets),
            )
            reasons = _reasons(results) + Counter(finished.dropped)
            _check_samples(work, results, finished, reasons)
        except SourceError as error:
            if earlier is not None:
                raise
            work.discard()
            raise SourceError(f"{source.name}: {error}; nothing was kept") from None
        num_samples = sum(split.num_samples for split in finished.splits.values())
        if num_samples + reasons.total() != survey.pictures:
            raise RunError(
                f"{out}: {survey.pictures} pictures in, but {num_samples} samples, {reasons.total()} rejects out"
            )
        summary = Summary(
            out=str(out),
            source=source.name,
            request=dict(job.request),
            rows=survey.rows,
            rejects=reasons.total(),
            reasons=dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
            splits=finished.splits,
            held_out=finished.is_held_out,
            attribution=provenance.get("attribution"),
            seconds=round(time.monotonic() - started, 2),
            next=next_commands(source.format, out, finished.splits),
            pictures=survey.pictures,
            passed_over=passed.counts | survey.spelled.counts,
            cleaning=finished.found | {"captions_left_out": sum(result.captions_left_out for result in results)},
        )
        work.publish(summary)
    return summary


def prepare_share(job: Job, share: Share) -> SharePrepared:
    """Prepare the parts of a share, beside processes that prepare the others, and finish nothing.

    Raises:
        UsageError, RunError, Stopped: as `prepare`.
    """
    job, survey, _ = _understood(job)
    _check_disk(job, survey)
    with _at_work(job, share) as work:
        _earlier(work, is_alone=False)
        there = frozenset(filter(share.has, work.results()))
        numbers: list[int] = []
        try:
            results = _make_parts(work, job, survey, share=share, numbers=numbers)
        except SourceError as error:
            raise SourceError(f"{job.source.name}: {error}") from None
        missing = len(set(numbers) - set(work.results()))
    return SharePrepared(str(job.out), str(share), len(results) - len(there), len(there), len(numbers), missing)


@contextmanager
def _at_work(job: Job, share: Share | None = None, *, may_be_finished: bool = False) -> Iterator[Workspace]:
    """The workspace of OUT; a Ctrl-C or a full disk in the block becomes a line that says how to go on."""
    again = "run the same command again: it goes on"
    with (
        interrupted_as(f"{job.out}: interrupted; {again}"),
        full_disk_named(job.out, f"make room and {again}"),
        opened(job.out, job.request, share, may_be_finished=may_be_finished) as work,
    ):
        yield work


def _understood(job: Job) -> tuple[Job, Survey, PassedOver]:
    """Read the source once and say what was understood.

    Returns:
        The job, whose source knows the rules for its rows; what the source holds; what is not read.
    """
    with progress(None, "counting rows"):
        source, survey = _surveyed(job)
    passed = passed_over(source, survey)
    _say_understood(source, survey, passed)
    return replace(job, source=source), survey, passed


def _surveyed(job: Job) -> tuple[DataSource, Survey]:
    """The source with the rules that the user gave for its rows, and what it holds.

    Raises:
        UsageError, DamagedTarError: as `with_rules` and `surveyed`; nothing is left in OUT.
    """
    work = Workspace(job.out)
    try:
        if job.read.captions_from:
            refuse_links(work.out)
        source = job.source.with_rules(work.folder)
        return source, surveyed(source, job.read)
    except BaseException:
        work.discard_unbegun()
        raise


def _provenance(job: Job) -> dict[str, Any]:
    """What dataset.json tells of the source and of how it was read."""
    found = {"tool": f"mlip-cli {__version__}", "source": job.source.name, **job.request}
    if job.cleaning.compares_looks:
        found["perceptual"] = PERCEPTUAL
    if job.read.preset:
        known = published_list(job.read.preset)
        found |= {"list": known.title, "licence": known.licence}
    if job.source.format == "openmoji":
        found |= {"packages": list(job.source.versions), **attribution()}
    return found


def _say_understood(source: DataSource, survey: Survey, passed: PassedOver) -> None:
    """What was understood of the source, the first pairs, what is not read, and what looks wrong."""
    say(f"{source.name}: {source.describe()}; {survey.in_words()}")
    source.notes.tell_readings(source.name, say=say)
    source.notes.tell_damage(source.name, num_tars=len(source.tars()), warn=warn)
    if source.format == "metadata":
        say("; ".join(dict.fromkeys(plan.in_words() for plan in source.table_plans)))
    if survey.first:
        say(f"first: {'; '.join(survey.first)}")
    for text in source.rules.remarks() if source.rules else ():
        say(text)
    if survey.spelled.counts:
        say(survey.spelled.in_words())
    if passed.counts:
        cure = "; convert the pictures among them to JPEG" if any(map(is_unread_picture, source.names)) else ""
        say(f"not read: {passed.in_words()}{cure}")
    if source.is_folder and source.format == "metadata" and (missing := missing_shards(source.tables)):
        warn(missing)
    for name, why in source.unread_tables.items() if source.format == "classes" else ():
        warn(f"{escaped(name)}: not read as a table: {why}")
    for text in list_warnings(source.read, source.rules, num_rows=survey.rows):
        warn(text)
    for text in survey.looks.warnings(are_classes=source.format == "classes"):
        warn(text)


def _prepare_parts(work: Workspace, job: Job, survey: Survey) -> list[PartResult]:
    """Prepare the parts that are not finished yet. Returns all results, in the order of the source.

    Raises:
        SourceError: most rows fail for one reason.
        RunError: a worker was killed, or the source has changed.
    """
    results = _make_parts(work, job, survey)
    if (rows := sum(result.source_rows for result in results)) != survey.rows:
        raise RunError(f"{work.out}: {rows} rows where {survey.rows} were counted; did the source change? Start again")
    if job.source.rewritten_by_sha256:
        say(f"captions of {job.read.captions_from} for {sum(result.rewritten for result in results):,} samples")
    _check_reasons(work, results, enough=FEWEST_ROWS, which="")
    return results


def _earlier(work: Workspace, *, is_alone: bool) -> Earlier | None:
    """What an earlier run made, where this one tries failed rows of it again.

    Args:
        is_alone: this process does all that is left; else it prepares a share, or finishes what others prepared.

    Raises:
        UsageError: not alone.
    """
    if not is_alone and is_begun(work):
        raise UsageError(f"{work.out}: --retry-failed has begun here; run it again without --part and --finish")
    return earlier_parts(work)


def _retry(work: Workspace, job: Job, survey: Survey, earlier: Earlier) -> list[PartResult]:
    """Prepare the rows again that failed. Returns the results of all rows; nothing of it is thrown away.

    Rows of the source and captions are counted by what was there before, which counted those of failed rows too.

    Raises:
        RunError: a worker was killed.
    """
    retried = _make_parts(work, job, survey, earlier=earlier)
    *of_shards, rest = earlier.results
    rest = replace(rest, source_rows=survey.rows, captions_left_out=earlier.captions_left_out)
    return [*of_shards, rest, *(replace(result, source_rows=0, captions_left_out=0) for result in retried)]


def _make_parts(
    work: Workspace,
    job: Job,
    survey: Survey,
    *,
    share: Share = EVERYTHING,
    numbers: list[int] | None = None,
    earlier: Earlier | None = None,
) -> list[PartResult]:
    """Prepare the parts of a share that are not finished yet. Returns the results of the share, in order.

    Args:
        numbers: the number of every part of the source is appended to it.
        earlier: prepare only the rows that are tried again.

    Raises:
        SourceError: most of the first rows fail for one reason.
        RunError: a worker was killed.
    """
    num_rows = survey.pictures if earlier is None else len(earlier.places)
    options = PartOptions(str(work.parts), job.size, job.source.format == "openmoji", job.cleaning)
    if rewritten := job.source.rewritten_by_sha256:
        options = replace(options, captions=str(rewritten.stem), adds_captions=rewritten.file.adds)
    if survey.addresses:
        options = replace(
            options, download=downloads.share(min(survey.addresses, num_rows), job.download, job.num_workers)
        )
    results = {number: result for number, result in work.results().items() if share.has(number)}
    done = frozenset(results)
    reasons = _reasons(list(results.values()))
    prepared, at_once = partial(prepare_part, options=options), PARTS_AT_ONCE if options.download else 1

    def to_do() -> Iterator[SourcePart]:
        rows = read_records(job.source, job.read, survey.shared)
        some = earlier and parts_of_some(rows, earlier.places.tolist(), first_number=len(earlier.results))
        for part in some or parts_of(rows):
            if numbers is not None:
                numbers.append(part.number)
            if share.has(part.number) and part.number not in done:
                yield part

    with progress(-(-num_rows // share.count), "preparing" if earlier is None else "trying again") as bar:
        bar.advance(bar.task_ids[0], sum(result.rows for result in results.values()))
        check_first = partial(_check_first_rows, work, results, share) if earlier is None else int
        check_first()
        try:
            for result in run_parallel(prepared, to_do(), num_workers=job.num_workers, at_once=at_once):
                results[result.number] = result
                reasons.update(result.reasons)
                if options.download:
                    bar.update(bar.task_ids[0], description=downloads.outcomes_in_words(results.values(), reasons))
                bar.advance(bar.task_ids[0], result.rows)
                check_first()
        finally:
            job.source.check_unchanged()  # first of all: a change makes any other error
    return [results[number] for number in sorted(results)]


def _check_gaps(work: Workspace, numbers: Iterator[int]) -> None:
    """See that every part is there.

    Raises:
        UsageError: some are missing; it names them and the commands that prepare them.
    """
    done = work.results()
    missing = [number for number in numbers if number not in done]
    if not missing:
        return
    named = [str(number) for number in missing[:MOST_MISSING]]
    if len(missing) > MOST_MISSING:
        named.append(f"{len(missing) - MOST_MISSING} more")
    counts = work.counts_of_shares()
    cure = "run the same command without --finish, or with --part 1/N to --part N/N on N machines"
    if len(counts) == 1:
        (count,) = counts
        shares = sorted({number % count + 1 for number in missing})
        cure = (
            f"run the same command with {' and with '.join(f'--part {i}/{count}' for i in shares)} instead of --finish"
        )
    what = f"part {named[0]} is" if len(missing) == 1 else f"parts {', '.join(named[:-1])} and {named[-1]} are"
    raise UsageError(f"{work.out}: {what} missing; {cure}")


def _check_first_rows(work: Workspace, results: Mapping[int, PartResult], share: Share) -> None:
    """Stop early if the source is a wrong folder or a wrong column is read."""
    first: list[PartResult] = []
    number = share.index - 1
    while number in results and sum(result.rows for result in first) < FIRST_ROWS:
        first.append(results[number])
        number += share.count
    _check_reasons(work, first, enough=FIRST_ROWS, which="first ")


def _check_reasons(work: Workspace, results: Sequence[PartResult], *, enough: int, which: str) -> None:
    """Check that the rows do not mostly fail for one reason. `which` says which rows these are.

    Raises:
        SourceError: they do.
    """
    reasons = _reasons(results)
    rows = sum(result.rows for result in results) - sum(reasons[asked] for asked in ASKED_FOR)
    for reason, n in reasons.items():
        most = rows * downloads.most_alike(reason, is_first=bool(which))
        if rows >= enough and n > most and reason not in ASKED_FOR:
            example = _first_reject(work, results, reason)
            cure = f"; {CURES[reason]}" if reason in CURES else ""
            passed = " that pass the rules" if reasons.keys() & ASKED_FOR else ""
            same = f"{n} of the {which}{rows} rows{passed} fail for the same reason: {reason} (first: {example}){cure}"
            raise SourceError(same)


def _reasons(results: Sequence[PartResult]) -> Counter[str]:
    """Number of rejects by reason."""
    return sum((Counter(result.reasons) for result in results), Counter[str]())


def _first_reject(work: Workspace, results: Sequence[PartResult], reason: str | None = None) -> str:
    """The first row that fails, or that fails for a reason, in words."""
    all_rejects = (reject for result in results for reject in rejects_of(work.parts / result.tar))
    reject = next(reject for reject in all_rejects if reason in (None, reject["reason"]))
    return f"{reject['file']} row {reject['row']}: {reject['detail'] or reject['reason']}"


def _evaluation_sets(work: Workspace, job: Job) -> list[EvaluationSet]:
    """The pictures that stay out of training."""
    if not job.excluded:
        return []
    from mlip_cli.data.prepare.exclusion import hashed_set

    return [hashed_set(place, folder=work.folder, size=job.size, num_workers=job.num_workers) for place in job.excluded]


def _check_samples(
    work: Workspace, results: Sequence[PartResult], finished: Finished, reasons: Mapping[str, int]
) -> None:
    """See that a row became a sample.

    Raises:
        SourceError: none did.
    """
    if not finished.splits:
        rows = plural(sum(result.rows for result in results), "row")
        listed = ", ".join(f"{n:,} x {reason}" for reason, n in Counter(reasons).most_common())
        first = "" if finished.dropped else f" (first: {_first_reject(work, results)})"
        raise SourceError(f"none of the {rows} became a sample: {listed}{first}")


def _check_disk(job: Job, survey: Survey) -> None:
    """Refuse to start what cannot fit: the samples once, and a few shards that lie beside the parts they come from.

    Raises:
        UsageError: the estimated need is more than the free space and what an earlier run has written.
    """
    out = job.out
    sample = BYTES_A_PIXEL * job.size * job.size * 4 / 3
    num_rows = survey.pictures
    if source_bytes := 0 if survey.addresses else job.source.num_bytes:
        sample = min(sample, 2 * source_bytes / max(1, num_rows))
    samples = int(num_rows * (sample + BYTES_A_SAMPLE))
    needed = samples + min(samples, SHARDS_BESIDE_PARTS * shards.SHARD_BYTES) - Workspace(out).num_bytes()
    free = free_bytes(out)
    if needed > free:
        raise UsageError(
            f"{out}: about {needed / GIB:.1f} GiB needed, {free / GIB:.1f} GiB free on this disk; make room, name a "
            "folder on another disk, or take a smaller --size"
        )
