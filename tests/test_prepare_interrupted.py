"""Preparation that is killed, interrupted or out of space: no half-written file looks whole, the next run goes on."""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from locks_for_tests import held_elsewhere
from parts_for_tests import endless_part
from sources_for_tests import contents, prepare, write_sidecars
from waits_for_tests import wait_until

from mlip_cli.cli import main
from mlip_cli.data.prepare import assemble
from mlip_cli.data.prepare.locks import opened
from mlip_cli.data.prepare.request import finished_summary
from mlip_cli.data.sources import records
from mlip_cli.errors import UsageError
from mlip_cli.terminal import endings

ROOT = Path(__file__).parent.parent


def disturbed_run(folder: Path, disturb: Callable[[], None], *, workers: int = 1) -> tuple[int | None, str]:
    """Prepare `folder`/in in a forked process that does `disturb` when two parts are done: (exit code, stderr)."""
    process = multiprocessing.get_context("fork").Process(target=_disturbed, args=(folder, disturb, workers))
    process.start()
    process.join()
    return process.exitcode, (folder / "stderr").read_text()


def _disturbed(folder: Path, disturb: Callable[[], None], workers: int) -> None:
    run_parallel = assemble.run_parallel

    def disturbed(*arguments: Any, **options: Any) -> Iterator[Any]:
        for count, result in enumerate(run_parallel(*arguments, **options), start=1):
            if count == 2:
                disturb()
            yield result

    os.setsid()
    os.chdir(folder)
    signal.signal(signal.SIGINT, endings.interrupt)
    sys.stderr = open("stderr", "w")  # noqa: SIM115 - open until the process ends
    sys.argv = ["mlip", "prepare-data", "in", "out", "--holdout", "0", "--workers", str(workers)]
    records.PART_ROWS = 4
    assemble.run_parallel = disturbed
    main()


def visible(out: Path) -> list[str]:
    return [path.name for path in out.iterdir() if path.name != ".prepare"]


def assert_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished parts are not made again, and the result is that of a run that nobody disturbed."""
    made = []
    run_parallel = assemble.run_parallel

    def noted(*arguments: Any, **options: Any) -> Iterator[Any]:
        for result in run_parallel(*arguments, **options):
            made.append(result.number)
            yield result

    monkeypatch.setattr(records, "PART_ROWS", 4)
    monkeypatch.setattr(assemble, "run_parallel", noted)
    monkeypatch.chdir(tmp_path)
    prepare("in", Path("out"))
    assert made == [2, 3, 4]
    prepare("in", Path("undisturbed"))
    assert contents(Path("out")) == contents(Path("undisturbed"))
    assert not Path("out/.prepare").exists()


@pytest.mark.slow
def test_after_kill_9_the_next_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sidecars(tmp_path / "in", 20)
    code, _ = disturbed_run(tmp_path, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert code == -signal.SIGKILL
    assert visible(tmp_path / "out") == []
    work = tmp_path / "out" / ".prepare"
    (work / "parts" / ".part-000002.tar.1.tmp").write_bytes(b"half")
    (work / "parts" / ".part-000001.json.1.tmp").write_bytes(b'{"number": 1, "ro')
    assert_goes_on_to_the_same_bytes(tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_end_the_workers_and_leave_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, exit_code: int
) -> None:
    write_sidecars(tmp_path / "in", 20)
    parts = tmp_path / "out" / ".prepare" / "parts"

    def interrupt() -> None:
        wait_until(lambda: len(list(parts.glob(".*.tmp"))) == 2, what="two workers do not write")
        (tmp_path / "pids").write_text(" ".join(str(process.pid) for process in multiprocessing.active_children()))
        os.killpg(0, number)

    monkeypatch.setattr(assemble, "prepare_part", endless_part)
    code, said = disturbed_run(tmp_path, interrupt, workers=2)
    assert code == exit_code, said
    assert said.splitlines()[-1] == "out: interrupted; run the same command again: it goes on"
    assert "Traceback" not in said
    assert visible(tmp_path / "out") == []
    assert list(parts.glob(".*")) == []
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_a_full_disk_is_reported_and_the_next_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sidecars(tmp_path / "in", 20)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    code, said = disturbed_run(tmp_path, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6000, unlimited)))
    assert code == 1
    assert said.splitlines()[-1] == "error: out: File too large; make room and run the same command again: it goes on"
    assert visible(tmp_path / "out") == []
    assert list((tmp_path / "out" / ".prepare" / "parts").glob(".*")) == []
    assert_goes_on_to_the_same_bytes(tmp_path, monkeypatch)


@pytest.mark.slow
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
