"""From a source to shards: workers prepare its parts in any order, then one process puts them together.

`prepare_part` depends on the part and the options alone, so the bytes of the output depend neither on the number of
workers and machines nor on the order of their work.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from mlip_cli import __version__
from mlip_cli.data.download.options import PARTS_AT_ONCE
from mlip_cli.data.prepare import downloads
from mlip_cli.data.prepare.duplicates import EvaluationSet
from mlip_cli.data.prepare.engines import run_parallel
from mlip_cli.data.prepare.fates import decided
from mlip_cli.data.prepare.finish import Finished, write_splits
from mlip_cli.data.prepare.job import Job
from mlip_cli.data.prepare.live import LiveCounts
from mlip_cli.data.prepare.locks import opened
from mlip_cli.data.prepare.parts import prepare_part
from mlip_cli.data.prepare.pixels import PERCEPTUAL
from mlip_cli.data.prepare.reasons import (
    FEWEST_ROWS,
    SourceError,
    check_first_rows,
    check_reasons,
    check_samples,
    reasons_of,
)
from mlip_cli.data.prepare.retried import Earlier, earlier_of
from mlip_cli.data.prepare.room import check_room
from mlip_cli.data.prepare.share import ALL_PARTS, EVERYTHING, Share
from mlip_cli.data.prepare.summary import SharePrepared, Summary, next_commands
from mlip_cli.data.prepare.understood import understood
from mlip_cli.data.prepare.workspace import PartOptions, PartResult, Workspace
from mlip_cli.data.sources.formats import read_records
from mlip_cli.data.sources.lists import published_list
from mlip_cli.data.sources.openmoji import attribution, split_words
from mlip_cli.data.sources.records import SourcePart, held_out_share, num_parts, parts_of
from mlip_cli.data.sources.survey import Survey
from mlip_cli.errors import RunError, UsageError, interrupted_as
from mlip_cli.files import full_disk_named
from mlip_cli.terminal.output import plural, say
from mlip_cli.terminal.panel import progress

MOST_MISSING = 2
"""Parts that are named; more are counted."""


def prepare(job: Job, *, finish_only: bool = False, retry: bool = False) -> Summary:
    """Prepare a source in OUT. An interrupted run is continued.

    Args:
        finish_only: other processes have prepared all parts.
        retry: OUT is finished; try the rows again that failed and can pass.

    Raises:
        UsageError: the source cannot be read, the disk is too small, another process writes to OUT, or there are parts
            left to prepare though `finish_only`.
        RunError: most rows fail, a worker was killed, or the disk is full.
        Stopped: Ctrl-C or SIGTERM.
    """
    started = time.monotonic()
    out = job.out
    job, survey, passed = understood(job)
    source = job.source
    check_room(job, survey)
    provenance = _provenance(job)
    with _at_work(job, may_be_finished=retry) as work:
        earlier = earlier_of(work, job, survey, is_alone=not finish_only, begins=retry)
        try:
            if finish_only:
                _check_gaps(work, (part.number for part in parts_of(read_records(source, survey.shared))))
            results, finished = _both_passes(work, job, survey, earlier, provenance=provenance)
            reasons = reasons_of(results) + Counter(finished.dropped)
            check_samples(work, results, finished, reasons)
        except SourceError as error:
            if earlier:
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


def _both_passes(
    work: Workspace, job: Job, survey: Survey, earlier: Earlier | None, *, provenance: Mapping[str, Any]
) -> tuple[list[PartResult], Finished]:
    """Prepare the parts and put them together. Raises as `_prepare_parts` and `write_splits`."""
    sets = _evaluation_sets(work, job)
    results = _prepare_parts(work, job, survey, earlier)
    finished = write_splits(
        work,
        results,
        holdout=held_out_share(job.request["holdout"], survey.pictures),
        provenance=provenance,
        holds=split_words(job.source.read.limit) if job.source.format == "openmoji" else {},
        decide=partial(decided, cleaning=job.cleaning, sets=sets),
    )
    return results, finished


def prepare_share(job: Job, share: Share) -> SharePrepared:
    """Prepare the parts of a share, beside processes that prepare the others, and finish nothing.

    Raises:
        UsageError, RunError, Stopped: as `prepare`.
    """
    job, survey, _ = understood(job)
    check_room(job, survey)
    with _at_work(job, share) as work:
        earlier_of(work, job, survey, is_alone=False)
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
        interrupted_as(f"{job.out}: interrupted; {again}", hears_sigterm=True),
        full_disk_named(job.out, f"make room and {again}"),
        opened(job.out, job.request, share, may_be_finished=may_be_finished) as work,
    ):
        yield work


def _provenance(job: Job) -> dict[str, Any]:
    """What dataset.json tells of the source and of how it was read."""
    found = {"tool": f"mlip-cli {__version__}", "source": job.source.name, **job.request}
    if job.cleaning.compares_looks:
        found["perceptual"] = PERCEPTUAL
    if preset := job.source.read.preset:
        known = published_list(preset)
        found |= {"list": known.title, "licence": known.licence}
    if job.source.format == "openmoji":
        found |= {"packages": list(job.source.versions), **attribution()}
    return found


def _prepare_parts(work: Workspace, job: Job, survey: Survey, earlier: Earlier | None) -> list[PartResult]:
    """Prepare the parts that are not finished yet. Returns all results, in the order of the source.

    With `earlier`, only rows that are tried again are prepared, and nothing is thrown away however many fail.

    Raises:
        SourceError: most rows fail for one reason.
        RunError: a worker was killed, or the source has changed.
    """
    results = _make_parts(work, job, survey, earlier=earlier)
    if earlier:
        return earlier.joined(results, source_rows=survey.rows)
    if (rows := sum(result.source_rows for result in results)) != survey.rows:
        raise RunError(f"{work.out}: {rows} rows where {survey.rows} were counted; did the source change? Start again")
    if job.source.rewritten_by_sha256:
        rewritten = plural(sum(result.rewritten for result in results), "sample")
        say(f"captions of {job.source.read.captions_from} for {rewritten}")
    check_reasons(work, results, enough=FEWEST_ROWS, which="")
    return results


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
    num_rows = len(earlier.places) if earlier else survey.pictures
    about = -(-num_rows // share.count)
    options = PartOptions(str(work.parts), job.size, job.source.format == "openmoji", job.cleaning)
    if rewritten := job.source.rewritten_by_sha256:
        options = replace(options, captions=str(rewritten.stem), adds_captions=rewritten.file.adds)
    at_once = PARTS_AT_ONCE if survey.addresses else 1
    if survey.addresses:
        num_processes = job.engine.num_processes(at_once)
        if survey.addresses + survey.rejects == survey.rows:  # pictures inside would make more parts than rows tell
            num_processes = min(num_processes, num_parts(about))  # a worker without a part asks nobody
        pictures = plural(min(survey.addresses, about), "picture")
        pictures = pictures if share == EVERYTHING else f"about {pictures}"
        options = replace(options, download=downloads.shared_by(num_processes, job.download, pictures=pictures))
    results = {number: result for number, result in work.results().items() if share.has(number)}
    done = frozenset(results)
    prepared = partial(prepare_part, options=options)

    def to_do() -> Iterator[SourcePart]:
        rows = read_records(job.source, survey.shared)
        for part in earlier.parts(rows) if earlier else parts_of(rows):
            if numbers is not None:
                numbers.append(part.number)
            if share.has(part.number) and part.number not in done:
                yield part

    with progress(about, "trying again" if earlier else "preparing") as bar:
        live = LiveCounts(bar, about, results.values(), are_downloads=options.download is not None)
        if not earlier:
            check_first_rows(work, results, share)
        try:
            for result in run_parallel(
                prepared, to_do(), engine=job.engine, folder=work.parts, at_once=at_once, hear=live.hear
            ):
                results[result.number] = result
                live.finished(result)
                if not earlier:
                    check_first_rows(work, results, share)
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
    named = [str(number + 1) for number in missing[:MOST_MISSING]]  # people count from one, as --part does
    if len(missing) > MOST_MISSING:
        named.append(f"{len(missing) - MOST_MISSING} more")
    counts = work.counts_of_shares()
    cure = ALL_PARTS
    if len(counts) == 1:
        (count,) = counts
        shares = sorted({number % count + 1 for number in missing})
        cure = (
            f"run the same command with {' and with '.join(f'--part {i}/{count}' for i in shares)} instead of --finish"
        )
    what = f"part {named[0]} is" if len(missing) == 1 else f"parts {', '.join(named[:-1])} and {named[-1]} are"
    raise UsageError(f"{work.out}: {what} missing; {cure}")


def _evaluation_sets(work: Workspace, job: Job) -> list[EvaluationSet]:
    """The pictures that stay out of training."""
    if not job.excluded:
        return []
    from mlip_cli.data.prepare.exclusion import hashed_set

    num_workers = job.engine.num_workers_here
    return [hashed_set(place, folder=work.folder, size=job.size, num_workers=num_workers) for place in job.excluded]
