"""Runs the rows of the GPU check, each in a process of its own, within a number of seconds.

A row that fails, crashes the driver's context, or takes the whole memory leaves the rest as it is.
"""

import json
import os
import re
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from forks_for_tests import FORKS, own_group
from gpu.rows import Found, Row, Scale
from killed_for_tests import with_group

from mlip_cli.terminal.output import start_logging

OUT_OF_TIME = "out of time"
WARNING = re.compile(r"warn|^\[W\d", re.IGNORECASE)
"""In what a process says: Python's warnings, ours, and those of PyTorch's C++ code."""


@dataclass(frozen=True)
class Outcome:
    """A row in the result."""

    name: str
    expected: str
    found: dict[str, Any] | None
    as_expected: bool | None
    """None: the row only measures, or nothing was found."""
    seconds: float
    not_so: tuple[str, ...] = ()
    """What was expected and is not so."""
    error: str | None = None
    """One line about what ended the row."""
    not_run: str | None = None
    """Why the row was not run to its end."""
    not_rehearsed: str | None = None
    """What a rehearsal left out."""

    @property
    def is_well(self) -> bool:
        """Whether nothing speaks against it."""
        return self.error is None and self.as_expected is not False


def body(run: Callable[[Scale], Found], scale: Scale, words: str, answer: str) -> None:
    """Body of a forked process: a row; its words go to one file, what it found or its error to another."""
    own_group()
    for number in (1, 2):
        os.dup2(os.open(words, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    start_logging()
    try:
        told = {"found": asdict(run(scale))}
        Path(answer).write_text(json.dumps(told, allow_nan=False))
    except Exception as error:
        Path(answer).write_text(json.dumps({"error": one_line(error)}))
        raise


def one_line(error: Exception) -> str:
    """Kind, first line, and the last line of our code that it passed."""
    lines = str(error).strip().splitlines() or ["no words"]
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if re.search(r"/(mlip_cli|gpu)/[^/]|/tests/", frame.filename)][-1:]
    place = "".join(f" ({Path(frame.filename).name}:{frame.lineno})" for frame in own)
    return f"{type(error).__name__}: {lines[0]}{place}"


def run_row(row: Row, scale: Scale) -> Outcome:
    """Run one row until the deadline."""
    outcome, start = Outcome(row.name, row.expected, None, None, 0.0), time.monotonic()
    if scale.device_type != "cuda":
        outcome = replace(outcome, not_rehearsed=row.only_on_cuda)
    if scale.seconds_left < row.usual_s:
        return replace(outcome, not_run=OUT_OF_TIME)
    with tempfile.TemporaryDirectory(prefix="mlip-gpu-") as folder:
        words, answer = Path(folder, "words"), Path(folder, "answer.json")
        process = FORKS.Process(target=body, args=(row.run, scale, str(words), str(answer)))
        process.start()
        try:
            process.join(max(0.0, scale.seconds_left))
        finally:  # also after Ctrl-C, which the row does not get
            is_late = process.exitcode is None
            if is_late:
                with_group(process.pid, signal.SIGKILL)
                process.kill()
                process.join()
        outcome = replace(outcome, seconds=round(time.monotonic() - start, 2))
        said = words.read_text(errors="replace") if words.exists() else ""
        if is_late:
            return replace(outcome, not_run=f"{OUT_OF_TIME}: stopped after {outcome.seconds:.0f} s")
        told = json.loads(answer.read_text()) if answer.exists() else {}
    return judged(row, scale, outcome, told, said=said, code=process.exitcode)


def judged(row: Row, scale: Scale, outcome: Outcome, told: dict[str, Any], *, said: str, code: int) -> Outcome:
    """The outcome of a row that came to its end, from what it told and from its exit code."""
    if "error" in told:
        return replace(outcome, error=told["error"])
    if code != 0 or "found" not in told:
        last = said.strip().splitlines()[-1:]
        return replace(outcome, error=": ".join([f"its process ended with code {code}", *last]))
    found = told["found"]
    if row.is_quiet:
        warnings = [line.strip() for line in said.splitlines() if WARNING.search(line)]
        found["statements"]["nobody warned"] = not warnings
        found["figures"]["warnings"] = warnings
    statements = found["statements"] | (found["speeds"] if scale.device_type == "cuda" else {})
    not_so = tuple(words for words, holds in statements.items() if not holds)
    return replace(outcome, found=found, as_expected=not not_so if statements else None, not_so=not_so)


def run_rows(rows: Sequence[Row], scale: Scale) -> Iterator[Outcome]:
    """The outcome of every row, in order."""
    for row in rows:
        yield run_row(row, scale)
