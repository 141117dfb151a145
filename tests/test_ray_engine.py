"""prepare-data on a real Ray of this machine: the same bytes, workers that are killed, nodes that see another disk."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from uuid import uuid4

import pytest
from command_for_tests import mlip
from download_server_for_tests import DownloadServer
from ray_tasks_for_tests import dying, failing, number_and_process, part_that_waits_once
from sources_for_tests import contents, prepare, samples, write_sidecars
from waits_for_tests import wait_until

from mlip_cli.data.prepare import assemble, ray_engine
from mlip_cli.data.sources import records
from mlip_cli.errors import RunError, UsageError

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.slow]


@pytest.fixture(autouse=True)
def own_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of Ray import what the tests import."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five parts of four pictures, in the folder of the test; paths are relative to it."""
    monkeypatch.setattr(records, "PART_ROWS", 4)
    monkeypatch.chdir(tmp_path)
    return write_sidecars(Path("in"), 18)


def test_the_bytes_are_those_of_processes_and_stderr_is_ours_alone(
    source: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / "00007.png").write_bytes(b"no picture")
    prepare(source, Path("processes"))
    capfd.readouterr()
    Path("home").mkdir()
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    done = mlip("prepare-data", "in", "ray", "--holdout", "0", "--engine", "ray", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert contents(Path("ray")) == contents(Path("processes"))
    assert "ray: 2 processes on a Ray of this command alone" in done.stderr.splitlines()
    assert capfd.readouterr() == ("", "")  # what Ray's own processes and its C++ write
    assert not Path("ray/.prepare").exists()
    assert not Path("home/.ray").exists()  # where Ray would write a token


def test_downloads_and_failed_ones_again(source: Path) -> None:
    """The bytes are those of processes, and a second try asks for failed rows alone."""
    kinds = ("good", "busy_once", "nothing", "good", "noai")
    words = ("--holdout", "0", "--allow-private", "--retries", "0", "--workers", "2", "--timeout", "10")
    with DownloadServer() as server:
        rows = "".join(f"{server.url(f'{kinds[i % 5]}/{i}')}\tpicture of thing {i}\n" for i in range(20))
        Path("list.tsv").write_text(f"url\tcaption\n{rows}")
        first = mlip("prepare-data", "list.tsv", "ray", *words, "--engine", "ray")
        assert first.returncode == 0, first.stderr
        assert len(samples(Path("ray"))) == 8
        asked = server.asked.copy()
        assert sorted(set(asked.values())) == [1]
        again = mlip("prepare-data", "list.tsv", "ray", *words, "--engine", "ray", "--retry-failed")
        assert again.returncode == 0, again.stderr
        assert {path.split("/")[1] for path, n in server.asked.items() if n > asked[path]} == {"busy_once"}
        assert len(samples(Path("ray"))) == 12
        processes = mlip("prepare-data", "list.tsv", "processes", *words)
        assert processes.returncode == 0, processes.stderr
    assert contents(Path("ray")) == contents(Path("processes"))


def test_a_worker_that_is_killed_is_replaced_and_the_bytes_are_the_same(
    source: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    killed, folder = [], source.absolute().parent

    def kill() -> None:
        wait_until((folder / "waits").exists, what="no part waits")
        killed.append(int((folder / "waits").read_text()))
        os.kill(killed[0], signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(assemble, "prepare_part", part_that_waits_once)
        killer = threading.Thread(target=kill)
        killer.start()
        prepare(source, Path("ray"), engine="ray", workers=2)
        killer.join()
    assert killed
    assert killed[0] != os.getpid()
    json.loads(capfd.readouterr().out)  # the summary alone
    prepare(source, Path("processes"))
    assert contents(Path("ray")) == contents(Path("processes"))


def test_sigterm_ends_it_as_it_ends_processes(source: Path) -> None:
    code = (
        "from mlip_cli.cli import main\nfrom mlip_cli.data.prepare import assemble\n"
        "from mlip_cli.data.sources import records\nfrom ray_tasks_for_tests import part_that_waits_once\n"
        "records.PART_ROWS, assemble.prepare_part = 4, part_that_waits_once\nmain()"
    )
    command = [sys.executable, "-c", code, "prepare-data", str(source), "out", "--engine", "ray", "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_until(Path("waits").exists, process)
    process.terminate()
    said = process.communicate()[1].splitlines()
    assert (process.returncode, said[-1]) == (143, "out: interrupted; run the same command again: it goes on")
    assert list(Path("out/.prepare/parts").glob(".*")) == []


def test_tasks_are_done_once_errors_keep_their_type_and_a_worker_that_dies_again_and_again_is_reported(
    tmp_path: Path,
) -> None:
    found = list(ray_engine.run_parallel(number_and_process, range(20), num_workers=2, folder=tmp_path))
    assert sorted(task for task, _ in found) == list(range(20))
    assert os.getpid() not in {process for _, process in found}
    with pytest.raises(UsageError) as error:
        list(ray_engine.run_parallel(failing, range(5), num_workers=2, folder=tmp_path))
    assert str(error.value) == "task 3: of no use"
    assert "in failing" in error.value.__notes__[0]
    with pytest.raises(RunError) as died:
        list(ray_engine.run_parallel(dying, [0], num_workers=1, folder=tmp_path))
    assert str(died.value) == (
        "a worker process died (4 times in the same part); out of memory? Run the same command again to go on, with "
        "fewer --workers if it happens again"
    )
    assert list(tmp_path.iterdir()) == []


def test_no_more_tasks_are_read_than_two_for_each_process(tmp_path: Path) -> None:
    read = []

    def tasks() -> Iterator[int]:
        for task in range(40):
            read.append(task)
            yield task

    ahead = []
    for count, _ in enumerate(ray_engine.run_parallel(number_and_process, tasks(), num_workers=2, folder=tmp_path)):
        ahead.append(len(read) - count - 1)
    assert max(ahead) == 4


def test_ctrl_c_ends_it_at_once_and_leaves_no_process(source: Path, tmp_path: Path) -> None:
    code = (
        "import signal, sys\n"
        "from mlip_cli.data.prepare import assemble\n"
        "from mlip_cli.data.sources import records\n"
        "from ray_tasks_for_tests import part_that_waits_once\n"
        "records.PART_ROWS, assemble.prepare_part = 4, part_that_waits_once\n"
        "sys.argv = ['mlip', 'prepare-data', 'in', 'out', '--engine', 'ray', '--workers', '1', '--holdout', '0']\n"
        "from mlip_cli.__main__ import main\n"
        "main()\n"
    )
    env = os.environ | {"MARK_OF_THE_TEST": str(tmp_path)}
    command = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=env, process_group=0
    )
    wait_until(Path("waits").exists, command)
    started = time.monotonic()
    os.killpg(command.pid, signal.SIGINT)
    _, said = command.communicate(timeout=60)
    took_s = time.monotonic() - started
    assert command.returncode == 130
    assert said.splitlines()[-1] == "out: interrupted; run the same command again: it goes on"
    assert "Traceback" not in said
    assert took_s < 30, took_s
    wait_until(lambda: not processes_with(f"MARK_OF_THE_TEST={tmp_path}"), what="processes are left", every_s=0.1)
    assert list(Path("out/.prepare/parts").glob(".*")) == []


def processes_with(variable: str) -> list[int]:
    """Processes whose environment has this variable. Linux."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # it has ended, or is not ours
            continue
    return found


def test_without_ray_the_line_says_how_to_install_it(source: Path) -> None:
    code = (
        "import importlib.util, sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'ray':\n"
        "            raise ModuleNotFoundError(name)\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, package=None: None if name == 'ray' else find(name, package)\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "from mlip_cli.__main__ import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", code, "prepare-data", "in", "out", "--engine", "ray"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'error: --engine ray: ray is not installed; pip install "mlip-cli[ray]"\n'
    assert not Path("out").exists()


def test_a_cluster_that_is_not_there(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    done = mlip("prepare-data", "in", "out", "--engine", "ray")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == (
        "error: RAY_ADDRESS 127.0.0.1:1: Connection refused; start the cluster, or unset RAY_ADDRESS"
    )


def test_a_node_that_sees_another_disk_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes; for the second one, an empty disk lies over the folder."""
    out = tmp_path / "out"
    out.mkdir()
    if not shutil.which("unshare") or subprocess.run(["unshare", "-Urm", "true"], check=False).returncode:
        pytest.skip("this system gives no process a disk of its own")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats", "--num-cpus", "1"]
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # else only a head takes the token that Ray keeps for a user
    monkeypatch.setenv("RAY_AUTH_TOKEN", uuid4().hex)
    with tempfile.TemporaryDirectory(dir="/tmp") as sessions, ExitStack() as nodes:
        head = ["--head", "--include-dashboard", "false", "--port", str(port), "--temp-dir", sessions]
        nodes.enter_context(node([*start, "--node-ip-address", "127.0.0.1", *head]))
        address = f"127.0.0.1:{port}"
        mounted = f'mount -t tmpfs none {out} && exec "$@"'
        nodes.enter_context(node(["unshare", "-Urm", "sh", "-c", mounted, "sh", *start, "--address", address]))
        monkeypatch.setenv("RAY_ADDRESS", address)
        command = [sys.executable, "-m", "mlip_cli", "prepare-data", "in", "out", "--engine", "ray"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        line = done.stderr.splitlines()[-1]
        assert line.startswith("error: node "), done.stderr
        assert line.endswith(
            f": does not see what this machine writes to {out / '.prepare/parts'}; name a folder on a disk that all "
            "nodes share"
        )
        assert list(Path("out/.prepare/parts").iterdir()) == []
        assert "ray: 2 processes on 2 nodes of 127.0.0.1" in done.stderr


@contextmanager
def node(command: list[str]) -> Iterator[None]:
    """A node of a cluster, from the time when it has joined; its processes end with the block."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0)
    try:
        said = []
        for line in process.stdout or ():
            said.append(line)
            if "Ray runtime started" in line:
                break
        else:
            pytest.fail("".join(said))
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
