"""`mlip report`: the page of a run, and a page that compares several. From files alone, without torch."""

import os
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from mlip_cli import __version__
from mlip_cli.errors import UsageError
from mlip_cli.evaluate.report.comparison import comparison_page
from mlip_cli.evaluate.report.costs import PARETO, standalone_pictures
from mlip_cli.evaluate.report.record import RunRecord, read_run
from mlip_cli.evaluate.report.run_page import run_page
from mlip_cli.files import full_disk_named, write_text
from mlip_cli.output import is_main, print_json, print_lines, say
from mlip_cli.run_folder import Run, newest_in_words, newest_run


def report(targets: Sequence[str], *, out: Path | None, as_json: bool) -> None:
    """Write the page of one run, or the pages of several and one that compares them; print the path of the last.

    Raises:
        UsageError: no such run, or the same one twice.
    """
    runs = [find_run(target) for target in targets] or [newest_run()]
    twice = [folder for folder, count in Counter(run.folder.resolve() for run in runs).items() if count > 1]
    if twice:
        raise UsageError(f"{twice[0]}: named twice; name each run once")
    if out is not None and out.is_dir():
        raise UsageError(f"--out {out}: a folder; name a file, as in {out / 'report.html'}")
    if out is not None and not out.absolute().parent.is_dir():
        raise UsageError(f"--out {out}: no folder {out.parent}; make it, or name another")
    records = [_named(run, runs) for run in runs]
    if len(records) == 1:
        path = out or runs[0].report
        _write(records[0], path)
    else:
        path = out or Path(os.path.commonpath([run.folder.absolute().parent for run in runs])) / "comparison.html"
        for record in records:
            _write(record, record.run.report)
        links = {record.name: quote(os.path.relpath(record.run.report, path.parent)) for record in records}
        _write_page(path, comparison_page(records, links=links, written=_written()))
    path = _short(path)
    if as_json:
        print_json({"report": str(path), "runs": [str(run.folder) for run in runs]})
    else:
        print_lines(str(path))


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


def find_run(target: str) -> Run:
    """The run folder that `target` names.

    Raises:
        UsageError: it is none.
    """
    run = Run(Path(target))
    if run.recipe.is_file():
        return run
    above = Run(run.folder.parent.parent)
    if run.folder.is_dir() and above.recipe.is_file():
        raise UsageError(f"{target}: a part of a run; a page is of the whole: mlip report {above.folder}")
    what = "not a run folder (no recipe.yaml)" if run.folder.exists() else "no such run"
    raise UsageError(f"{target}: {what}; {newest_in_words()}")


def _named(run: Run, runs: Sequence[Run]) -> RunRecord:
    """Runs of one name in several folders go by their paths."""
    names = [own.folder.resolve().name for own in runs]
    name = run.folder.resolve().name
    return read_run(run.folder, name=name if names.count(name) == 1 else str(run.folder))


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


def _short(path: Path) -> Path:
    """Relative to the current folder where it lies below it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_absolute() and path.is_relative_to(here) else path
