"""Trainings that tests kill: real processes, a process group for each rank."""

import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from forks_for_tests import FORKS, PATIENCE_S, command, own_group
from torch.distributed import TCPStore
from waits_for_tests import wait_until

from mlip_cli.runs.checkpoint import load_state, load_weights
from mlip_cli.runs.folder import Run, checkpoint_folders, step_of

CHANGES_FROM_RUN_TO_RUN = {"images_per_s", "data_wait_share", "peak_gib"}


def pretrain(arguments: Sequence[str], environment: dict[str, str], words: str) -> None:
    """Body of a forked process: `mlip pretrain ARGUMENTS`, its words appended to the file `words`."""
    os.environ.update(environment)
    command(["pretrain", *arguments], words, words)


@dataclass
class Forked:
    """`mlip pretrain ARGUMENTS` at work in one forked process a rank; leaving the block kills what is left of it."""

    arguments: Sequence[str]
    words: Path
    ranks: int = 1
    body: Callable[[Sequence[str], dict[str, str], str], None] = pretrain
    processes: list[Any] = field(default_factory=list)

    def __enter__(self) -> "Forked":
        self.words.unlink(missing_ok=True)
        self._store = None if self.ranks == 1 else TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(self.ranks):
            given = (list(self.arguments), self._environment(rank), str(self.words))
            self.processes.append(FORKS.Process(target=self.body, args=given))
        for process in self.processes:
            process.start()
        return self

    def _environment(self, rank: int) -> dict[str, str]:
        """What torchrun sets, its store included, which the ranks meet in."""
        if self._store is None:
            return {}
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }

    def __exit__(self, *_: object) -> None:
        self.kill()

    def is_at_work(self) -> bool:
        """True while no rank has ended."""
        return all(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        """SIGKILL to every process of every rank, as when the machine goes down."""
        for process in self.processes:
            with_group(process.pid, signal.SIGKILL)
        self.join()

    def kill_rank(self, rank: int) -> None:
        """SIGKILL to one rank alone, as by the kernel where memory ends; its loader processes are left behind."""
        os.kill(self.processes[rank].pid, signal.SIGKILL)

    def join(self) -> list[int]:
        """Exit codes, when all ranks have ended."""
        for process in self.processes:
            process.join(PATIENCE_S)
        return [process.exitcode for process in self.processes]

    def said(self) -> str:
        """Its words so far."""
        return self.words.read_text() if self.words.exists() else ""

    def are_gone(self) -> bool:
        """True when no process of it is left, loader processes included."""
        return not any(with_group(process.pid, 0) for process in self.processes)


def with_group(group: int, number: int) -> bool:
    """Send a signal to a process group; False where nobody is in it."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


# what a run folder says ----------------------------------------------------------------------------------------------


def raw_lines(folder: Path) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl, less what no two runs have in common."""
    return [{k: v for k, v in line.items() if k not in CHANGES_FROM_RUN_TO_RUN} for line in raw_lines(folder)]


def last_step(folder: Path) -> int:
    return max((line["step"] for line in raw_lines(folder)), default=0)


def leftovers(folder: Path) -> list[str]:
    """Temporary files and folders, which only a process that was killed leaves."""
    walked = os.walk(folder)  # it skips a folder that vanishes meanwhile
    return sorted(name for _, folders, files in walked for name in (*folders, *files) if name.endswith(".tmp"))


def is_saving(folder: Path) -> bool:
    return any((folder / "checkpoints").glob(".step_*.tmp"))


def is_evaluating(folder: Path, every_steps: int) -> bool:
    """True between the line of a step's losses and the line of its evaluation."""
    lines = raw_lines(folder)
    return bool(lines) and lines[-1]["step"] % every_steps == 0 and "loss" in lines[-1]


def state_without_environment(checkpoint: Path) -> dict[str, Any]:
    state = load_state(checkpoint)
    return {key: value for key, value in state.items() if key != "environment"}


def assert_same_bits(ours: Any, theirs: Any, *, place: str = "") -> None:
    """Equal, tensors to the bit."""
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs), place
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), place
        for key in theirs:
            assert_same_bits(ours[key], theirs[key], place=f"{place}/{key}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), place
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same_bits(*pair, place=f"{place}/{number}")
    else:
        assert ours == theirs, place


def assert_same_run(ours: Path, theirs: Path) -> None:
    """The same lines, once each, and the same last checkpoint, to the bit."""
    lines = zip_longest(metrics(ours), metrics(theirs))
    first_difference = next((pair for pair in lines if pair[0] != pair[1]), None)
    assert first_difference is None, first_difference
    mine, other = Run(ours).latest_checkpoint(), Run(theirs).latest_checkpoint()
    assert mine is not None
    assert other is not None
    assert mine.name == other.name, (mine, other)
    assert_same_bits(load_weights(mine), load_weights(other))
    assert_same_bits(state_without_environment(mine), state_without_environment(other))


def assert_whole_checkpoint(folder: Path, every_steps: int) -> None:
    """The newest checkpoint that is due is there, and can be loaded."""
    newest = Run(folder).latest_checkpoint()
    due = (last_step(folder) - 1) // every_steps * every_steps  # of a step before the last one that is logged
    assert due <= 0 or (newest is not None and step_of(newest) >= due), (due, newest)
    if newest is not None:
        assert load_state(newest)["progress"]["step"] == step_of(newest)
        assert load_weights(newest)


# killing -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """When a training is killed."""

    after_step: int
    """Not before this step is logged."""
    during: str
    """step, checkpoint or evaluation."""
    offset: float
    """In [0, 1]: how deep into it, of `DEPTH_S`."""


@dataclass(frozen=True)
class Every:
    """Steps between checkpoints and between evaluations."""

    checkpoint: int
    evaluation: int


MOST_MISSES = 5
DEPTH_S = {"step": 0.06, "checkpoint": 0.008, "evaluation": 0.02}
"""Longest wait after the first sign of each; about as long as it takes in a small training."""


def moments(seed: int, *, steps: int, during: Sequence[str]) -> list[Moment]:
    """One for each of `during`, at random, spread over a training of so many steps."""
    draw = random.Random(seed)
    share = (steps - 4) / len(during)
    return [
        Moment(int(1 + i * share + draw.random() * share * 0.5), kind, draw.random()) for i, kind in enumerate(during)
    ]


@dataclass(frozen=True)
class Killed:
    """What a kill found."""

    step: int
    """Last one that was logged."""
    hit: str
    """step, checkpoint or evaluation, by what it left behind."""


def kill_at(training: Forked, folder: Path, moment: Moment, *, evaluate_every: int) -> Killed:
    """Wait for the moment, kill, and see what was hit."""

    def is_there() -> bool:
        assert training.is_at_work(), training.said()
        if last_step(folder) < moment.after_step:
            return False
        return {
            "step": lambda: True,
            "checkpoint": lambda: is_saving(folder),
            "evaluation": lambda: is_evaluating(folder, evaluate_every),
        }[moment.during]()

    wait_until(is_there, what=f"{moment}\n{training.said()}")
    time.sleep(moment.offset * DEPTH_S[moment.during])
    training.kill()
    hit = "checkpoint" if is_saving(folder) else "evaluation" if is_evaluating(folder, evaluate_every) else "step"
    return Killed(last_step(folder), hit)


def killed_again_and_again(
    recipe: Path, folder: Path, overrides: Sequence[str], *, ranks: int, moments: Sequence[Moment], every: Every
) -> list[Killed]:
    """Train to the end, killed at each of the moments; every state on disk is looked at before the training goes on.

    A kill that came too early or too late for a checkpoint or an evaluation counts as one in a step, and another one
    follows (at most `MOST_MISSES` times for a moment).
    """
    arguments = [str(recipe), *overrides, "--out", str(folder), "--resume"]
    words, killed, sessions = folder.with_name(f"{folder.name}.words"), [], []
    for moment in moments:
        for _ in range(MOST_MISSES):
            with Forked(arguments, words, ranks) as training:
                killed.append(kill_at(training, folder, moment, evaluate_every=every.evaluation))
            sessions.append(training)
            assert_whole_checkpoint(folder, every.checkpoint)
            moment = replace(moment, after_step=last_step(folder) + 1)
            if moment.during in ("step", killed[-1].hit):
                break
    with Forked(arguments, words, ranks) as training:
        assert training.join() == [0] * ranks, training.said()
    sessions.append(training)
    assert leftovers(folder) == [], leftovers(folder)
    wait_until(lambda: all(session.are_gone() for session in sessions), what="processes are left", every_s=0.05)
    return killed


def trained_whole(recipe: Path, ranks: int, precision: str) -> Path:
    """A run that was never stopped, beside the recipe; the second call finds it."""
    folder = recipe.parent / f"whole-{ranks}-{precision}"
    if not folder.exists():
        arguments = [str(recipe), f"train.precision={precision}", "--out", str(folder)]
        with Forked(arguments, folder.with_suffix(".words"), ranks) as training:
            assert training.join() == [0] * ranks, training.said()
    return folder


# torchrun, as from the shell -----------------------------------------------------------------------------------------


def torchrun(arguments: Sequence[str], mark: str) -> subprocess.Popen[str]:
    """`torchrun --nproc-per-node 2 -m mlip_cli pretrain ARGUMENTS`, with an environment by which it is found."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mlip_cli"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "KILLED_FOR_TESTS": mark}
    return subprocess.Popen(
        [*start, "pretrain", *arguments], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@dataclass(frozen=True)
class Found:
    """A process and what it began with."""

    number: int
    parent: int
    environment: dict[str, str]


def processes_marked(mark: str) -> list[Found]:
    """Those that `torchrun` began with this mark, theirs included, and that run. Linux."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            pairs = [
                pair.partition("=") for pair in (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            ]
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has ended
            continue
        environment = {name: value for name, _, value in pairs}
        if environment.get("KILLED_FOR_TESTS") == mark and state not in "ZX":
            found.append(Found(int(folder.name), int(parent), environment))
    return found


# a small file system -------------------------------------------------------------------------------------------------

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_REMOUNT = 32


class NoSmallDisk(Exception):
    """The system does not let us mount one."""


def mount_small_disk(folder: Path, mebibytes: int, *, again: bool = False) -> None:
    """A tmpfs of so many MiB on `folder`, or another size for the one that is there; only this process sees it. Linux.

    Raises:
        NoSmallDisk: the system allows none.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not again:
        user, group = os.getuid(), os.getgid()
        if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0:
            raise NoSmallDisk(f"unshare: {os.strerror(ctypes.get_errno())}")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    options = f"size={mebibytes}m".encode()
    flags = ctypes.c_ulong(MS_REMOUNT if again else 0)
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", flags, options) != 0:
        raise NoSmallDisk(f"mount: {os.strerror(ctypes.get_errno())}")


@dataclass(frozen=True)
class DiskStep:
    """What to do with the disk before `mlip pretrain` runs on it."""

    mebibytes: int
    is_filled: bool = False
    """Write a file that leaves no room at all; otherwise take it away."""


def train_on_small_disk(disk: str, steps: Sequence[DiskStep], arguments: Sequence[str], report: str) -> None:
    """Body of a forked process: a training on a disk of its own, again and again, and what it found as JSON.

    The disk is gone with the process; `report` gets for each step the exit code, the words, and the run's files, which
    are copied to `report`'s folder in the end.
    """
    own_group()
    folder, found = Path(disk) / "run", []
    for number, step in enumerate(steps):
        try:
            mount_small_disk(Path(disk), step.mebibytes, again=number > 0)
        except NoSmallDisk as error:
            Path(report).write_text(json.dumps(str(error)))
            return
        filler = Path(disk) / "filler"
        filler.unlink(missing_ok=True)
        if step.is_filled:
            fill(filler)
        words = Path(report).with_name(f"words-{number}")
        code = exit_code_of(lambda words=words: pretrain([*arguments, "--out", str(folder)], {}, str(words)))
        checkpoints = checkpoint_folders(folder / "checkpoints")
        for checkpoint in checkpoints:
            load_state(checkpoint), load_weights(checkpoint)
        names = [checkpoint.name for checkpoint in checkpoints]
        found.append({"code": code, "words": words.read_text(), "checkpoints": names, "leftovers": leftovers(folder)})
    shutil.copytree(folder, Path(report).with_name("run"))
    Path(report).write_text(json.dumps(found))


def fill(path: Path) -> None:
    """Write until nothing more fits."""
    with open(path, "wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            while True:
                try:
                    file.write(b"x" * size)
                except OSError:
                    break


def exit_code_of(body: Callable[[], None]) -> int:
    """Run `body` in a fork of this process."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            body()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
