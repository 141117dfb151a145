"""prepare-data that is killed at random moments: all its processes, its first process or a worker; then run again."""

import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forks_for_tests import FORKS, PATIENCE_S
from killed_for_tests import with_group
from runs_of_prepare_for_tests import SIZES, run_command, said
from sources_for_tests import contents
from waits_for_tests import wait_until

WHOM = ("all", "first", "worker")
"""Who is killed: each process, as when the machine goes down; the first one alone; or one of its workers."""


@dataclass(frozen=True)
class Kill:
    """What one kill met."""

    command: int
    """Its place among the commands."""
    whom: str
    after_s: float
    """Since the first sign of work."""
    num_parts: int
    """Finished ones that lay in OUT."""
    is_finishing: bool
    """True after the last part was ready."""


class Running:
    """One command at work in `folder`, in a process group of its own."""

    def __init__(self, folder: Path, words: Sequence[str]) -> None:
        self.folder = folder
        self.process: Any = FORKS.Process(target=run_command, args=(folder, words, None, SIZES))
        self.process.start()

    def has_begun(self) -> bool:
        """True once it writes, or has ended."""
        work = self.folder / "out" / ".prepare"
        return any((work / "parts").glob(".*.tmp")) or (work / "finished").exists() or not self.process.is_alive()

    def kill(self, whom: str) -> None:
        """SIGKILL; without a worker, the first process is killed."""
        number = self.process.pid
        with suppress(ProcessLookupError):
            if whom == "all":
                os.killpg(number, signal.SIGKILL)
            else:
                workers = workers_of(number) if whom == "worker" else []
                os.kill(workers[0] if workers else number, signal.SIGKILL)

    def end(self) -> int:
        """Its exit code."""
        self.process.join(PATIENCE_S)
        assert self.process.exitcode is not None, said(self.folder, self.process)
        return int(self.process.exitcode)

    def said(self) -> str:
        return said(self.folder, self.process)


def workers_of(number: int) -> list[int]:
    """Processes that multiprocessing spawned to work for another one."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == number and b"spawn_main" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return sorted(found)


def prepared_whole(folder: Path, words: Sequence[str]) -> float:
    """Prepare `whole`, which nobody disturbs; seconds from the first sign of work to the end."""
    running = Running(folder, words)
    wait_until(running.has_begun, what="nothing begins")
    began = time.monotonic()
    assert running.end() == 0, running.said()
    took = time.monotonic() - began
    (folder / "out").rename(folder / "whole")
    return took


def killed_again_and_again(
    folder: Path, commands: Sequence[Sequence[str]], *, kills: int, seed: int, most_s: float
) -> list[Kill]:
    """Run the commands one after another, each killed and run again until it ends; then the same in a new OUT.

    After so many kills nothing is killed any more. Each OUT that is whole is compared with `whole`, byte by byte.

    Args:
        most_s: a kill comes so many seconds after the first sign of work at most.
    """
    draw, done, place, runs = random.Random(seed), [], 0, []
    while len(done) < kills or place:
        running = Running(folder, commands[place])
        runs.append(running.process.pid)
        after_s, whom = draw.uniform(0, most_s), draw.choice(WHOM)
        if len(done) < kills:
            wait_until(running.has_begun, what="nothing begins")
            with suppress(TimeoutError):
                running.process.join(after_s)
            if running.process.is_alive():
                running.kill(whom)
                work = folder / "out" / ".prepare"
                parts = len(list((work / "parts").glob("*.json")))
                done.append(Kill(place, whom, round(after_s, 3), parts, (work / "finished").exists()))
        code = running.end()
        if code == 0:
            place = (place + 1) % len(commands)
            if place == 0:
                _compare(folder)
        else:
            assert code == -signal.SIGKILL or (code == 1 and "a worker process died" in running.said()), running.said()
    wait_until(lambda: not any(with_group(number, 0) for number in runs), what="processes are left", every_s=0.05)
    return done


def _compare(folder: Path) -> None:
    assert contents(folder / "out") == contents(folder / "whole")
    assert not (folder / "out" / ".prepare").exists()
    shutil.rmtree(folder / "out")
