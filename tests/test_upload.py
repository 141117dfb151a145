"""prepare-data into an object store: real HTTP to moto's S3, and fsspec's memory where a test orders failures."""

import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_for_tests import mlip
from fsspec.implementations.memory import MemoryFileSystem
from locks_for_tests import held_elsewhere
from sources_for_tests import asked, contents, prepare, write_sidecars
from stores_for_tests import FakeStore, served
from waits_for_tests import wait_until

from mlip_cli.commands.prepare_data import prepare_data
from mlip_cli.data.open import open_sources
from mlip_cli.data.prepare import shards
from mlip_cli.data.sources import records
from mlip_cli.errors import RunError, UsageError
from mlip_cli.recipe.config import Cache, Source
from mlip_cli.recipe.load import override

ROOT = Path(__file__).parent.parent
FILES = [
    f"{split}/{name}"
    for split, numbers in (("train", range(4)), ("validation", range(2)))
    for name in ("dataset.json", "sizes.json", *(f"{split}-00000{i}.{end}" for i in numbers for end in ("idx", "tar")))
]
ALL = [*FILES, "card.html", "rejects.parquet"]
"""What is sent; prepared.json is written in the end."""


@pytest.fixture(scope="module")
def server() -> Iterator[FakeStore]:
    with served() as found:
        yield found


@pytest.fixture
def s3(server: FakeStore, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> FakeStore:
    """A store with an empty bucket of the test's own: `bucket(request)`."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    server.make_bucket(bucket(request))
    return server


def bucket(request: pytest.FixtureRequest) -> str:
    return request.node.name.replace("_", "-").replace("[", "-").replace("]", "")[:60].strip("-")


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    yield MemoryFileSystem()
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture(autouse=True)
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures for four shards of training and two of validation; paths are relative to the test's folder."""
    monkeypatch.setattr(shards, "SHARD_SAMPLES", 8)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_sidecars(Path("in/train"), 32)
    write_sidecars(Path("in/validation"), 12)
    return Path("in")


def workspaces() -> list[Path]:
    return list(Path("cache/mlip/prepared").glob("*"))


def upload(url: str, **options: Any) -> None:
    """Prepare to a URL in this process."""
    prepare_data(asked("in", url, **options), as_json=True)


@pytest.mark.slow
def test_the_whole_way_to_s3_and_training_reads_it(s3: FakeStore, request: pytest.FixtureRequest) -> None:
    url = f"s3://{bucket(request)}/data/pictures"
    s3.client().put_object(Bucket=bucket(request), Key="data/pictures-of-others/x", Body=b"")
    done = mlip("prepare-data", "in", f"{url}/", "--workers", "1", "--holdout", "0", COLUMNS="500")
    assert done.returncode == 0, done.stderr
    prepare("in", Path("local"))
    there = s3.contents(bucket(request), "data/pictures/")
    summary = json.loads(there.pop("prepared.json"))
    card = there.pop("card.html").decode()
    assert there == contents(Path("local"))
    assert summary["out"] == url
    assert "<h1>pictures</h1>" in card
    assert f"{url}/train" in card
    assert "--check" not in card  # which reads folders alone
    [command] = [line for line in done.stderr.splitlines() if line.startswith("mlip pretrain laptop")]
    changes = {override("data.train", f"{url}/train"), override("data.validation", f"{url}/validation")}
    assert changes <= set(shlex.split(command))
    assert workspaces() == []
    cache = Cache(folder="shards")
    [data] = open_sources([Source(path=f"{url}/train")], cache=cache)
    [local] = open_sources([Source(path="local/train")], cache=cache)
    assert [data.read(id).key for id in range(32)] == [local.read(id).key for id in range(32)]

    again = mlip("prepare-data", "in", url, "--workers", "1", "--holdout", "0")
    assert again.returncode == 0, again.stderr
    assert f"{url}: prepared already, from the same files with the same options; nothing to do" in again.stderr
    assert "preparing" not in again.stderr
    assert "uploading" not in again.stderr
    other = mlip("prepare-data", "in", url, "--size", "32", "--holdout", "0")
    assert other.returncode == 2
    assert other.stderr == (
        f"error: {url}: was prepared from another source or with other options (size 256, now 32); remove it or name "
        "another folder\n"
    )


@pytest.mark.slow
def test_an_upload_that_is_killed_goes_on_and_the_card_comes_last(
    s3: FakeStore, request: pytest.FixtureRequest
) -> None:
    name = bucket(request)
    command = [sys.executable, "-m", "mlip_cli", "prepare-data", "in", f"s3://{name}/x", "--workspace", "here"]
    code = (
        "import sys, time\n"
        "from mlip_cli.data.prepare import shards, upload\n"
        "from mlip_cli.data.transfers import Transfers\n"
        "shards.SHARD_SAMPLES = 8\n"
        "send = Transfers.send\n"
        "Transfers.send = lambda *given: (time.sleep(0.2), send(*given))[1]\n"
        "sys.argv = ['mlip', *sys.argv[1:]]\n"
        "from mlip_cli.__main__ import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", code, *command[3:], "--workers", "1"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_until(lambda: len([name for name in s3.names(name, "x/") if name.endswith((".tar", ".idx"))]) >= 3, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    early = s3.names(name, "x/")
    assert not [found for found in early if found.endswith("dataset.json")]
    assert ".prepare/request.json" in early
    assert len(early) < len(FILES)
    times = {found["Key"]: found["LastModified"] for found in s3.client().list_objects_v2(Bucket=name)["Contents"]}

    watched: list[list[str]] = []
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(0.05):
            watched.append(s3.names(name, "x/"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    is_over.set()
    watcher.join()
    assert done.returncode == 0, done.stderr
    assert "the copy in here stays" in done.stderr
    assert sorted(s3.names(name, "x/")) == sorted([*ALL, "prepared.json"])
    there = s3.contents(name, "x/")
    there.pop("prepared.json")
    there.pop("card.html")
    here = {name: content for name, content in contents(Path("here")).items() if not name.startswith(".")}
    assert there == here
    assert json.loads(Path("here/prepared.json").read_bytes())["out"] == "here"
    after = {found["Key"]: found["LastModified"] for found in s3.client().list_objects_v2(Bucket=name)["Contents"]}
    kept = [key for key, when in times.items() if after.get(key) == when]
    assert len(kept) >= 2, (times, after)
    big = {name for name in FILES if name.endswith((".tar", ".idx"))}
    with_card = [names for names in watched if any(found.endswith("dataset.json") for found in names)]
    assert with_card
    assert all(big <= set(names) for names in with_card)
    with_summary = [names for names in watched if "prepared.json" in names]
    assert all(set(FILES) <= set(names) for names in with_summary)


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_one_line_before_the_work(s3: FakeStore) -> None:
    done = mlip("prepare-data", "in", "s3://no-such-bucket/x", "--workers", "1")
    assert done.returncode == 2
    assert done.stderr == (
        "error: s3://no-such-bucket/x: nothing can be written there (The specified bucket does not exist); correct "
        "the URL, or make the bucket\n"
    )
    assert workspaces() == []


def test_a_url_that_holds_something_else_is_refused(memory: MemoryFileSystem) -> None:
    memory.pipe_file("/bucket/x/notes.txt", b"mine")
    with pytest.raises(UsageError) as error:
        upload("memory://bucket/x")
    assert str(error.value) == "memory://bucket/x: holds other files; name a new place"
    assert memory.find("/bucket") == ["/bucket/x/notes.txt"]
    memory.pipe_file("/bucket/y/prepared.json", b"{}")
    with pytest.raises(UsageError) as error:
        upload("memory://bucket/y")
    assert str(error.value) == (
        "memory://bucket/y/prepared.json: not written by mlip prepare-data; name another folder"
    )


def fail_after(monkeypatch: pytest.MonkeyPatch, number: int, error: Exception) -> list[str]:
    """From its `number`-th file on, memory refuses those it is sent. Returns the names it takes."""
    taken: list[str] = []
    put, turns = MemoryFileSystem.put_file, itertools.count()

    def limited(self: MemoryFileSystem, path: str, place: str, **options: Any) -> None:
        if next(turns) >= number:
            raise error
        put(self, path, place, **options)
        taken.append(place.removeprefix("/bucket/x/"))

    monkeypatch.setattr(MemoryFileSystem, "put_file", limited)
    return taken


@pytest.mark.parametrize("number", [0, 5, 12, 14, len(ALL) - 1])
def test_after_a_failure_at_any_file_the_rest_is_sent_and_nothing_twice(
    memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with monkeypatch.context() as patch:
        before = fail_after(patch, number, ConnectionError("no route"))
        with pytest.raises(RunError, match=r"^memory://bucket/x/\S+: no route; check network and credentials"):
            upload("memory://bucket/x")
    assert len(workspaces()) == 1
    assert not memory.exists("/bucket/x/prepared.json")
    with monkeypatch.context() as patch:
        after = fail_after(patch, 99, ConnectionError())
        patch.setattr("mlip_cli.data.prepare.assemble.prepare", None)  # it is prepared
        upload("memory://bucket/x")
    assert sorted([*before, *after]) == sorted(ALL)
    assert [path.rpartition("/")[2] for path in after[-2:]] == ["dataset.json"] * 2 or number == len(ALL) - 1
    assert memory.exists("/bucket/x/prepared.json")
    assert not memory.exists("/bucket/x/.prepare/request.json")
    assert workspaces() == []


def test_a_file_that_changed_or_was_cut_there_is_sent_again(
    memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        before = fail_after(patch, len(ALL) - 1, ConnectionError("no route"))
        with pytest.raises(RunError):
            upload("memory://bucket/x")
    memory.pipe_file("/bucket/x/train/train-000001.tar", b"cut")
    [folder] = workspaces()
    os.utime(folder / "train/train-000002.tar")
    taken = fail_after(monkeypatch, 99, ConnectionError())
    upload("memory://bucket/x")
    again = {"train/train-000001.tar", "train/train-000002.tar"}
    assert sorted(taken) == sorted(again | (set(ALL) - set(before)))
    prepare("in", Path("local"))
    assert memory.cat_file("/bucket/x/train/train-000001.tar") == Path("local/train/train-000001.tar").read_bytes()


def test_a_file_that_is_not_there_whole_after_it_was_sent_stops_the_upload(
    memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = MemoryFileSystem.put_file

    def cutting(self: MemoryFileSystem, path: str, place: str, **options: Any) -> None:
        put(self, path, place, **options)
        if place.endswith("train-000002.tar"):
            self.pipe_file(place, b"cut")

    size = []
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "put_file", cutting)
        with pytest.raises(RunError) as error:
            upload("memory://bucket/x")
    [folder] = workspaces()
    size.append((folder / "train/train-000002.tar").stat().st_size)
    assert str(error.value) == (
        f"memory://bucket/x/train/train-000002.tar: 3 bytes where {size[0]} were sent; run the same command again: it "
        "goes on"
    )
    assert not [path for path in memory.find("/bucket") if path.endswith(("dataset.json", "prepared.json"))]
    upload("memory://bucket/x")
    assert memory.info("/bucket/x/train/train-000002.tar")["size"] == size[0]


def test_what_a_kill_between_the_last_two_steps_leaves_is_removed(
    memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("mlip_cli.data.prepare.upload.Store.clear", lambda _: None)
        upload("memory://bucket/x")
    assert memory.exists("/bucket/x/.prepare/request.json")
    assert len(workspaces()) == 1
    upload("memory://bucket/x")
    assert not memory.exists("/bucket/x/.prepare/request.json")
    assert workspaces() == []
    memory.rm_file("/bucket/x/validation/dataset.json")
    with pytest.raises(UsageError) as error:
        upload("memory://bucket/x")
    assert str(error.value) == (
        "memory://bucket/x: was prepared, but validation/dataset.json is gone; remove what is there and prepare it "
        "again"
    )


def test_one_folder_serves_two_urls_and_one_process_uploads_it(memory: MemoryFileSystem) -> None:
    upload("memory://bucket/x", workspace=Path("here"))
    upload("memory://bucket/y", workspace=Path("here"))
    x, y = (
        {path.removeprefix(f"/bucket/{name}/"): memory.cat_file(path) for path in memory.find(f"/bucket/{name}")}
        for name in "xy"
    )
    assert x.keys() == y.keys()
    assert {name for name in x if x[name] != y[name]} == {"prepared.json", "card.html"}
    with held_elsewhere(Path("here/.upload/lock")), pytest.raises(UsageError) as error:
        upload("memory://bucket/z", workspace=Path("here"))
    assert str(error.value) == "here: another mlip prepare-data is uploading it; wait for it"


def test_what_a_retry_needs_is_not_sent(memory: MemoryFileSystem, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    names = [*map(str, sorted(Path("in/train").glob("*.png"))), "gone.png"]
    Path("list.csv").write_text("file_name,caption\n" + "".join(f"{name},a picture\n" for name in names))
    prepare_data(asked("list.csv", "memory://bucket/x", workspace=Path("made")), as_json=True)
    assert Path("made/retry.npz").is_file()
    assert memory.exists("/bucket/x/rejects.parquet")
    assert not memory.exists("/bucket/x/retry.npz")
    said = caplog.text
    assert "1 x picture missing" in said
    assert "--retry-failed" not in said


def test_other_options_are_refused_once_files_are_there(
    memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in Path("in/train").glob("*.png"):
        path.with_suffix(".txt").write_text("")
    with pytest.raises(RunError, match="nothing was kept"):
        upload("memory://bucket/x")
    assert memory.find("/bucket") == []
    write_sidecars(Path("in/train"), 32)
    fail_after(monkeypatch, 3, ConnectionError("no route"))
    with pytest.raises(RunError, match="no route"):
        upload("memory://bucket/x")
    with pytest.raises(UsageError) as error:
        upload("memory://bucket/x", size=32, workspace=Path("elsewhere"))
    assert str(error.value) == (
        "memory://bucket/x: is half uploaded from another source or with other options (size None, now 32); remove it "
        "or name another folder"
    ).replace("None", "256")


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("file:///data/x", [], "file:///data/x: a folder of this machine; write /data/x"),
        ("nonsense://x", [], "nonsense://x: fsspec knows no protocol nonsense://; copy the data to a disk"),
        (
            "out",
            ["--workspace", "here"],
            "--workspace here: for an OUT at a URL, and out is a folder; leave it out",
        ),
        ("s3:bucket/x", [], "mlip prepare-data: OUT: s3:bucket/x: a URL or a stream, and a path of this machine is"),
    ],
)
def test_places_that_cannot_be_used(out: str, options: list[str], message: str) -> None:
    done = mlip("prepare-data", "in", out, *options, COLUMNS="500")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}"), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not Path("out").exists()


def test_machines_share_the_workspace_and_the_one_that_finishes_uploads(
    memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(records, "PART_ROWS", 8)
    url, here = "memory://bucket/x", Path("here")
    for options in ({"part": "1/2"}, {"finish": True}):
        with pytest.raises(UsageError) as error:
            upload(url, **options)
        assert str(error.value) == (
            f"{url}: --part and --finish need a folder that all machines share; name the same one to each: --workspace"
        )
    upload(url, workspace=here, part="2/2")
    assert json.loads(capsys.readouterr().out)["out"] == "here"
    with pytest.raises(UsageError, match=r"^here: parts 1, 3 and 1 more are missing; "):
        upload(url, workspace=here, finish=True)
    upload(url, workspace=here, part="1/2")
    assert not [path for path in memory.find("/bucket") if ".prepare" not in path]
    upload(url, workspace=here, finish=True)
    prepare("in", Path("local"))
    there = {path.removeprefix("/bucket/x/"): memory.cat_file(path) for path in memory.find("/bucket/x")}
    assert sorted(there) == sorted([*ALL, "prepared.json"])
    assert {name: there[name] for name in contents(Path("local"))} == contents(Path("local"))
    capsys.readouterr()
    upload(url, workspace=here, part="1/2")
    assert json.loads(capsys.readouterr().out)["out"] == url
