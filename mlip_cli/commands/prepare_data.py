"""`mlip prepare-data`: a source of pictures and captions to shards."""

from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mlip_cli.commands.data_card import write_data_card
from mlip_cli.data.download.options import DEFAULTS, DownloadOptions
from mlip_cli.data.prepare.engines import Engine
from mlip_cli.data.prepare.evaluation_places import EvaluationPlace, fingerprint_of
from mlip_cli.data.prepare.filters import AS_IT_IS, OWN_SPLITS, Cleaning
from mlip_cli.data.prepare.job import Job
from mlip_cli.data.prepare.ray_engine import check_installed
from mlip_cli.data.prepare.retry import is_begun, num_retryable
from mlip_cli.data.prepare.share import ALL_PARTS, Share
from mlip_cli.data.prepare.summary import CARD_PAGE, SharePrepared, Summary, next_commands
from mlip_cli.data.prepare.workspace import DONE, Workspace, finished_summary
from mlip_cli.data.sources.find import DataSource, find_pictures, find_source
from mlip_cli.data.sources.records import DAMAGED, REFUSE, ReadOptions
from mlip_cli.data.sources.rules import fingerprints
from mlip_cli.errors import UsageError
from mlip_cli.evaluate.datasets.find import UnknownDataSetError, find_benchmark, tree_fingerprint
from mlip_cli.paths import check_can_be_made, check_utf8, escaped, is_url
from mlip_cli.terminal.output import print_json, say

if TYPE_CHECKING:
    from mlip_cli.data.prepare.upload import Store

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
    out: Path | str,
    *,
    format: str,
    read: ReadOptions,
    cleaning: Cleaning = AS_IT_IS,
    data_root: Path | None = None,
    size: int | None,
    holdout: float | None,
    workers: int | None,
    engine: Literal["processes", "ray"] = "processes",
    workspace: Path | None = None,
    part: str | None = None,
    finish: bool = False,
    retry_failed: bool = False,
    as_json: bool,
    download: DownloadOptions = DEFAULTS,
) -> None:
    """Prepare `source` in `out`, or say that it is prepared; the summary goes to stdout.

    Args:
        out: a folder, or a URL.
        workspace: where data for a URL are made; None: in the cache.
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
    share = _share(part, finish=finish)
    if retry_failed:
        _check_retry(out, others="--part" if share else "--finish" if finish else "")
    store = _store(str(out), workspace, has_others=share is not None or finish)
    folder = store.folder if store else Path(out)
    if engine == "ray":
        check_installed()
    if read.damaged not in DAMAGED:
        raise UsageError(f"--damaged {read.damaged}: no such rule; use {' or '.join(DAMAGED)}")
    if not (folder / DONE).is_file():
        check_can_be_made(folder, option="--workspace" if store else "OUT")
    found = find_source(source, format=format, read=read)
    _check_options(found, folder, read, cleaning)
    size = size or DEFAULT_SIZE.get(found.format, OTHER_SIZE)
    excluded = _evaluation_places(cleaning, data_root)
    request = {"format": found.format, "size": size, "holdout": holdout, **read.in_request(), **cleaning.request()}
    request |= download.in_request() | _fingerprints(found, read, excluded)
    job = Job(found, folder, read, request, Engine(engine, workers), cleaning, excluded, download)
    done = _done(job, store, str(out), share=share, finish_only=finish, retry=retry_failed)
    if as_json:
        print_json(asdict(done))
    elif isinstance(done, Summary):
        done.show_splits()
    done.show_notes()


def _fingerprints(
    source: DataSource, read: ReadOptions, excluded: tuple[EvaluationPlace, ...]
) -> dict[str, list[int] | str]:
    """What tells that files have changed since, by its key in the request."""
    found: dict[str, list[int] | str] = {**fingerprints(read), "source_fingerprint": source.fingerprint()}
    return {**found, "excluded_fingerprint": fingerprint_of(excluded)} if excluded else found


def _share(part: str | None, *, finish: bool) -> Share | None:
    """The share that --part names."""
    if part and finish:
        raise UsageError(f"--part {part} --finish: run --part first, on each machine, and then --finish alone")
    return Share.read(part) if part else None


def _check_retry(out: Path | str, *, others: str) -> None:
    """See that --retry-failed can work. `others` is an option for several machines, if one is given."""
    if others:
        raise UsageError(f"--retry-failed: not with {others}; one machine does all of it")
    if is_url(str(out)):
        raise UsageError(f"--retry-failed: not for an OUT at a URL; the data of {out} are no longer here; leave it out")


def _store(out: str, workspace: Path | None, *, has_others: bool) -> "Store | None":
    """The place of an OUT at a URL; None: OUT is a folder.

    Args:
        has_others: other machines take part.
    """
    if is_url(out):
        from mlip_cli.data.prepare.upload import Store

        if has_others and workspace is None:
            raise UsageError(
                f"{out}: --part and --finish need a folder that all machines share; name the same one to each: "
                "--workspace"
            )
        return Store.at(out, workspace)
    if workspace is not None:
        raise UsageError(f"--workspace {workspace}: for an OUT at a URL, and {out} is a folder; leave it out")
    return None


def _done(
    job: Job, store: "Store | None", out: str, *, share: Share | None, finish_only: bool, retry: bool
) -> Summary | SharePrepared:
    """Do what is not done yet of the job, or of a share of it, which nobody uploads.

    Args:
        retry: then try rows again that failed, if the job is not such a retry already.
    """
    summary = store.finished(job.request) if store else None
    if share and summary is None:
        store, out = None, str(job.out)
    summary = summary if store else finished_summary(job.out, job.request)
    if summary is None and share:
        from mlip_cli.data.prepare.assemble import prepare_share

        return prepare_share(job, share)
    if summary is None:
        work = Workspace(job.out)
        if not work.is_begun() and (retry or finish_only):
            cure = "leave out --retry-failed" if retry else ALL_PARTS
            raise UsageError(f"{out}: nothing was prepared here; {cure}")
        retry = retry and not is_begun(work.folder)
        summary = _made(job, store, finish_only=finish_only)
        if not retry:
            return summary
    if retry and num_retryable(summary.reasons):
        return _made(job, None, retry=True)
    summary = replace(summary, out=out, next=next_commands(job.source.format, out, summary.splits))
    _tidy(job.out, summary, store)
    if retry:
        say(f"{out}: no reject of it can pass with time; nothing to try again")
    else:
        say(f"{out}: prepared already, from the same files with the same options; nothing to do")
    return summary


def _made(job: Job, store: "Store | None", *, finish_only: bool = False, retry: bool = False) -> Summary:
    """Prepare the data and its card, and upload both to `store` if that is given."""
    with store.begun(job.request) if store else nullcontext():
        summary = finished_summary(job.out, job.request) if store else None
        if summary is None:
            from mlip_cli.data.prepare.assemble import prepare

            summary = prepare(job, finish_only=finish_only, retry=retry)
        if store:
            summary = store.named_in(summary)
        write_data_card(job.out, summary)
        return store.upload(summary) if store else summary


def _tidy(folder: Path, summary: Summary, store: "Store | None") -> None:
    """Do what a kill in the last steps has left to do."""
    if store:
        store.clear()
        return
    Workspace(folder).discard_leftovers()
    if not (folder / CARD_PAGE).is_file():
        write_data_card(folder, summary)


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
        try:
            tars = find_source(path, format="webdataset")
        except UsageError as error:
            raise UsageError(f"--exclude {escaped(name)}: {error}") from None
        return EvaluationPlace(name, path, tars.fingerprint())
    usable = f"use imagenet, folder:PATH or shards:PATH, or for splits of the source {' or '.join(OWN_SPLITS)}"
    try:
        benchmark = find_benchmark(name, root=data_root)
    except UnknownDataSetError as error:
        guess = f"{error}" if Path(name).is_dir() or "did you mean" in f"{error}" else f"no such data set; {usable}"
        raise UsageError(f"--exclude {escaped(name)}: {guess}") from None
    except UsageError as error:
        raise UsageError(f"--exclude {error}") from None
    if benchmark.kind not in WITH_FILES:
        raise UsageError(f"--exclude {benchmark.words}: mlip does not find its pictures as files; {usable}")
    return EvaluationPlace(name, str(benchmark.root / WITH_FILES[benchmark.kind]), benchmark.fingerprint)


def _check_options(source: DataSource, out: Path, read: ReadOptions, cleaning: Cleaning) -> None:
    if source.format == "openmoji" and cleaning != AS_IT_IS:
        raise UsageError(
            "--clean and its rules, --dedupe, --exclude: not for openmoji, whose pictures and captions mlip makes; "
            "leave them out"
        )
    for option in ("preset", "where", "uids", "captions_from"):
        if getattr(read, option) == "":
            raise UsageError(f"--{option.replace('_', '-')}: nothing is given; give it a value, or leave it out")
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
