"""`mlip prepare-data`: a source of pictures and captions to shards."""

from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlip_cli.commands.data_card import write_data_card
from mlip_cli.data.prepare.evaluation_places import EvaluationPlace, fingerprint_of
from mlip_cli.data.prepare.filters import AS_IT_IS, OWN_SPLITS, Cleaning
from mlip_cli.data.prepare.job import Asked, Job
from mlip_cli.data.prepare.locks import discard_leftovers
from mlip_cli.data.prepare.ray_engine import check_installed
from mlip_cli.data.prepare.request import finished_summary
from mlip_cli.data.prepare.retry import is_begun, num_retryable
from mlip_cli.data.prepare.share import ALL_PARTS, Share
from mlip_cli.data.prepare.summary import CARD_PAGE, SharePrepared, Summary, next_commands
from mlip_cli.data.prepare.workspace import DONE, Workspace
from mlip_cli.data.sources.find import find_pictures, find_source
from mlip_cli.data.sources.formats import DataSource
from mlip_cli.data.sources.records import DAMAGED, REFUSE
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


def prepare_data(asked: Asked, *, as_json: bool) -> None:
    """Prepare a source in OUT, or say that it is prepared; the summary goes to stdout.

    Raises:
        UsageError: the source does not exist, its columns cannot be guessed, or OUT cannot be made or holds something
            else.
        RunError: a damaged tar, a source of which most rows fail, a full disk, a killed worker.
    """
    for name in (asked.source, asked.out):
        check_utf8(name)
    share = _share(asked)
    _check_retry(asked)
    store = _store(asked)
    folder = store.folder if store else Path(asked.out)
    if asked.engine.name == "ray":
        check_installed()
    if asked.read.damaged not in DAMAGED:
        raise UsageError(f"--damaged {asked.read.damaged}: no such rule; use {' or '.join(DAMAGED)}")
    if not (folder / DONE).is_file():
        check_can_be_made(folder, option="--workspace" if store else "OUT")
    source = find_source(asked.source, format=asked.format, read=asked.read)
    _check_options(source, folder, asked.cleaning)
    sets = (name for name in asked.cleaning.exclude if name not in OWN_SPLITS)
    excluded = tuple(_evaluation_place(name, asked.data_root) for name in sets)
    request = _request(asked, source, excluded)
    job = Job(source, folder, request, asked.engine, asked.cleaning, excluded, asked.download)
    done = _done(job, store, asked, share)
    if as_json:
        print_json(asdict(done))
    elif isinstance(done, Summary):
        done.show_splits()
    done.show_notes()


def _request(asked: Asked, source: DataSource, excluded: tuple[EvaluationPlace, ...]) -> dict[str, Any]:
    """What the output depends on, as prepared.json holds it: options, and what tells that files have changed."""
    size = asked.size or DEFAULT_SIZE.get(source.format, OTHER_SIZE)
    request = {"format": source.format, "size": size, "holdout": asked.holdout, **asked.read.in_request()}
    request |= {**asked.cleaning.request(), **asked.download.in_request(), **fingerprints(asked.read)}
    request["source_fingerprint"] = source.fingerprint()
    return {**request, "excluded_fingerprint": fingerprint_of(excluded)} if excluded else request


def _share(asked: Asked) -> Share | None:
    """The share that --part names."""
    if asked.part and asked.finish:
        raise UsageError(f"--part {asked.part} --finish: run --part first, on each machine, and then --finish alone")
    return Share.read(asked.part) if asked.part else None


def _check_retry(asked: Asked) -> None:
    """See that --retry-failed can work, if it is given."""
    if not asked.retry_failed:
        return
    if asked.part or asked.finish:
        other = "--part" if asked.part else "--finish"
        raise UsageError(f"--retry-failed: not with {other}; one machine does all of it")
    if is_url(asked.out):
        raise UsageError(
            f"--retry-failed: not for an OUT at a URL; the data of {asked.out} are no longer here; leave it out"
        )


def _store(asked: Asked) -> "Store | None":
    """The place of an OUT at a URL; None: OUT is a folder."""
    if is_url(asked.out):
        from mlip_cli.data.prepare.upload import Store

        if (asked.part or asked.finish) and asked.workspace is None:
            raise UsageError(
                f"{asked.out}: --part and --finish need a folder that all machines share; name the same one to each: "
                "--workspace"
            )
        return Store.at(asked.out, asked.workspace)
    if asked.workspace is not None:
        raise UsageError(
            f"--workspace {asked.workspace}: for an OUT at a URL, and {asked.out} is a folder; leave it out"
        )
    return None


def _done(job: Job, store: "Store | None", asked: Asked, share: Share | None) -> Summary | SharePrepared:
    """Do what is not done yet of the job, or of a share of it, which nobody uploads."""
    out = asked.out
    summary = store.finished(job.request) if store else None
    if share and summary is None:
        store, out = None, str(job.out)
    summary = summary if store else finished_summary(job.out, job.request)
    if summary is None and share:
        from mlip_cli.data.prepare.assemble import prepare_share

        return prepare_share(job, share)
    if summary is None:
        work = Workspace(job.out)
        if not work.is_begun() and (asked.retry_failed or asked.finish):
            cure = "leave out --retry-failed" if asked.retry_failed else ALL_PARTS
            raise UsageError(f"{out}: nothing was prepared here; {cure}")
        is_retry = is_begun(work.folder)  # which was interrupted, and ends now
        summary = _made(job, store, finish_only=asked.finish)
        if is_retry or not asked.retry_failed:
            return summary
    if asked.retry_failed and num_retryable(summary.reasons):
        return _made(job, None, retry=True)
    summary = replace(summary, out=out, next=next_commands(job.source.format, out, summary.splits))
    _tidy(job.out, summary, store)
    if asked.retry_failed:
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
    discard_leftovers(Workspace(folder))
    if not (folder / CARD_PAGE).is_file():
        write_data_card(folder, summary)


def _evaluation_place(name: str, data_root: Path | None) -> EvaluationPlace:
    """Where an evaluation set of --exclude lies, found as evaluation finds it.

    Raises:
        UsageError: it is not there, or its pictures are not files.
    """
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


def _check_options(source: DataSource, out: Path, cleaning: Cleaning) -> None:
    read = source.read
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
