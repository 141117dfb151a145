"""Killed, interrupted, out of space: nothing half-written looks whole, and the next run goes on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from locks_for_tests import held_elsewhere
from sources_for_tests import contents, prepare, write_sidecars

from mlip_cli.data.prepare.workspace import PartResult, Workspace, finished_summary, opened
from mlip_cli.data.sources import records
from mlip_cli.errors import UsageError

ROOT = Path(__file__).parent.parent

CHILD = """
import multiprocessing, os, resource, signal, sys
from mlip_cli.cli import main
from mlip_cli.data.sources import records
from mlip_cli.data.prepare.workspace import Workspace

def disturbed(work, result, remember=Workspace.remember):
    remember(work, result)
    if result.number == 1:
        print("workers", *[process.pid for process in multiprocessing.active_children()], flush=True)
        {disturb}

if __name__ == "__main__":
    records.PART_ROWS = 4
    Workspace.remember = disturbed
    main()
"""


def disturbed_run(tmp_path: Path, disturb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run prepare-data on tmp_path/in in a process of its own and do `disturb` after its second part."""
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(disturb=disturb))
    command = [sys.executable, str(script), "prepare-data", "in", "out", "--holdout", "0", *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    return subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, start_new_session=True
    )


def visible(out: Path) -> list[str]:
    return [path.name for path in out.iterdir() if path.name != ".prepare"]


def worker_pids(done: subprocess.CompletedProcess[str]) -> list[int]:
    return [int(word) for word in done.stdout.split()[1:]]


def assert_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal's parts are not made again, and the result is that of a run that nobody disturbed."""
    made = []
    remember = Workspace.remember

    def remembered(work: Workspace, result: PartResult) -> None:
        made.append(result.number)
        remember(work, result)

    monkeypatch.setattr(records, "PART_ROWS", 4)
    monkeypatch.setattr(Workspace, "remember", remembered)
    monkeypatch.chdir(tmp_path)
    prepare("in", Path("out"))
    assert made == [2, 3, 4]
    prepare("in", Path("undisturbed"))
    assert contents(Path("out")) == contents(Path("undisturbed"))
    assert not Path("out/.prepare").exists()


def test_after_kill_9_the_next_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sidecars(tmp_path / "in", 20)
    done = disturbed_run(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", "--workers", "1")
    assert done.returncode == -9
    assert visible(tmp_path / "out") == []
    work = tmp_path / "out" / ".prepare"
    (work / "parts" / ".part-000002.tar.1.tmp").write_bytes(b"half")
    with open(work / "journal.jsonl", "a") as journal:
        journal.write('\n{"number": 2, "ro')
    assert_goes_on_to_the_same_bytes(tmp_path, monkeypatch)


def test_ctrl_c_ends_the_workers_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    write_sidecars(tmp_path / "in", 20)
    done = disturbed_run(tmp_path, "os.killpg(0, signal.SIGINT)", "--workers", "2")
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1] == "out: interrupted; run the same command again: it goes on"
    assert "Traceback" not in done.stderr
    assert visible(tmp_path / "out") == []
    assert list((tmp_path / "out" / ".prepare" / "parts").glob(".*")) == []
    pids = worker_pids(done)
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_full_disk_is_named_and_the_next_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sidecars(tmp_path / "in", 20)
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))"
    done = disturbed_run(tmp_path, limit, "--workers", "1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "error: out: File too large; make room and run the same command again: it goes on"
    )
    assert visible(tmp_path / "out") == []
    assert list((tmp_path / "out" / ".prepare" / "parts").glob(".*")) == []
    assert_goes_on_to_the_same_bytes(tmp_path, monkeypatch)


def test_a_second_run_loads_nothing_heavy(tmp_path: Path) -> None:
    write_sidecars(tmp_path / "in", 2)
    prepare(tmp_path / "in", tmp_path / "out")
    code = "import sys; from mlip_cli.cli import main\ntry: main()\nfinally: print(*sys.modules)"
    command = [sys.executable, "-c", code, "prepare-data", "in", "out", "--holdout", "0", "--json"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert loaded.isdisjoint({"torch", "numpy", "PIL", "pyarrow", "webdataset"})


def test_a_half_prepared_folder_keeps_its_request_and_its_lock(tmp_path: Path) -> None:
    request = {"size": 64, "source_fingerprint": "a"}
    with opened(tmp_path / "out", request) as work:
        pass
    with held_elsewhere(work.folder / "lock"), pytest.raises(UsageError) as error, opened(tmp_path / "out", request):
        pass
    assert str(error.value) == (
        f"{tmp_path / 'out'}: another mlip prepare-data is writing here; wait for it or name another folder"
    )
    assert finished_summary(tmp_path / "out", request) is None
    with pytest.raises(UsageError) as error:
        finished_summary(tmp_path / "out", request | {"size": 32})
    assert str(error.value) == (
        f"{tmp_path / 'out'}: is half prepared from another source or with other options (size 64, now 32); remove it "
        "or name another folder"
    )
