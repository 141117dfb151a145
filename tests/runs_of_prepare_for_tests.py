"""prepare-data in real processes that tests watch and kill, on parts and shards small enough to have many."""

import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlip_cli.cli import main
from mlip_cli.data.prepare import assemble, shards
from mlip_cli.data.sources import records
from mlip_cli.data.tokenizer import count_tokens
from mlip_cli.terminal import endings

FORK = multiprocessing.get_context("fork")
STEPS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
"""Events of Python that come before the calls which change a folder."""
assert assemble.prepare, "imported here, once, and not in each process that is forked"
count_tokens(["for the same reason"])
SIZES = (4, 5)
"""Rows of a part, samples of a shard."""


def started(
    folder: Path, words: Sequence[str], prelude: Callable[[], None] | None = None, sizes: tuple[int, int] = SIZES
) -> Any:
    """`mlip prepare-data WORDS` at work in `folder`; `prelude` runs first, in the same process."""
    process = FORK.Process(target=run_command, args=(folder, words, prelude, sizes))
    process.start()
    return process


def run(
    folder: Path, *words: str, prelude: Callable[[], None] | None = None, sizes: tuple[int, int] = SIZES
) -> tuple[int, str]:
    """The same to its end: (exit code, what it said)."""
    process = started(folder, words, prelude, sizes)
    process.join(120)
    return process.exitcode, said(folder, process)


def said(folder: Path, process: Any) -> str:
    return (folder / f"{process.pid}.stderr").read_text()


def run_command(folder: Path, words: Sequence[str], prelude: Callable[[], None] | None, sizes: tuple[int, int]) -> None:
    os.setsid()
    os.chdir(folder)
    signal.signal(signal.SIGINT, endings.interrupt)
    sys.stderr = open(f"{os.getpid()}.stderr", "w")  # noqa: SIM115 - open until the process ends
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    sys.argv = ["mlip", "prepare-data", *words]
    records.PART_ROWS, shards.SHARD_SAMPLES = sizes
    if prelude is not None:
        prelude()
    main()


def at_each_step(out: str, act: Callable[[int], None]) -> None:
    """Call `act` with its number before each step that changes a file or folder whose path holds `out`."""
    count = 0

    def hook(event: str, given: tuple[Any, ...]) -> None:
        nonlocal count
        if event in STEPS and not isinstance(given[0], int) and out in os.fsdecode(given[0]):
            count += 1
            act(count)

    sys.addaudithook(hook)


def killed_at(out: str, step: int) -> Callable[[], None]:
    """A prelude: the process dies by SIGKILL right before this step."""

    def act(count: int) -> None:
        if count == step:
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: at_each_step(out, act)


def counted(out: str, note: Path) -> Callable[[], None]:
    """A prelude: the number of steps so far is in the file `note`."""
    descriptor = os.open(note, os.O_RDWR | os.O_CREAT, 0o600)
    return lambda: at_each_step(out, lambda count: os.pwrite(descriptor, f"{count:9d}".encode(), 0) and None)


def limited(num_bytes: int) -> Callable[[], None]:
    """A prelude: no file can be longer, as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def disk_bytes(folder: Path) -> int:
    """What the files of a folder take on the disk."""
    found = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                found += os.lstat(os.path.join(place, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return found
