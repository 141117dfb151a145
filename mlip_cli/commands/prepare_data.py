"""`mlip prepare-data`: a source of pictures and captions to shards."""

from dataclasses import asdict, replace
from pathlib import Path

from mlip_cli.data.download.options import DEFAULTS, DownloadOptions
from mlip_cli.data.prepare.summary import next_commands
from mlip_cli.data.prepare.workspace import DONE, Workspace, finished_summary
from mlip_cli.data.sources.find import DataSource, find_source
from mlip_cli.data.sources.records import ReadOptions
from mlip_cli.errors import UsageError
from mlip_cli.machine import usable_cores
from mlip_cli.paths import check_can_be_made, check_utf8
from mlip_cli.terminal.output import print_json, say

DEFAULT_SIZE = {"openmoji": 64}
OTHER_SIZE = 256
"""Short side of photographs in pixels: 256 leave room for a random crop of 224."""


def prepare_data(
    source: str,
    out: Path,
    *,
    format: str,
    read: ReadOptions,
    size: int | None,
    holdout: float | None,
    workers: int | None,
    as_json: bool,
    download: DownloadOptions = DEFAULTS,
) -> None:
    """Prepare `source` in `out`, or say that it is prepared; the summary goes to stdout.

    Raises:
        UsageError: the source does not exist, its columns cannot be guessed, or OUT cannot be made or holds something
            else.
        RunError: a damaged tar, a source of which most rows fail, a full disk, a killed worker.
    """
    for name in (source, str(out)):
        check_utf8(name)
    if not (out / DONE).is_file():
        check_can_be_made(out, option="OUT")
    found = find_source(source, format=format, read=read)
    _check_options(found, out, read)
    size = size or DEFAULT_SIZE.get(found.format, OTHER_SIZE)
    request = {"format": found.format, "size": size, "holdout": holdout, **vars(read)}
    # None where nothing differs from what was prepared before there were downloads
    request |= {name: getattr(download, name) or None for name in ("ignore_opt_out", "allow_private")}
    request["source_fingerprint"] = found.fingerprint()
    summary = finished_summary(out, request)
    if summary is None:
        from mlip_cli.data.prepare.assemble import prepare

        summary = prepare(found, out, read, request, num_workers=workers or usable_cores(), download=download)
    else:
        Workspace(out).discard()  # left by a kill between the last two steps
        summary = replace(summary, out=str(out), next=next_commands(found.format, out, summary.splits))
        say(f"{out}: prepared already, from the same files with the same options; nothing to do")
    if as_json:
        print_json(asdict(summary))
    else:
        summary.show_splits()
    summary.show_notes()


def _check_options(source: DataSource, out: Path, read: ReadOptions) -> None:
    if (read.image_column or read.caption_column) and source.format not in ("metadata", "webdataset"):
        raise UsageError(
            f"--image-column, --caption-column: for tables and tars only, and {source.name} is read as {source.format}"
        )
    if read.image_folder and source.format != "metadata":
        raise UsageError(f"--image-folder: for tables only, and {source.name} is read as {source.format}")
    if source.is_folder and out.resolve().is_relative_to(Path(source.name).resolve()):
        raise UsageError(f"{out}: lies inside the source {source.name}; name a folder elsewhere")
