"""`mlip report`: the page of a run, and a page that compares several. From files alone, without torch."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from mlip_cli.errors import UsageError
from mlip_cli.evaluate.before_after import BeforeAfter
from mlip_cli.report.comparison import comparison_page
from mlip_cli.report.headlines import compared, verdict
from mlip_cli.report.record import RunRecord, read_run
from mlip_cli.report.write import write_page, write_run_page, written_line
from mlip_cli.runs.find import find_checkpoint
from mlip_cli.runs.folder import Run, newest_in_words, newest_run
from mlip_cli.runs.foreign import find_foreign
from mlip_cli.terminal.output import print_json, print_lines, say


def report(targets: Sequence[str], *, out: Path | None, as_json: bool) -> None:
    """Write the page of one run, or the pages of several runs and a page that compares them; print the last one's path.

    Raises:
        UsageError: no such run, or the same one twice.
    """
    runs = [find_run(target) for target in targets] or [newest_run()]
    twice = [folder for folder, count in Counter(run.folder.resolve() for run in runs).items() if count > 1]
    if twice:
        raise UsageError(f"{twice[0]}: named twice; name each run once")
    if out is not None and out.is_dir():
        raise UsageError(f"--out {out}: is a folder; name a file, as in {out / 'report.html'}")
    if out is not None and not out.absolute().parent.is_dir():
        raise UsageError(f"--out {out}: folder {out.parent} does not exist; make it, or name another")
    records = [_named(run, runs) for run in runs]
    if len(records) == 1:
        path = out or runs[0].report
        write_run_page(records[0], path)
    else:
        path = out or Path(os.path.commonpath([run.folder.absolute().parent for run in runs])) / "comparison.html"
        for record in records:
            write_run_page(record, record.run.report)
        links = {record.name: quote(os.path.relpath(record.run.report, path.parent)) for record in records}
        write_page(path, comparison_page(records, links=links, written=written_line()))
        comparisons = compared(records)
        for record in records[1:]:
            say(verdict(records[0].name, record.name, comparisons))
    path = _short(path)
    if as_json:
        kept = {str(record.run.folder): record.newest(BeforeAfter) for record in records}
        changes = {folder: own.changes_as_json() for folder, own in kept.items() if own is not None and own.changes}
        beside = {"before_after": changes} if changes else {}
        print_json({"report": str(path), "runs": [str(run.folder) for run in runs], **beside})
    else:
        print_lines(str(path))


def find_run(target: str) -> Run:
    """The run folder that `target` names.

    Raises:
        UsageError: `target` is not a run folder.
    """
    if find_foreign(target) is not None:
        return find_checkpoint(target)[0]
    run = Run(Path(target))
    if run.recipe.is_file():
        return run
    above = Run(run.folder.parent.parent)
    if run.folder.is_dir() and above.recipe.is_file():
        raise UsageError(f"{target}: a part of a run; name the run folder: mlip report {above.folder}")
    what = "not a run folder (no recipe.yaml)" if run.folder.exists() else "no such run"
    raise UsageError(f"{target}: {what}; {newest_in_words()}")


def _named(run: Run, runs: Sequence[Run]) -> RunRecord:
    """Read a run. Runs of one name in several folders are named by their paths."""
    names = [own.folder.resolve().name for own in runs]
    name = run.folder.resolve().name
    return read_run(run.folder, name=name if names.count(name) == 1 else str(run.folder))


def _short(path: Path) -> Path:
    """A path below the current folder is written relative to it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_absolute() and path.is_relative_to(here) else path
