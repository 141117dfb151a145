"""Work in several processes."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from waits_for_tests import wait_until

from mlip_cli.data.prepare.workers import run_parallel
from mlip_cli.errors import RunError


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 3])
def test_every_task_is_done_once(num_workers: int) -> None:
    assert sorted(run_parallel(abs, range(-7, 0), num_workers=num_workers)) == [1, 2, 3, 4, 5, 6, 7]
    assert list(run_parallel(abs, [], num_workers=num_workers)) == []


def test_an_error_in_a_worker_is_raised_in_the_driver_with_its_traceback() -> None:
    with pytest.raises(ValueError, match="invalid literal") as error:
        list(run_parallel(int, ["1", "x"], num_workers=2))
    assert "in a worker process:\nTraceback" in error.value.__notes__[0]


def test_a_worker_that_dies_is_reported() -> None:
    with pytest.raises(RunError) as error:
        list(run_parallel(os._exit, [3], num_workers=2))
    assert str(error.value) == (
        "a worker process died (exit code 3); out of memory? Run the same command again to go on, with fewer --workers "
        "if it happens again"
    )


def endless(folder: str) -> None:
    """Say who works here, and work on."""
    Path(folder, str(os.getpid())).touch()
    time.sleep(600)


def drive(folder: str) -> None:
    list(run_parallel(endless, [folder, folder], num_workers=2))


@pytest.mark.slow
def test_workers_end_in_the_middle_of_their_tasks_when_the_driver_is_killed(tmp_path: Path) -> None:
    driver = multiprocessing.get_context("fork").Process(target=drive, args=(str(tmp_path),))
    driver.start()
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2, what="two workers do not begin")
    workers = [int(path.name) for path in tmp_path.iterdir()]
    os.kill(driver.pid, signal.SIGKILL)
    driver.join()
    wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers), what="workers are left")


def count_up(task: int, say: Callable[[str], None]) -> int:
    for step in range(3):
        say(f"{task}.{step}")
    return task


@pytest.mark.parametrize(("num_workers", "at_once"), [(1, 1), (2, 1), (1, 3)])
def test_what_tasks_say_is_heard_before_their_results(num_workers: int, at_once: int) -> None:
    heard: list[str] = []
    done: list[int] = []
    for task in run_parallel(count_up, range(5), num_workers=num_workers, at_once=at_once, hear=heard.append):
        assert [words for words in heard if words.startswith(f"{task}.")] == [f"{task}.0", f"{task}.1", f"{task}.2"]
        done.append(task)
    assert sorted(done) == [0, 1, 2, 3, 4]
    assert len(heard) == 15
