"""prepare-data on many machines: --part I/N in processes of their own, then --finish."""

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_for_tests import mlip
from runs_of_prepare_for_tests import at_each_step, killed_at, run, said, started
from sources_for_tests import contents, write_sidecars
from waits_for_tests import wait_until

from mlip_cli.data.prepare.share import Share
from mlip_cli.errors import UsageError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
WORDS = ("in", "out", "--holdout", "0.3", "--workers", "1")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of 12 parts, and `whole`, which one process prepared."""
    folder = tmp_path_factory.mktemp("prepared")
    write_sidecars(folder / "in", 46)
    (folder / "in" / "00009.png").write_bytes(b"broken")
    code, words = run(folder, *WORDS)
    assert code == 0, words
    return (folder / "out").rename(folder / "whole").parent


@pytest.fixture
def folder(prepared: Path) -> Iterator[Path]:
    yield prepared
    for process in multiprocessing.active_children():  # a test that failed may leave one that stands still
        process.kill()
        process.join()
    shutil.rmtree(prepared / "out", ignore_errors=True)


def stopped_at(out: str, step: int) -> Callable[[], None]:
    """A prelude: the process stands still right before this step, until SIGCONT."""

    def act(count: int) -> None:
        if count == step:
            os.kill(os.getpid(), signal.SIGSTOP)

    return lambda: at_each_step(out, act)


def wait_until_it_stands(process: Any) -> None:
    state = Path(f"/proc/{process.pid}/stat")
    wait_until(lambda: state.read_text().rpartition(")")[2].split()[0] == "T", what="it does not stand")


def end(process: Any, folder: Path) -> str:
    """Its last line, once it ends well."""
    process.join(120)
    assert process.exitcode == 0, said(folder, process)
    return said(folder, process).splitlines()[-1]


def last_line(outcome: tuple[int, str], code: int) -> str:
    assert outcome[0] == code, outcome[1]
    return outcome[1].splitlines()[-1]


def test_three_shares_at_once_of_which_one_is_killed_leave_the_bytes_of_one_process(folder: Path) -> None:
    shares = [started(folder, [*WORDS, "--part", f"{i}/3"]) for i in (3, 1)]
    killed = started(folder, [*WORDS, "--part", "2/3"], killed_at("parts/.part-000007.json", 1))
    lines = [end(share, folder) for share in shares]
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert lines[0].startswith("out: part 3/3: 4 parts prepared; ")
    assert lines[1].startswith("out: part 1/3: 4 parts prepared; ")
    gaps = last_line(run(folder, *WORDS, "--finish"), 2)
    assert gaps == ("error: out: parts 8 and 11 are missing; run the same command with --part 2/3 instead of --finish")
    assert last_line(run(folder, *WORDS, "--part", "2/3"), 0) == (
        "out: part 2/3: 2 parts prepared, 2 were there; all 12 are there; next: the same command with --finish instead "
        "of --part"
    )
    assert run(folder, *WORDS, "--finish")[0] == 0
    assert contents(folder / "out") == contents(folder / "whole")
    assert not (folder / "out" / ".prepare").exists()


def test_any_number_of_shares_in_any_order_leaves_the_same_bytes(folder: Path) -> None:
    """Shares of five, then of two, then a plain run, which finishes."""
    for part in ("4/5", "2/5"):
        assert run(folder, *WORDS, "--part", part)[0] == 0
    assert last_line(run(folder, *WORDS, "--part", "1/2"), 0) == (
        "out: part 1/2: 4 parts prepared, 2 were there; 3 of all 12 are left to other machines; after them: the same "
        "command with --finish instead of --part"
    )
    assert last_line(run(folder, *WORDS, "--finish"), 2) == (
        "error: out: parts 6, 8 and 1 more are missing; run the same command without --finish, or with --part 1/N to "
        "--part N/N on N machines"
    )
    assert run(folder, *WORDS)[0] == 0
    assert contents(folder / "out") == contents(folder / "whole")


def test_who_may_work_beside_whom(folder: Path) -> None:
    at_work = started(folder, [*WORDS, "--part", "1/3"], stopped_at("parts/.part-000003.tar", 2))
    wait_until_it_stands(at_work)
    (torn,) = (folder / "out" / ".prepare" / "parts").glob(".part-000003.tar.*.tmp")
    here = "is writing here; wait for it"
    for words, which in (
        ((), ""),
        (("--finish",), ""),
        (("--part", "1/3"), " --part 1/3"),
        (("--part", "2/2"), " --part 1/3"),
    ):
        line = last_line(run(folder, *WORDS, *words), 2)
        assert line.removesuffix(" or name another folder") == f"error: out: another mlip prepare-data{which} {here}"
    assert last_line(run(folder, *WORDS[:3], "0.2", "--part", "2/3"), 2) == (
        "error: out: is half prepared from another source or with other options (holdout 0.3, now 0.2); remove it or "
        "name another folder"
    )
    assert run(folder, *WORDS, "--part", "2/3")[0] == 0
    assert torn.exists(), "a share removed what another one is writing"
    os.kill(at_work.pid, signal.SIGCONT)
    end(at_work, folder)
    assert run(folder, *WORDS, "--part", "3/3")[0] == 0
    finisher = started(folder, [*WORDS, "--finish"], stopped_at("finished/train/.train-000002.tar", 1))
    wait_until_it_stands(finisher)
    line = last_line(run(folder, *WORDS, "--part", "1/3"), 2)
    assert line == f"error: out: another mlip prepare-data without --part {here}"
    os.kill(finisher.pid, signal.SIGCONT)
    end(finisher, folder)
    assert contents(folder / "out") == contents(folder / "whole")
    assert last_line(run(folder, *WORDS, "--part", "1/3"), 0)  # says that it is prepared already


def test_finish_before_anything_was_prepared_leaves_nothing(folder: Path) -> None:
    assert last_line(run(folder, *WORDS, "--finish"), 2) == (
        "error: out: nothing was prepared here; run the same command without --finish, or with --part 1/N to "
        "--part N/N on N machines"
    )
    assert not (folder / "out").exists()


def test_of_a_source_of_one_part_the_words_are_about_one(tmp_path: Path) -> None:
    write_sidecars(tmp_path / "in", 3)
    then = "the same command with --finish instead of --part"
    assert last_line(run(tmp_path, *WORDS, "--part", "2/3"), 0) == (
        f"out: part 2/3: 0 parts prepared; the only one is left to other machines; after them: {then}"
    )
    assert last_line(run(tmp_path, *WORDS, "--part", "1/3"), 0) == (
        f"out: part 1/3: 1 part prepared; the only one is there; next: {then}"
    )


def test_a_killed_share_leaves_half_written_files_to_its_next_run_alone(folder: Path) -> None:
    parts = folder / "out" / ".prepare" / "parts"
    assert run(folder, *WORDS, "--part", "2/3", prelude=killed_at("parts/.part-000004.tar", 2))[0] == -9
    (torn,) = parts.glob(".part-000004.tar.*.tmp")
    assert run(folder, *WORDS, "--part", "1/3")[0] == 0
    assert torn.exists()
    assert run(folder, *WORDS, "--part", "2/3")[0] == 0
    assert not torn.exists()


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/", "-1/3", "a/b", "1/0", "1.0/3"])
def test_a_share_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as error:
        Share.read(text)
    assert str(error.value) == f"--part {text}: not a share; the shares of three machines are 1/3, 2/3 and 3/3"


def test_part_and_finish_are_two_commands(tmp_path: Path) -> None:
    done = mlip("prepare-data", "in", "out", "--part", "1/3", "--finish", folder=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "error: --part 1/3 --finish: run --part first, on each machine, and then --finish alone\n",
    )
