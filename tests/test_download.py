"""Downloads from a server of this machine: the right outcome of each answer, in bounded time and memory.

127.0.0.1 and its neighbours stand for hosts of their own.
"""

import ipaddress
import shutil
import socket
import subprocess
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from download_server_for_tests import ANSWERS, BOMB, DownloadServer, jpeg

from mlip_cli.data.download import addresses, body, fetch, hosts, names
from mlip_cli.data.download.addresses import IP
from mlip_cli.data.download.downloader import Downloader
from mlip_cli.data.download.failure import DownloadError
from mlip_cli.data.download.names import LookUp, look_up
from mlip_cli.data.download.options import DownloadOptions

OPTIONS = DownloadOptions(timeout_s=1.0, allow_private=True, max_bytes=4 << 20)


@pytest.fixture(autouse=True)
def _soon_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "FIRST_DELAY_S", 0.05)


def outcome(answer: bytes | DownloadError) -> str:
    """A reject in words; `picture` for bytes."""
    return str(answer) if isinstance(answer, DownloadError) else "picture"


async def held(downloader: Downloader) -> int:
    """Bytes in hand, when all that was given back before is counted."""
    return downloader._fetcher.budget.held


def downloads(
    urls: list[str], options: DownloadOptions = OPTIONS, *, lookup: LookUp = look_up
) -> list[bytes | DownloadError]:
    """What comes of the URLs, in their order."""
    with Downloader(options, lookup=lookup) as downloader:
        found = dict(downloader.answers(list(enumerate(urls))))
        assert downloader._run(held(downloader)).result() == 0
    return [found[i] for i in range(len(urls))]


OUTCOMES = {
    "good/7": "picture",
    "unnamed/7": "picture",  # text/plain: the content decides
    "slow/7": "picture",
    "gzipped/7": "picture",
    "members/7": "picture",
    "others_noai/7": "picture",
    "chain/5": "picture",
    "busy_once/7": "picture",
    "later/7": "picture",
    "later_by_date/7": "picture",
    "noise/7": "picture",  # the decoder says what is wrong with it, and with the next two
    "html/7": "picture",
    "empty/7": "picture",
    "nothing/7": "not found (404): status 404",
    "gone/7": "HTTP 410: status 410",
    "busy/7": "HTTP 503: status 503",
    "much_later/7": "asked to wait: status 503, Retry-After: 3600",
    "silent/7": "timed out: not whole within 1 s",
    "slow_headers/7": "timed out: not whole within 1 s",
    "drip/7": "timed out: not whole within 1 s",
    "endless/7": "too large: more came, at most 4,194,304 bytes are taken",
    "huge/7": "too large: Content-Length: 1,000,000,000,000, at most 4,194,304 bytes are taken",
    "bomb/7": f"too large: {len(BOMB):,} bytes hold more, at most 4,194,304 bytes are taken",
    "brotli/7": "answer not understood: Content-Encoding: br, and none was asked for",
    "truncated/7": "cut off: the connection ended before the answer did",
    "closed/7": "connection failed: Server disconnected",
    "chain/6": "too many redirects: more than 5, the last to http://HOST/chain/0",
    "circle/a": "redirects in a circle: http://HOST/circle/b -> http://HOST/circle/a",
    "redirect?file:///etc/passwd": ("address refused: redirect to file:///etc/passwd: file: neither http nor https"),
    "redirect?http://127.1/good/7": (
        "address refused: redirect to http://127.1/good/7: 127.1: an odd spelling of an IP address"
    ),
    "redirect?http://../": "not an address: redirect to http://../: no possible name of a host",
    "noai/7": "opted out: X-Robots-Tag: noarchive, noai",
    "reserved/7": "opted out: TDM-Reservation: 1",
    "not_http/7": "answer not understood: Bad status line:",
}


def test_each_answer_has_its_outcome(server: DownloadServer) -> None:
    assert {path.partition("/")[0].partition("?")[0] for path in OUTCOMES} == {*ANSWERS, "nothing"}
    started = time.monotonic()
    hosts_of = {path: f"127.0.1.{number}" for number, path in enumerate(OUTCOMES, start=1)}
    found = downloads([server.url(path, host) for path, host in hosts_of.items()])
    for (path, host), answer in zip(hosts_of.items(), found, strict=True):
        assert outcome(answer) == OUTCOMES[path].replace("HOST", f"{host}:{server.port}"), path
        if path.startswith(("good", "unnamed", "gzipped", "busy_once", "later")):
            assert answer == jpeg(7)
    assert time.monotonic() - started < 20
    tries = {path: server.asked[f"/{path}"] for path in OUTCOMES}
    assert {path for path, n in tries.items() if n == 3} >= {"busy/7", "silent/7", "drip/7", "truncated/7"}
    once = {path for path, n in tries.items() if n == 1}
    assert once >= {"nothing/7", "gone/7", "much_later/7", "endless/7", "huge/7", "bomb/7", "html/7", "noai/7"}


def test_ignore_opt_out_takes_what_owners_keep_out(server: DownloadServer) -> None:
    urls = [server.url("noai/1"), server.url("reserved/2")]
    options = DownloadOptions(allow_private=True, ignore_opt_out=True)
    assert downloads(urls, options) == [jpeg(1), jpeg(2)]


def test_requests_say_who_asks_and_keep_no_cookies(server: DownloadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    for path in ("good/1", "good/2"):
        assert outcome(*downloads([server.url(path)])) == "picture"
    headers = server.headers["/good/2"]
    assert headers["user-agent"] == OPTIONS.user_agent
    assert headers["accept-encoding"] == "identity"
    assert "cookie" not in headers
    with Downloader(DownloadOptions(allow_private=True, user_agent="me/1")) as downloader:
        for path in ("good/3", "good/4"):
            assert [outcome(answer) for _, answer in downloader.answers([(0, server.url(path))])] == ["picture"]
    assert "cookie" not in server.headers["/good/4"]
    assert server.headers["/good/4"]["user-agent"] == "me/1"


def test_all_members_of_gzip_are_read(server: DownloadServer) -> None:
    assert downloads([server.url("members/7")]) == [jpeg(7)]


def test_half_a_pair_of_surrogates_is_no_address(server: DownloadServer) -> None:
    for path in ("good/\ud800", "good/1?\ud83d"):
        [answer] = downloads([server.url(path)])
        assert outcome(answer) == "not an address: a letter that is none: half of a pair of surrogates"


def test_nothing_private_is_asked(server: DownloadServer) -> None:
    places = ["127.0.0.1", "localhost", "a.example", "b.example"]
    ips = {"localhost": ["127.0.0.1"], "a.example": ["8.8.8.8", "127.0.0.1"], "b.example": ["::ffff:127.0.0.1"]}
    found = downloads([server.url("good/1", place) for place in places], DownloadOptions(), lookup=ips.__getitem__)
    assert [outcome(answer) for answer in found] == [
        "address refused: 127.0.0.1 is this machine",
        "address refused: localhost is 127.0.0.1: this machine",
        "address refused: a.example is 127.0.0.1: this machine",
        "address refused: b.example is ::ffff:127.0.0.1: 127.0.0.1 in IPv6, this machine",
    ]
    assert not server.asked
    assert not server.dialled


@pytest.fixture
def public_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """127.0.0.1 is public; its neighbours are not."""
    real = addresses.why_not_public

    def without_first(ip: IP) -> str:
        return "" if ip == ipaddress.ip_address("127.0.0.1") else real(ip)

    monkeypatch.setattr(addresses, "why_not_public", without_first)
    monkeypatch.setattr(names, "why_not_public", without_first)


@pytest.mark.usefixtures("public_first")
def test_redirects_are_checked_again(server: DownloadServer) -> None:
    ips = {"public.example": ["127.0.0.1"], "inside.example": ["127.0.0.2"]}
    targets = ["127.0.0.2", "inside.example", "public.example"]
    urls = [server.url(f"redirect?{server.url('good/1', target)}", "public.example") for target in targets]
    found = downloads(urls, DownloadOptions(), lookup=ips.__getitem__)
    assert [outcome(answer) for answer in found] == [
        f"address refused: redirect to {server.url('good/1', '127.0.0.2')}: 127.0.0.2 is this machine",
        "address refused: inside.example is 127.0.0.2: this machine",
        "picture",
    ]
    assert server.dialled == {"127.0.0.1"}


@pytest.mark.usefixtures("public_first")
def test_the_address_that_is_dialled_is_the_one_that_was_checked(
    server: DownloadServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name server that gives a public address first and a private one then reaches nothing by the second."""
    given: list[str] = []

    def rebinding(name: str) -> list[str]:
        given.append("127.0.0.1" if not given else "127.0.0.2")
        return [given[-1]]

    asked: list[str] = []
    real = socket.getaddrinfo

    def noted(host: str, *arguments: object, **options: object) -> object:
        asked.append(host)
        return real(host, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", noted)
    with Downloader(DownloadOptions(), lookup=rebinding) as downloader:
        for _ in range(3):
            answers = dict(downloader.answers([(i, server.url(f"good/{i}", "r.example")) for i in range(9)]))
            assert {outcome(answer) for answer in answers.values()} == {"picture"}
        assert given == ["127.0.0.1"]
        monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + 2 * names.KNOWN_S)
        time_of_idle = fetch.IDLE_S
        assert time_of_idle < names.KNOWN_S
        closed = server.url("closed/1", "r.example")  # ends the open connections
        dict(downloader.answers([(i, closed) for i in range(9)]))
        [(_, answer)] = downloader.answers([(0, server.url("good/1", "r.example"))])
    assert outcome(answer) == "address refused: r.example is 127.0.0.2: this machine"
    assert given == ["127.0.0.1", "127.0.0.2"]
    assert server.dialled == {"127.0.0.1"}
    assert "r.example" not in asked


def test_names_that_are_not_there(server: DownloadServer) -> None:
    def lookup(name: str) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME if name == "gone.example" else socket.EAI_AGAIN, "try again")

    found = downloads(["http://gone.example/", "http://dark.example/"], lookup=lookup)
    assert [outcome(answer) for answer in found] == [
        "no such host: gone.example",
        "no answer from DNS: dark.example: try again",
    ]


def test_a_lookup_that_hangs_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    def lookup(name: str) -> list[str]:
        time.sleep(3)
        return []

    started = time.monotonic()
    options = DownloadOptions(timeout_s=0.2, retries=1)
    assert outcome(*downloads(["http://a.example/"], options, lookup=lookup)) == "timed out: no connection within 0.1 s"
    assert time.monotonic() - started < 2


def test_a_host_of_a_thousand_addresses_that_never_answers_tls_ends_at_the_deadline() -> None:
    with socket.create_server(("0.0.0.0", 0), backlog=4096) as silent:
        port = silent.getsockname()[1]
        started = time.monotonic()
        options = DownloadOptions(timeout_s=0.6, retries=0, allow_private=True)
        found = downloads(
            [f"https://many.example:{port}/{i}" for i in range(4)],
            options,
            lookup=lambda name: [f"127.1.{i // 200}.{i % 200 + 1}" for i in range(1_000)],
        )
        assert [outcome(answer) for answer in found] == ["timed out: no connection within 0.3 s"] * 4
        assert time.monotonic() - started < 10


def test_a_host_that_refuses_connections_is_left_alone(server: DownloadServer) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = free.getsockname()[1]
    found = downloads([f"http://127.0.0.1:{closed}/{i}" for i in range(40)], DownloadOptions(allow_private=True))
    reasons = [answer.reason for answer in found if isinstance(answer, DownloadError)]
    assert len(reasons) == 40
    assert set(reasons) == {"connection failed", "host does not answer"} or set(reasons) == {"host does not answer"}
    silent = next(answer for answer in found if isinstance(answer, DownloadError) and "host" in answer.reason)
    assert "connections failed before, the last: " in silent.detail
    assert hosts.MOST_FAILURES < 40


@pytest.mark.parametrize("kind", ["silent", "drip"])
def test_a_host_whose_answers_never_end_is_left_alone(server: DownloadServer, kind: str) -> None:
    urls = [server.url(f"{kind}/{i}") for i in range(120)]
    options = DownloadOptions(timeout_s=0.3, retries=0, allow_private=True)
    found = downloads(urls, options)
    reasons = Counter(answer.reason for answer in found if isinstance(answer, DownloadError))
    assert reasons.keys() == {"timed out", "host does not answer"}
    most = hosts.MOST_TIMEOUTS + options.connections_per_host
    assert hosts.MOST_TIMEOUTS <= reasons["timed out"] == server.asked.total() <= most
    assert "answers before timed out, the last: not whole within 0.3 s" in str(found[-1])


def test_slow_answers_between_whole_ones_close_no_host(server: DownloadServer) -> None:
    urls = [server.url(f"{'silent' if i % 4 else 'good'}/{i}") for i in range(64)]
    options = DownloadOptions(timeout_s=0.3, retries=0, allow_private=True)
    found = downloads(urls, options)
    assert [outcome(answer) for answer in found] == [
        "timed out: not whole within 0.3 s" if i % 4 else "picture" for i in range(64)
    ]


def test_a_host_gets_few_connections_at_a_time(server: DownloadServer) -> None:
    urls = [server.url(f"slow/{i}", f"127.0.2.{i % 4 + 1}") for i in range(32)]
    options = DownloadOptions(allow_private=True, connections=64, connections_per_host=3)
    assert {outcome(answer) for answer in downloads(urls, options)} == {"picture"}
    assert dict(server.most_open) == {"all": 12, **{f"127.0.2.{i}": 3 for i in range(1, 5)}}
    server.most_open.clear()
    assert {outcome(answer) for answer in downloads(urls, replace(options, connections=5))} == {"picture"}
    assert server.most_open["all"] == 5


def test_a_host_that_asks_to_wait_is_left_alone_meanwhile(server: DownloadServer) -> None:
    options = DownloadOptions(allow_private=True, connections_per_host=2)
    urls = [server.url("later/0"), *(server.url(f"good/{i}") for i in range(20))]
    assert {outcome(answer) for answer in downloads(urls, options)} == {"picture"}
    times = [when for when, _ in server.when]
    longest = max(after - before for before, after in pairwise(times))
    assert longest > 0.9
    before = next(i for i, (a, b) in enumerate(pairwise(times)) if b - a == longest)
    assert before <= 2  # those that were under way when it asked


def test_a_host_that_always_asks_to_wait_does_not_hold_its_rows_for_ever(
    server: DownloadServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def always(asked: object) -> None:
        await asked.send(429, Retry_After="1")  # type: ignore[attr-defined]

    monkeypatch.setitem(ANSWERS, "always", always)
    started = time.monotonic()
    found = downloads([server.url(f"always/{i}") for i in range(100)])
    assert {answer.reason for answer in found if isinstance(answer, DownloadError)} == {"asked to wait"}
    assert time.monotonic() - started < 10
    assert server.asked.total() < 50


def test_bytes_in_hand_are_bounded(server: DownloadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    size, limit = 1 << 20, 3 << 20
    most = 0
    take = body.Budget.take

    def noted(budget: body.Budget, num_bytes: int) -> None:
        nonlocal most
        take(budget, num_bytes)
        most = max(most, budget.held)

    async def big(asked: object) -> None:
        await asked.send(200, bytes(size))  # type: ignore[attr-defined]

    monkeypatch.setattr(body.Budget, "take", noted)
    monkeypatch.setitem(ANSWERS, "big", big)
    options = DownloadOptions(allow_private=True, connections_per_host=16, max_bytes=size, max_held_bytes=limit)
    urls = [(i, server.url(f"big/{i}")) for i in range(40)]
    with Downloader(options) as downloader:
        for count, (_, answer) in enumerate(downloader.answers(urls)):
            assert answer == bytes(size)
            if count < 10:
                time.sleep(0.05)  # slower than the server
    assert limit / 2 < most < limit + size + 16 * (1 << 18)


def test_rejects_hold_no_bytes(server: DownloadServer) -> None:
    [answer] = downloads([server.url("endless/1")])
    assert isinstance(answer, DownloadError)
    assert (answer.__traceback__, answer.__context__, answer.__cause__) == (None, None, None)


def test_many_unfinished_answers_do_not_wait_for_each_other(server: DownloadServer) -> None:
    """All 16 stand at the limit with nothing to give back; one after another ends, and the server's 1 s holds on."""
    options = DownloadOptions(allow_private=True, connections_per_host=16, max_held_bytes=1, timeout_s=5)
    found = downloads([server.url(f"good/{i}") for i in range(50)], options)
    assert found == [jpeg(i) for i in range(50)]


def test_leaving_early_ends_what_is_under_way(server: DownloadServer) -> None:
    started = time.monotonic()
    with Downloader(DownloadOptions(allow_private=True)) as downloader:
        answers = downloader.answers([(0, server.url("good/1")), (1, server.url("silent/1"))])
        assert next(answers)[0] == 0
        answers.close()
    assert time.monotonic() - started < 3


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_a_certificate_of_nobody_is_refused(tmp_path: Path) -> None:
    pem = tmp_path / "own.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -keyout k -out c && cat k c > own.pem"
    )
    subprocess.run(command, shell=True, cwd=tmp_path, check=True, capture_output=True)  # noqa: S602
    with DownloadServer(certificate=pem) as server:
        [answer] = downloads([server.url("good/1")])
        assert isinstance(answer, DownloadError)
        assert answer.reason == "certificate not valid"
        assert "self-signed" in answer.detail
        assert not server.asked
