"""A second Ctrl-C leaves at once, whatever hangs, on one rank and on two, with torchrun; no process stays behind."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_for_tests import Forked, last_step, pretrain, processes_marked, with_group
from models_for_tests import small_recipe
from shards_for_tests import make_dataset
from waits_for_tests import wait_until

from mlip_cli.recipe.load import recipe_yaml
from mlip_cli.train.signals import StopRequest

AT_ONCE_S = 20
"""On a machine that does much else; what hangs would hang forever."""


def hang(marker: str) -> None:
    """Wait for what never comes, where no signal is heard: in C, and without the interpreter's lock."""
    lock = ctypes.CDLL(None).pthread_mutex_lock
    mutex = ctypes.create_string_buffer(64)
    lock(mutex)
    Path(marker).touch()
    lock(mutex)


def sleep(marker: str) -> None:
    """Wait for what never comes, where signals are heard."""
    Path(marker).touch()
    time.sleep(1000)


def stuck(place: str, arguments: Sequence[str], environment: dict[str, str], words: str) -> None:
    """Body of a forked process: `mlip pretrain`, which hangs at `place` on rank 0 when it comes there a second time."""
    os.environ.update(environment)
    get_stuck(place, f"{words}.stuck")
    pretrain(arguments, environment, words)


def get_stuck(place: str, marker: str) -> None:
    from mlip_cli.data.loader import _Parts
    from mlip_cli.train import step

    owner: Any
    owner, name = {
        "the loader": (_Parts, "__getitem__"),
        "a step": (step, "add_gradients"),
        "a step of Python": (step, "add_gradients"),
    }[place]
    whole: Callable[..., Any] = getattr(owner, name)
    calls = []

    def hanging(*args: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 2 and os.environ.get("RANK", "0") == "0":
            Path(f"{marker}.pid").write_text(str(os.getpid()))
            hang(marker) if place != "a step of Python" else sleep(marker)
        return whole(*args, **named)

    setattr(owner, name, hanging)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("leaving")
    data = str(make_dataset(folder / "train", n=24))
    made = small_recipe(
        mlip=False,
        train=data,
        data={"num_workers": 1, "validation": data},
        log={"every_steps": 1},
        evaluate={"every_steps": 2},
    )
    (folder / "small.yaml").write_text(recipe_yaml(made))
    return folder / "small.yaml"


def arrived(pid: int) -> bool:
    """True when no signal waits for a process, or it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):  # it may end between opening and reading
        return True
    return all(int(line.split()[1], 16) == 0 for line in status.splitlines() if line.startswith(("SigPnd", "ShdPnd")))


def interrupt(training: Forked) -> None:
    """Ctrl-C: to each rank and its loader processes."""
    for process in training.processes:
        os.killpg(process.pid, signal.SIGINT)
    wait_until(lambda: all(arrived(process.pid) for process in training.processes), what="signals wait")


def test_signals_of_a_forked_process_do_not_count() -> None:
    """The terminal's Ctrl-C reaches loader processes too, and is one all the same."""
    with StopRequest(torch.device("cpu")) as stop:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(stop.exit_code)
        assert os.waitpid(child, 0)[1] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("place", "ranks"), [("the loader", 1), ("a step", 2)])
def test_a_second_ctrl_c_ends_a_process_that_python_cannot_interrupt(
    recipe: Path, tmp_path: Path, place: str, ranks: int
) -> None:
    """With two ranks the other one waits in a collective for the one that hangs."""
    arguments = [str(recipe), "--out", str(tmp_path / "run"), "train.checkpoint_every.steps=2"]
    words = tmp_path / "words"
    with Forked(arguments, words, ranks=ranks, body=partial(stuck, place)) as training:
        wait_until(Path(f"{words}.stuck").exists, what=f"nothing hangs: {training.said()}")
        interrupt(training)
        assert training.is_at_work()
        started = time.monotonic()
        interrupt(training)
        assert training.join() == [-signal.SIGINT] * ranks, training.said()
        assert time.monotonic() - started < AT_ONCE_S
        wait_until(training.are_gone, what="processes are left")
        stuck_process = int(Path(f"{words}.stuck.pid").read_text())  # of the loader's, which has a group of its own
        wait_until(lambda: not with_group(stuck_process, 0), what="a loader process is left")
    assert "Traceback" not in training.said()


TORCHRUN = """
import sys
sys.path.insert(0, {tests!r})
from test_leaving import get_stuck
from mlip_cli.__main__ import main

if {place!r}:
    get_stuck({place!r}, {marker!r})
sys.argv = ["mlip", "pretrain", *{arguments!r}]
if __name__ == "__main__":
    main()
"""


@pytest.fixture
def torchrun(recipe: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `mlip pretrain ARGUMENTS` on two ranks under torchrun, which hangs at `place`; ends what is left of it."""
    started = []

    def start(place: str, *arguments: str) -> subprocess.Popen[str]:
        script = tmp_path / "script.py"
        marker, given = str(tmp_path / "stuck"), [str(recipe), "--out", str(tmp_path / "run"), *arguments]
        script.write_text(
            TORCHRUN.format(tests=str(Path(__file__).parent), place=place, marker=marker, arguments=given)
        )
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "KILLED_FOR_TESTS": str(tmp_path)}
        started.append(subprocess.Popen(start, env=environment, text=True, stderr=subprocess.PIPE))
        return started[-1]

    yield start
    for found in processes_marked(str(tmp_path)):
        os.kill(found.number, signal.SIGKILL)
    for process in started:
        process.communicate()


@pytest.mark.slow
def test_a_second_ctrl_c_at_torchrun_leaves_at_once(
    torchrun: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """The shell's Ctrl-C reaches torchrun alone; it passes the first one on, and SIGTERM for the second."""
    process = torchrun("a step of Python")
    wait_until((tmp_path / "stuck").exists, what="nothing hangs")
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    passed_on = (line for line in process.stderr if "closing signal SIGINT" in line)
    assert len(list(islice(passed_on, 2))) == 2, "one a rank"
    time.sleep(0.5)  # as a person does: torchrun loses a signal that comes while it logs the one before
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert time.monotonic() - started < AT_ONCE_S, said
    wait_until(lambda: not processes_marked(str(tmp_path)), what="processes are left", every_s=0.1)


@pytest.mark.slow
def test_ranks_without_torchrun_save_and_end(torchrun: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = torchrun("", "train.steps=100000", "evaluate.every_steps=null")
    wait_until(lambda: last_step(tmp_path / "run") >= 2, what="no steps", every_s=0.01)
    process.kill()
    wait_until(lambda: not processes_marked(str(tmp_path)), what="processes are left", every_s=0.1)
    [checkpoint] = (tmp_path / "run" / "checkpoints").iterdir()
    assert int(checkpoint.name.removeprefix("step_")) == last_step(tmp_path / "run")
