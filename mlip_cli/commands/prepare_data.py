"""`mlip prepare-data`: a source of pictures and captions to shards."""

from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mlip_cli.data.prepare.engines import Engine
from mlip_cli.data.prepare.ray_engine import check_installed
from mlip_cli.data.prepare.summary import Summary, next_commands
from mlip_cli.data.prepare.workspace import DONE, Workspace, finished_summary
from mlip_cli.data.sources.find import DataSource, find_source
from mlip_cli.data.sources.records import ReadOptions
from mlip_cli.errors import UsageError
from mlip_cli.paths import check_can_be_made, check_utf8, is_url
from mlip_cli.terminal.output import print_json, say

if TYPE_CHECKING:
    from mlip_cli.data.prepare.upload import Store

DEFAULT_SIZE = {"openmoji": 64}
OTHER_SIZE = 256
"""Short side of photographs in pixels: 256 leave room for a random crop of 224."""


def prepare_data(
    source: str,
    out: Path | str,
    *,
    format: str,
    read: ReadOptions,
    size: int | None,
    holdout: float | None,
    workers: int | None,
    engine: Literal["processes", "ray"] = "processes",
    workspace: Path | None = None,
    as_json: bool,
) -> None:
    """Prepare `source` in `out`, or say that it is prepared; the summary goes to stdout.

    Args:
        out: a folder, or a URL.
        workspace: where data for a URL are made; None: in the cache.

    Raises:
        UsageError: the source does not exist, its columns cannot be guessed, or OUT cannot be made or holds something
            else.
        RunError: a damaged tar, a source of which most rows fail, a full disk, a killed worker.
    """
    for name in (source, str(out)):
        check_utf8(name)
    store = _store(str(out), workspace)
    folder = store.folder if store else Path(out)
    if engine == "ray":
        check_installed()
    if not (folder / DONE).is_file():
        check_can_be_made(folder, option="--workspace" if store else "OUT")
    found = find_source(source, format=format, read=read)
    _check_options(found, folder, read)
    size = size or DEFAULT_SIZE.get(found.format, OTHER_SIZE)
    request = {"format": found.format, "size": size, "holdout": holdout, **vars(read)}
    request["source_fingerprint"] = found.fingerprint()
    summary = store.finished(request) if store else finished_summary(folder, request)
    if summary is None:
        summary = _made(found, folder, read, request, engine=Engine(engine, workers), store=store)
    else:
        if store:  # what is left by a kill between the last two steps
            store.clear()
        else:
            Workspace(folder).discard()
        summary = replace(summary, out=str(out), next=next_commands(found.format, out, summary.splits))
        say(f"{out}: prepared already, from the same files with the same options; nothing to do")
    if as_json:
        print_json(asdict(summary))
    else:
        summary.show_splits()
    summary.show_notes()


def _store(out: str, workspace: Path | None) -> "Store | None":
    """The place of an OUT at a URL; None: OUT is a folder."""
    if is_url(out):
        from mlip_cli.data.prepare.upload import Store

        return Store.at(out, workspace)
    if workspace is not None:
        raise UsageError(f"--workspace {workspace}: for an OUT at a URL, and {out} is a folder; leave it out")
    return None


def _made(
    found: DataSource,
    folder: Path,
    read: ReadOptions,
    request: dict[str, Any],
    *,
    engine: Engine,
    store: "Store | None",
) -> Summary:
    """Prepare `found` in `folder`, and upload it to `store` if that is given."""
    with store.begun(request) if store else nullcontext():
        summary = finished_summary(folder, request) if store else None
        if summary is None:
            from mlip_cli.data.prepare.assemble import prepare

            summary = prepare(found, folder, read, request, engine=engine)
        return store.upload(summary) if store else summary


def _check_options(source: DataSource, out: Path, read: ReadOptions) -> None:
    if (read.image_column or read.caption_column) and source.format not in ("metadata", "webdataset"):
        raise UsageError(
            f"--image-column, --caption-column: for tables and tars only, and {source.name} is read as {source.format}"
        )
    if read.image_folder and source.format != "metadata":
        raise UsageError(f"--image-folder: for tables only, and {source.name} is read as {source.format}")
    if source.is_folder and out.resolve().is_relative_to(Path(source.name).resolve()):
        raise UsageError(f"{out}: lies inside the source {source.name}; name a folder elsewhere")
