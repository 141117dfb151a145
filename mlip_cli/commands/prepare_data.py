"""`mlip prepare-data`: a source of pictures and captions to shards."""

from dataclasses import asdict, replace
from pathlib import Path

from mlip_cli.commands.data_card import write_data_card
from mlip_cli.data.download.options import DEFAULTS, DownloadOptions
from mlip_cli.data.prepare.evaluation_places import EvaluationPlace, fingerprint_of
from mlip_cli.data.prepare.filters import AS_IT_IS, OWN_SPLITS, Cleaning
from mlip_cli.data.prepare.job import Job
from mlip_cli.data.prepare.retry import num_retryable
from mlip_cli.data.prepare.summary import CARD_PAGE, Summary, next_commands
from mlip_cli.data.prepare.workspace import DONE, Share, Workspace, finished_summary
from mlip_cli.data.sources.find import DataSource, find_pictures, find_source
from mlip_cli.data.sources.records import DAMAGED, REFUSE, ReadOptions
from mlip_cli.data.sources.rules import fingerprints
from mlip_cli.errors import UsageError
from mlip_cli.evaluate.datasets.find import find_benchmark, tree_fingerprint
from mlip_cli.machine import usable_cores
from mlip_cli.paths import check_can_be_made, check_utf8, escaped
from mlip_cli.terminal.output import print_json, say

DEFAULT_SIZE = {"openmoji": 64}
OTHER_SIZE = 256
"""Short side of photographs in pixels: 256 leave room for a random crop of 224."""
WITH_FILES = {
    "imagenet_folders": "",
    "imagenet_shards": "",
    "openmoji": "",
    "openmoji_combinations": "",
    "shards": "",
    "web_shards": "test",
}
"""Kinds of evaluation sets whose pictures lie in files -> the folder that holds them, under the set's own."""


def prepare_data(
    source: str,
    out: Path,
    *,
    format: str,
    read: ReadOptions,
    cleaning: Cleaning = AS_IT_IS,
    data_root: Path | None = None,
    size: int | None,
    holdout: float | None,
    workers: int | None,
    part: str | None = None,
    finish: bool = False,
    retry_failed: bool = False,
    as_json: bool,
    download: DownloadOptions = DEFAULTS,
) -> None:
    """Prepare `source` in `out`, or say that it is prepared; the summary goes to stdout.

    Args:
        part: I/N: prepare the I-th of N shares of the parts, and finish nothing.
        finish: make the shards of parts that are all prepared.
        retry_failed: try rows of OUT again that failed for a reason that can pass.
        data_root: where the evaluation sets of `cleaning.exclude` lie; None: see `find.data_root`.

    Raises:
        UsageError: the source does not exist, its columns cannot be guessed, or OUT cannot be made or holds something
            else.
        RunError: a damaged tar, a source of which most rows fail, a full disk, a killed worker.
    """
    for name in (source, str(out)):
        check_utf8(name)
    share = Share.read(part) if part else None
    if share and finish:
        raise UsageError(f"--part {part} --finish: run --part first, on each machine, and then --finish alone")
    if retry_failed and (share or finish):
        raise UsageError(f"--retry-failed: not with {'--part' if share else '--finish'}; one machine does all of it")
    if read.damaged not in DAMAGED:
        raise UsageError(f"--damaged {read.damaged}: no such rule; use {' or '.join(DAMAGED)}")
    if not (out / DONE).is_file():
        check_can_be_made(out, option="OUT")
    found = find_source(source, format=format, read=read)
    _check_options(found, out, read, cleaning)
    excluded = _evaluation_places(cleaning, data_root)
    size = size or DEFAULT_SIZE.get(found.format, OTHER_SIZE)
    request = {"format": found.format, "size": size, "holdout": holdout, **read.in_request(), **cleaning.request()}
    request |= fingerprints(read)
    request |= {name: True for name in ("ignore_opt_out", "allow_private") if getattr(download, name)}
    request["source_fingerprint"] = found.fingerprint()
    if excluded:
        request["excluded_fingerprint"] = fingerprint_of(excluded)
    summary = finished_summary(out, request)
    if retry_failed and summary is None and not Workspace(out).is_begun():
        raise UsageError(f"{out}: nothing was prepared here; leave out --retry-failed")
    job = Job(found, out, read, request, workers or usable_cores(), cleaning, excluded, download)
    if summary is None and share:
        from mlip_cli.data.prepare.assemble import prepare_share

        done = prepare_share(job, share)
        if as_json:
            print_json(asdict(done))
        done.show()
        return
    summary = _finished(job, summary, finish_only=finish, retry_failed=retry_failed)
    if not (out / CARD_PAGE).is_file():
        write_data_card(out, summary)
    if as_json:
        print_json(asdict(summary))
    else:
        summary.show_splits()
    summary.show_notes()


def _finished(job: Job, summary: Summary | None, *, finish_only: bool, retry_failed: bool) -> Summary:
    """Prepare what is left to prepare, and then try rows again that failed, if that is asked for.

    Args:
        summary: of OUT if it is finished.
    """
    from mlip_cli.data.prepare.retried import is_begun

    out = job.out
    is_retrying = is_begun(Workspace(out)) and summary is None
    was_finished = summary is not None
    if summary is None:
        from mlip_cli.data.prepare.assemble import prepare

        summary = prepare(job, finish_only=finish_only)
    if retry_failed and not is_retrying and num_retryable(summary.reasons):
        from mlip_cli.data.prepare.assemble import prepare

        return prepare(job, retry=True)
    if was_finished:
        Workspace(out).discard_leftovers()  # of a kill between the last two steps
        summary = replace(summary, out=str(out), next=next_commands(job.source.format, out, summary.splits))
        if retry_failed:
            say(f"{out}: no reject of it can pass with time; nothing to try again")
        else:
            say(f"{out}: prepared already, from the same files with the same options; nothing to do")
    return summary


def _evaluation_places(cleaning: Cleaning, data_root: Path | None) -> tuple[EvaluationPlace, ...]:
    """Where the evaluation sets of --exclude lie, found as evaluation finds them.

    Raises:
        UsageError: one is not there, or its pictures are not files.
    """
    return tuple(_evaluation_place(name, data_root) for name in cleaning.exclude if name not in OWN_SPLITS)


def _evaluation_place(name: str, data_root: Path | None) -> EvaluationPlace:
    kind, _, path = name.partition(":")
    if kind == "folder" and path and Path(path).is_dir():  # evaluation wants classes in it
        try:
            find_pictures(str(Path(path).absolute()))
        except UsageError as error:
            raise UsageError(f"--exclude {escaped(name)}: {error}") from None
        return EvaluationPlace(name, path, tree_fingerprint(Path(path)))
    if kind == "shards" and path and not (Path(path) / "dataset.json").is_file():
        tars = find_source(path, format="webdataset")
        return EvaluationPlace(name, path, tars.fingerprint())
    benchmark = find_benchmark(name, root=data_root)
    if benchmark.kind not in WITH_FILES:
        raise UsageError(
            f"--exclude {benchmark.words}: mlip does not find its pictures as files; use imagenet, folder:PATH or "
            f"shards:PATH, or for splits of the source {' or '.join(OWN_SPLITS)}"
        )
    return EvaluationPlace(name, str(benchmark.root / WITH_FILES[benchmark.kind]), benchmark.fingerprint)


def _check_options(source: DataSource, out: Path, read: ReadOptions, cleaning: Cleaning) -> None:
    if source.format == "openmoji" and cleaning != AS_IT_IS:
        raise UsageError(
            "--clean and its rules, --dedupe, --exclude: not for openmoji, whose pictures and captions mlip makes; "
            "leave them out"
        )
    for option in ("preset", "where", "uids"):
        if getattr(read, option) and source.format != "metadata":
            raise UsageError(f"--{option}: for tables only, and {source.name} is read as {source.format}")
    if (read.image_column or read.caption_column) and source.format not in ("metadata", "webdataset"):
        raise UsageError(
            f"--image-column, --caption-column: for tables and tars only, and {source.name} is read as {source.format}"
        )
    if read.image_folder and source.format != "metadata":
        raise UsageError(f"--image-folder: for tables only, and {source.name} is read as {source.format}")
    if read.damaged != REFUSE and source.format != "webdataset":
        raise UsageError(f"--damaged: for tars only, and {source.name} is read as {source.format}")
    if source.is_folder and out.resolve().is_relative_to(Path(source.name).resolve()):
        raise UsageError(f"{out}: lies inside the source {source.name}; name a folder elsewhere")
