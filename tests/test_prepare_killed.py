"""kill -9 at random moments of a download and of shares of the parts: the same bytes in the end, nobody left at work.

tests/benchmarks/bench_prepare_kills.py kills thirty times each.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from download_server_for_tests import DownloadServer
from forks_for_tests import FORKS
from prepare_kills_for_tests import Kill, killed_again_and_again, prepared_whole
from sources_for_tests import write_files, write_sidecars

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
KINDS = ("good", "nothing", "slow", "html", "good", "unnamed")
LOCAL = ("in", "out", "--holdout", "0.3", "--workers", "2")
REMOTE = ("list.tsv", *LOCAL[1:], "--image-column", "url", "--caption-column", "caption", "--allow-private")


@contextmanager
def served() -> Iterator[int]:
    """The port of a server in a process of its own, since a process of many threads is not forked."""
    ours, theirs = FORKS.Pipe()
    process = FORKS.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    yield ours.recv()
    ours.close()
    process.join()


def serve(pipe: Connection) -> None:
    """Answer until the other end is closed."""
    with DownloadServer() as server:
        pipe.send(server.port)
        with suppress(EOFError):
            pipe.recv()


def killed_downloads(folder: Path, *, kills: int, seed: int) -> list[Kill]:
    """A list of 240 rows, killed in the middle of its downloads."""
    with served() as port:
        urls = [f"http://127.0.0.{i % 7 + 1}:{port}/{KINDS[i % len(KINDS)]}/{i}" for i in range(240)]
        rows = "".join(f"{url}\ta picture of thing {i}\n" for i, url in enumerate(urls))
        write_files(folder, {"list.tsv": f"url\tcaption\n{rows}"})
        most_s = prepared_whole(folder, REMOTE)
        return killed_again_and_again(folder, [REMOTE], kills=kills, seed=seed, most_s=most_s)


def killed_shares(folder: Path, *, kills: int, seed: int) -> list[Kill]:
    """Both halves of 240 pictures, and what finishes them."""
    write_sidecars(folder / "in", 240)
    (folder / "in" / "00009.png").write_bytes(b"broken")
    most_s = prepared_whole(folder, LOCAL)
    commands = [[*LOCAL, "--part", "1/2"], [*LOCAL, "--part", "2/2"], [*LOCAL, "--finish"]]
    return killed_again_and_again(folder, commands, kills=kills, seed=seed, most_s=most_s)


def test_a_download_that_is_killed_again_and_again_ends_with_the_same_bytes(tmp_path: Path) -> None:
    assert len(killed_downloads(tmp_path, kills=5, seed=7)) == 5


def test_shares_that_are_killed_again_and_again_end_with_the_same_bytes(tmp_path: Path) -> None:
    assert len(killed_shares(tmp_path, kills=5, seed=8)) == 5
