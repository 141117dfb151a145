"""`mlip prepare-data --check DIR`: whether prepared data is whole."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mlip_cli.data.prepare.check import check
from mlip_cli.errors import RunError, UsageError
from mlip_cli.machine import usable_cores
from mlip_cli.terminal.output import plural, print_json, print_lines, size_in_words


def check_data(folder: Path, *, given: Sequence[str], workers: int | None, as_json: bool) -> None:
    """Check prepared data and print each problem, or one line when all is right.

    Args:
        given: other words of the command line, which have no place beside --check.

    Raises:
        UsageError: there are such words, or the folder does not hold prepared data.
        RunError: something is wrong.
    """
    if given:
        raise UsageError(f"--check {folder}: checks what was prepared before; leave out {', '.join(given)}")
    checked = check(folder, num_workers=workers or usable_cores())
    if as_json:
        print_json(asdict(checked))
    for problem in () if as_json else checked.problems:
        print_lines(f"{problem.file}: {problem.what}")
    if checked.problems:
        files = len({problem.file for problem in checked.problems})
        found = f"{plural(len(checked.problems), 'problem')} in {plural(files, 'file')}"
        raise RunError(f"{folder}: {found}; copy these files again, or prepare the data again")
    if not as_json:
        counts = {"split": checked.num_splits, "shard": checked.num_shards, "sample": checked.num_samples}
        words = ", ".join(plural(n, name) for name, n in counts.items())
        print_lines(f"{folder}: whole: {words}, {size_in_words(checked.num_bytes)}")
