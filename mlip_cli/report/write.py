"""Write the page of a run."""

from datetime import UTC, datetime
from pathlib import Path

from mlip_cli import __version__
from mlip_cli.files import full_disk_named, write_text
from mlip_cli.report.record import RunRecord, read_run
from mlip_cli.report.run_page import run_page
from mlip_cli.report.speed import PARETO, standalone_pictures
from mlip_cli.runs.folder import Run
from mlip_cli.terminal.output import is_main, say


def rebuild(run: Run) -> None:
    """Write the page of a run anew, after a command has added to the run's files; rank 0 only."""
    if is_main():
        _write(read_run(run.folder), run.report)
        say(f"report: {run.report}")


def rebuild_if_older(run: Run) -> None:
    """The same where results have come since the page was written, or there is no page."""
    written = run.report.stat().st_mtime_ns if run.report.is_file() else 0
    if any(path.stat().st_mtime_ns > written for path in run.evals.glob("*.json")):
        rebuild(run)


def _write(record: RunRecord, path: Path) -> None:
    """The page, and its charts as files of their own in pictures/, where those of earlier results go."""
    pictures = standalone_pictures(record)
    _write_page(path, run_page(record, pictures, written=_written()))
    if path != record.run.report:
        return
    folder = record.run.pictures
    with full_disk_named(folder, "make room and call mlip report again"):
        for name, picture in pictures.items():
            folder.mkdir(exist_ok=True)
            write_text(folder / f"{name}.svg", picture.as_file())
    for file in folder.glob(f"{PARETO}*.svg"):
        if file.stem not in pictures:
            file.unlink()


def _write_page(path: Path, content: str) -> None:
    with full_disk_named(path, "make room and call mlip report again"):
        write_text(path, content)


def _written() -> str:
    return f"Written by mlip {__version__} at {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, from the files of the run alone."
