"""prepare-data on tables of URLs: real processes, a real server, and every row accounted for."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from download_server_for_tests import DownloadServer
from sources_for_tests import asked, contents, picture, prepare, rejects, samples, write_files
from waits_for_tests import wait_until

from mlip_cli.commands.prepare_data import prepare_data
from mlip_cli.data.download.options import DownloadOptions
from mlip_cli.data.prepare.parts import in_order
from mlip_cli.data.sources import records
from mlip_cli.errors import RunError
from mlip_cli.terminal.panel import WorkProgress

ROOT = Path(__file__).parent.parent
PRIVATE = DownloadOptions(allow_private=True, timeout_s=2, retries=1)
BUILD = {"holdout": 0.0, "image_column": "url", "caption_column": "caption"}


def write_list(folder: Path, urls: list[str]) -> Path:
    """A table of URLs with a caption each."""
    rows = "".join(f"{url}\ta picture of thing {i}\n" for i, url in enumerate(urls))
    return write_files(folder, {"list.tsv": f"url\tcaption\n{rows}"}) / "list.tsv"


def command(source: Path, out: Path, *options: str) -> list[str]:
    named = ["--image-column", "url", "--caption-column", "caption", "--holdout", "0", "--allow-private", "--json"]
    return [sys.executable, "-m", "mlip_cli", "prepare-data", str(source), str(out), *named, *options]


def started(arguments: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def test_rows_of_one_url_are_one_picture_and_its_json_says_where_from(tmp_path: Path, server: DownloadServer) -> None:
    local = write_files(tmp_path / "in", {"here.png": picture(1)}) and "here.png"
    urls = [server.url("slow/3"), server.url("good/1"), server.url("nothing"), local, server.url("good/1"), "s3://a/b"]
    source = write_list(tmp_path / "in", urls)
    summary = prepare(source, tmp_path / "out", download=PRIVATE, **BUILD)
    assert (summary["rows"], summary["pictures"], summary["rejects"]) == (6, 5, 3)
    found = samples(tmp_path / "out")
    assert [sample["key"] for sample in found] == ["000000000", "000000003"]
    assert [sample["source"] for sample in found] == [
        {"file": "list.tsv", "row": 0, "url": urls[0]},
        {"file": "list.tsv", "row": 1, "url": urls[1]},
    ]
    assert [caption["text"] for caption in found[1]["captions"]] == ["a picture of thing 1", "a picture of thing 4"]
    assert server.asked["/good/1"] == 1
    assert rejects(tmp_path / "out") == [
        ("list.tsv", 2, "not found (404)", f"{urls[2]}: status 404"),
        ("list.tsv", 3, "no http(s) address", "here.png"),
        ("list.tsv", 5, "no http(s) address", "s3://a/b"),
    ]


def test_a_finished_download_asks_for_nothing_again(tmp_path: Path, server: DownloadServer) -> None:
    source = write_list(tmp_path / "in", [server.url(f"good/{i}") for i in range(3)])
    prepare(source, tmp_path / "out", download=PRIVATE, **BUILD)
    asked = server.asked.total()
    prepare(source, tmp_path / "out", download=PRIVATE, **BUILD)
    assert server.asked.total() == asked == 3


def test_a_private_list_is_refused_with_the_cure(tmp_path: Path, server: DownloadServer) -> None:
    source = write_list(tmp_path / "in", [server.url(f"good/{i}") for i in range(1_200)])
    with pytest.raises(RunError) as error:
        prepare(source, tmp_path / "out", **BUILD)
    assert str(error.value) == (
        f"{source}: 1000 of the first 1000 rows fail for the same reason: address refused (first: list.tsv row 0: "
        f"{server.url('good/0')}: 127.0.0.1 is this machine); if these are servers of your own network, say "
        "--allow-private; nothing was kept"
    )
    assert not server.asked
    assert not (tmp_path / "out").exists()
    with pytest.raises(RunError, match=r"none of the 3 rows .*; if these are servers .*, say --allow-private"):
        prepare(write_list(tmp_path / "few", [server.url(f"good/{i}") for i in range(3)]), tmp_path / "out", **BUILD)


def test_a_list_of_which_most_is_gone_is_kept(tmp_path: Path, server: DownloadServer) -> None:
    urls = [server.url(f"{'good' if i % 10 == 0 else 'nothing'}/{i}") for i in range(1_100)]
    summary = prepare(write_list(tmp_path / "in", urls), tmp_path / "out", download=PRIVATE, **BUILD)
    assert summary["splits"]["train"]["num_samples"] == 110
    assert summary["reasons"] == {"not found (404)": 990}


def test_progress_counts_outcomes(tmp_path: Path, server: DownloadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    described: list[str] = []
    real = WorkProgress.update

    def update(self: WorkProgress, task_id: int, **options: object) -> None:
        if options.get("description"):
            described.append(str(options["description"]))
        real(self, task_id, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(WorkProgress, "update", update)
    monkeypatch.setattr(records, "PART_ROWS", 8)
    kinds = ["good", "good", "nothing", "noai", "gone", "html", "nothing", "empty"]
    urls = [server.url(f"{kind}/{i}") for i, kind in enumerate(kinds * 2)]
    prepare(write_list(tmp_path / "in", urls), tmp_path / "out", download=PRIVATE, **BUILD)
    assert described[0] == "0 samples"
    assert described[-1] == "4 samples, 4 not a picture, 4 not found (404), 2 HTTP 410, 2 other rejects"


def test_progress_moves_row_by_row(tmp_path: Path, server: DownloadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one part, whose rows end one after another."""
    completed: list[float] = []
    real = WorkProgress.update

    def update(self: WorkProgress, task_id: int, **options: float) -> None:
        completed.append(options.get("completed", 0))
        real(self, task_id, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(WorkProgress, "update", update)
    urls = [server.url(f"slow/{i}") for i in range(12)]
    one_by_one = replace(PRIVATE, connections_per_host=1)
    prepare(write_list(tmp_path / "in", urls), tmp_path / "out", download=one_by_one, **BUILD)
    assert set(completed) >= {0, 12}
    assert len(set(completed)) > 4


def test_a_list_of_one_part_gets_all_connections_to_a_host(tmp_path: Path, server: DownloadServer) -> None:
    urls = [server.url(f"slow/{i}") for i in range(12)]
    prepare(write_list(tmp_path / "in", urls), tmp_path / "out", download=PRIVATE, workers=4, **BUILD)
    assert max(server.most_open.values()) == PRIVATE.connections_per_host


def test_workers_share_the_connections_that_are_told(
    tmp_path: Path, server: DownloadServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures inside a table make parts by their bytes, so it has more parts than its rows tell."""
    monkeypatch.setattr(records, "PART_BYTES", 1)
    monkeypatch.setattr(records, "PART_ROWS", 4)
    pictures = [{"bytes": None, "path": server.url(f"good/{i}")} for i in range(4)]
    rows = [*pictures, *({"bytes": picture(i), "path": None} for i in range(2))]
    table = [{"image": cell, "caption": f"a picture of thing {i}"} for i, cell in enumerate(rows)]
    (tmp_path / "in").mkdir()
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "in" / "mixed.parquet")
    with caplog.at_level("INFO", logger="mlip_cli"):
        prepare(tmp_path / "in" / "mixed.parquet", tmp_path / "out", download=PRIVATE, workers=3)
        urls = [server.url(f"good/{i}") for i in range(9)]
        part = {"part": "1/2", "download": PRIVATE, "workers": 3, **BUILD}
        prepare_data(asked(write_list(tmp_path / "list", urls), tmp_path / "part", **part), as_json=True)
    told = [message for message in caplog.messages if "to download" in message]
    assert told == [
        "4 pictures to download: at most 126 connections, 6 to a host, 2 s a try, 1 retry; pictures whose owner opts "
        "out are left out",
        "about 5 pictures to download: at most 128 connections, 8 to a host, 2 s a try, 1 retry; pictures whose owner "
        "opts out are left out",
    ]


def test_answers_are_put_into_order() -> None:
    assert list(in_order([(2, "c"), (0, "a"), (1, "b"), (3, "d")])) == [(0, "a"), (1, "b"), (2, "c"), (3, "d")]
    asked: list[int] = []

    def answers() -> Iterator[tuple[int, str]]:
        for position in (0, 1, 2):
            asked.append(position)
            yield position, "x"

    assert next(in_order(answers())) == (0, "x")
    assert asked == [0]  # what comes in order is not held


NEVER_ENDS = "timed out|host does not answer"
"""The second one after many time-outs of a host that never ends an answer."""
KINDS = {
    "good": "",
    "slow": "",
    "unnamed": "",
    "gzipped": "",
    "busy_once": "",
    "later": "",
    "chain/2": "",
    "nothing": "not found (404)",
    "gone": "HTTP 410",
    "busy": "HTTP 503",
    "much_later": "asked to wait",
    "silent": NEVER_ENDS,
    "slow_headers": NEVER_ENDS,
    "drip": NEVER_ENDS,
    "endless": f"{NEVER_ENDS}|too large",  # as fast as the machine is
    "huge": "too large",
    "bomb": "too large",
    "brotli": "answer not understood",
    "not_http": "answer not understood",
    "truncated": "cut off",
    "closed": "connection failed",
    "chain/9": "too many redirects",
    "circle/a": "redirects in a circle",
    "redirect?file:///etc/passwd": "address refused",
    "redirect?http://0x7f.1/": "address refused",
    "redirect?http://127.0.0.1:22/": "address refused",
    "html": "not a picture",
    "empty": "not a picture",
    "noise": "not a picture",
    "noai": "opted out",
    "reserved": "opted out",
}
"""What a row asks for -> its reason; samples have none."""
RARE = (
    "silent",
    "slow_headers",
    "drip",
    "endless",
    "much_later",
    "later",
    "busy",
    "busy_once",
    "bomb",
    "closed",
    "truncated",
)


def two_thousand(server: DownloadServer) -> tuple[list[str], list[str]]:
    """URLs, and the reason of each; rare kinds are 1 % of the rows each. Hosts that ask to wait have a row each."""
    common = [kind for kind in KINDS if kind not in RARE]
    urls, reasons = [], []
    for i in range(2_000):
        kind = RARE[i // 10 % len(RARE)] if i % 10 == 0 else common[i % len(common)]
        host = (
            f"127.0.{1 + list(KINDS).index(kind)}.{1 + (i // 10 % 200 if kind in ('later', 'much_later') else i % 5)}"
        )
        path = f"{kind}{i}" if kind == "circle/a" else kind if "?" in kind or "/" in kind else f"{kind}/{i}"
        path = f"{path}&{i}" if "?" in path else f"{path}?{i}"
        urls.append(server.url(path, host))
        reasons.append(KINDS[kind])
    return urls, reasons


@dataclass
class Peak:
    """The most memory of one process."""

    mib: float = 0.0


@contextmanager
def memory_of_children(parent: int) -> Iterator[Peak]:
    """Watch the peak of the resident memory of each child of a process, from a thread."""
    peak, done = Peak(), threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            for status in Path("/proc").glob("[0-9]*/status"):
                with suppress(OSError):  # it has ended
                    text = status.read_text()
                    if f"\nPPid:\t{parent}\n" in text and (found := re.search(r"VmHWM:\s+(\d+) kB", text)):
                        peak.mib = max(peak.mib, int(found[1]) / 1024)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


@pytest.mark.slow
def test_two_thousand_urls_each_end_as_they_should(tmp_path: Path, server: DownloadServer) -> None:
    urls, reasons = two_thousand(server)
    source = write_list(tmp_path / "in", urls)
    began = time.monotonic()
    process = started(command(source, tmp_path / "out", "--workers", "2", "--timeout", "8", "--retries", "2"))
    with memory_of_children(process.pid) as peak:
        _, said = process.communicate(timeout=200)
    took = time.monotonic() - began
    assert process.returncode == 0, said
    assert took < 150
    assert peak.mib < 1_200  # torch, which webdataset imports, is 600 of these

    found = {sample["source"]["row"] for sample in samples(tmp_path / "out")}
    rejected = {row: reason for _, row, reason, _ in rejects(tmp_path / "out")}
    wrong = [(urls[row], reason) for row, reason in rejected.items() if reason not in reasons[row].split("|")]
    assert wrong == []
    assert found == {i for i, reason in enumerate(reasons) if not reason}
    assert found | rejected.keys() == set(range(2_000))
    assert not found & rejected.keys()
    by_number = {sample["source"]["row"]: sample for sample in samples(tmp_path / "out")}
    keys = [sample["key"] for sample in samples(tmp_path / "out")]
    assert keys == sorted(keys)
    assert all(by_number[row]["source"]["url"] == urls[row] for row in found)
    assert not any("passwd" in path and "redirect" not in path for path in server.asked)
    assert {path.partition("?")[0].strip("/").split("/")[0] for path in server.asked} <= {
        kind.partition("?")[0].split("/")[0] for kind in KINDS
    } | {"nothing"}
    counts = Counter(reason for reason in rejected.values())
    assert sum(counts.values()) + len(found) == 2_000


@pytest.mark.slow
def test_after_kill_9_in_a_download_the_next_run_ends_with_the_same_bytes(
    tmp_path: Path, server: DownloadServer
) -> None:
    kinds = ("good", "nothing", "slow", "html")
    urls = [server.url(f"{kinds[i % 4]}/{i}", f"127.0.0.{i % 40 + 1}") for i in range(1_200)]
    source = write_list(tmp_path / "in", urls)
    options = ("--workers", "2", "--connections", "32")
    process = started(command(source, tmp_path / "out", *options))
    wait_until(lambda: server.asked.total() >= 700)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out" / "prepared.json").exists()
    for pid in children.stdout.split():  # the workers end by themselves
        wait_until(lambda pid=pid: not Path(f"/proc/{pid}").exists())
    for out in ("out", "undisturbed"):
        process = started(command(source, tmp_path / out, *options))
        _, said = process.communicate(timeout=200)
        assert process.returncode == 0, said
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    assert len(samples(tmp_path / "out")) == 600


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_ends_at_once_while_servers_are_silent(tmp_path: Path, server: DownloadServer, workers: int) -> None:
    source = write_list(tmp_path / "in", [server.url(f"silent/{i}") for i in range(700)])
    process = started(command(source, tmp_path / "out", "--workers", str(workers)))
    wait_until(lambda: server.asked.total() >= 4)
    began = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert time.monotonic() - began < 10  # the first silent row would end after 62 s
    assert process.returncode == 130
    assert said.splitlines()[-1].endswith("interrupted; run the same command again: it goes on")
    assert "Traceback" not in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".prepare"]
    assert list((tmp_path / "out" / ".prepare" / "parts").glob(".*")) == []
