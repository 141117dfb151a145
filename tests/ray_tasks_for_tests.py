"""Functions that Ray's workers run in tests: each imports by its name in another process."""

import os
import signal
import time
from pathlib import Path

from mlip_cli.data.prepare.parts import prepare_part
from mlip_cli.data.prepare.workspace import PartOptions, PartResult
from mlip_cli.data.sources.records import SourcePart
from mlip_cli.errors import UsageError


def number_and_process(task: int) -> tuple[int, int]:
    return task, os.getpid()


def failing(task: int) -> int:
    if task == 3:
        raise UsageError(f"task {task}: of no use")
    return task


def dying(task: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return task


def part_that_waits_once(part: SourcePart, options: PartOptions) -> PartResult:
    """Part 1 waits in its first process, whose number it writes down, to be killed."""
    mark = Path(options.folder).parents[2] / "waits"
    if part.number == 1 and not mark.exists():
        Path(options.folder, ".part-000001.tar.1.tmp").write_bytes(b"half")
        mark.with_suffix(".new").write_text(str(os.getpid()))
        mark.with_suffix(".new").rename(mark)
        time.sleep(600)
    return prepare_part(part, options)
