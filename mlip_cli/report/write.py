"""Write the page of a run."""

from datetime import UTC, datetime
from pathlib import Path

from mlip_cli import __version__
from mlip_cli.files import full_disk_named, write_text
from mlip_cli.report.average import CHARTS as AVERAGES
from mlip_cli.report.average import average_charts
from mlip_cli.report.profiles import profile_charts
from mlip_cli.report.record import RunRecord, read_run
from mlip_cli.report.run_page import run_page
from mlip_cli.report.sweeps import PARETO, sweep_charts
from mlip_cli.runs.folder import Run
from mlip_cli.terminal.output import is_main, say


def rebuild(run: Run) -> None:
    """Write the page of a run again, after a command has added files to the run; rank 0 only."""
    if is_main():
        write_run_page(read_run(run.folder), run.report)
        say(f"report: {run.report}")


def rebuild_if_older(run: Run) -> None:
    """Do the same if there is no page, or if a result is newer than the page."""
    written = run.report.stat().st_mtime_ns if run.report.is_file() else 0
    if any(path.stat().st_mtime_ns > written for path in run.evals.glob("*.json")):
        rebuild(run)


def write_run_page(record: RunRecord, path: Path) -> None:
    """Write the page of a run. Where it is the run's own, its charts go to pictures/ too and replace older ones.

    Raises:
        RunError: the disk is full.
    """
    charts = {**average_charts(record), **sweep_charts(record), **profile_charts(record)}
    write_page(path, run_page(record, charts, written=written_line()))
    if path != record.run.report:
        return
    folder = record.run.pictures
    with full_disk_named(folder, "make room and call mlip report again"):
        for name, chart in charts.items():
            folder.mkdir(exist_ok=True)
            write_text(folder / f"{name}.svg", chart.as_file())
    for beginning in (PARETO, AVERAGES):
        for file in folder.glob(f"{beginning}*.svg"):
            if file.stem not in charts:
                file.unlink()


def write_page(path: Path, content: str) -> None:
    """Write a page.

    Raises:
        RunError: the disk is full.
    """
    with full_disk_named(path, "make room and call mlip report again"):
        write_text(path, content)


def written_line(source: str = "the files of the run alone") -> str:
    """The line about the page's making: version, time, source."""
    return f"Written by mlip {__version__} at {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, from {source}."
