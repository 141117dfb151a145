"""Which URLs and which IP addresses are asked."""

import ipaddress
import subprocess
import sys

import pytest

from mlip_cli.data.download.addresses import read_address, why_not_public
from mlip_cli.data.download.failure import DownloadError
from mlip_cli.data.download.headers import opt_out, seconds_of
from mlip_cli.data.download.options import DownloadOptions, check_installed, is_address
from mlip_cli.errors import UsageError


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://a.example/x.jpg", "http://a.example/x.jpg"),
        ("  HTTPS://A.Example:443  ", "https://a.example:443/"),
        ("http://a.example/a b/ä%20.jpg?q=ü 1#top", "http://a.example/a%20b/%C3%A4%20.jpg?q=%C3%BC%201"),
        ("http://a.example/%2F%zz?a=%26", "http://a.example/%2F%zz?a=%26"),
        ("http://a.example/\"<>`{}|^[]'", "http://a.example/%22%3C%3E%60%7B%7D|^[]'"),
        ("http:\\\\a.example\\x.jpg", "http://a.example/x.jpg"),
        ("http://a.exam\nple/x\t.jpg", "http://a.example/x.jpg"),
        ("http://bücher.example/", "http://xn--bcher-kva.example/"),
        ("http://a_b.example./", "http://a_b.example/"),
        ("http://8.8.8.8:8080/", "http://8.8.8.8:8080/"),
        ("http://[2606:4700:0::1111]/", "http://[2606:4700::1111]/"),
        ("http://a.example/x\udcff", "http://a.example/x%FF"),
    ],
)
def test_urls_are_sent_as_browsers_send_them(text: str, url: str) -> None:
    assert read_address(text).url == url


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ftp://a.example/x", "address refused: ftp: neither http nor https"),
        ("file:///etc/passwd", "address refused: file: neither http nor https"),
        ("a.example/x", "address refused: no scheme: neither http nor https"),
        ("http://me:secret@a.example/", "address refused: a name or password before @; none is sent"),
        ("http://a.example:22/", "address refused: port 22 is not one of the web"),
        ("http://a.example:0/", "address refused: port 0 is not one of the web"),
        ("http://a.example:99999/", "not an address: Port out of range 0-65535"),
        ("http:///x.jpg", "not an address: no name of a host in it"),
        ("http://a..example/", "not an address: no possible name of a host"),
        (f"http://{'a' * 64}.example/", "not an address: no possible name of a host"),
        ("http://a.example/" + 9_000 * "a", "not an address: 9,017 characters, at most 8,190"),
        ("http://127.0.0.1/", "address refused: 127.0.0.1 is this machine"),
        ("http://127.1/", "address refused: 127.1: an odd spelling of an IP address"),
        ("http://2130706433/", "address refused: 2130706433: an odd spelling of an IP address"),
        ("http://0x7f.1/", "address refused: 0x7f.1: an odd spelling of an IP address"),
        ("http://0177.0.0.1/", "address refused: 0177.0.0.1: an odd spelling of an IP address"),
        ("http://127.0.0.1./", "address refused: 127.0.0.1 is this machine"),
        ("http://①27.0.0.1/", "address refused: 127.0.0.1 is this machine"),
        ("http://%31%32%37.0.0.1/", "address refused: 127.0.0.1 is this machine"),
        ("http://[::ffff:10.0.0.1]/", "address refused: ::ffff:a00:1 is 10.0.0.1 in IPv6, private"),
        ("http://[fe80::1%25eth0]/", "address refused: fe80::1%25eth0 is link-local"),
        ("http://[2606:4700::1%25eth0]/", "address refused: 2606:4700::1%25eth0 is of one link"),
    ],
)
def test_other_urls_are_refused_and_the_reason_says_why(text: str, said: str) -> None:
    with pytest.raises(DownloadError) as error:
        read_address(text)
    assert str(error.value) == said
    assert not error.value.is_retried


def test_odd_spellings_and_passwords_are_refused_on_private_networks_too() -> None:
    assert read_address("http://10.0.0.1:8000/x", allow_private=True).host == "10.0.0.1"
    for text in ("http://127.1/", "http://me@10.0.0.1/", "file:///etc/passwd"):
        with pytest.raises(DownloadError):
            read_address(text, allow_private=True)


NOT_PUBLIC = """0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.2.0/24 192.168.0.0/16
198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4 255.255.255.255/32
::/128 ::1/128 100::/64 2001::/32 2001:2::/48 2001:db8::/32 3fff::/20 5f00::/16 fc00::/7 fe80::/10 fec0::/10
ff00::/8 64:ff9b:1::/48 ::ffff:10.0.0.0/104 ::ffff:127.0.0.0/104 64:ff9b::7f00:0/104 2002:7f00::/24 2002:a00::/24
::127.0.0.0/104"""
"""IANA: Special-Purpose Address Registries; multicast of RFC 5771 and RFC 4291; site-local of RFC 3879."""
PUBLIC = """1.1.1.1 8.8.8.8 100.63.255.255 100.128.0.0 172.32.0.1 2606:4700::1111 2a00::1 ::ffff:8.8.8.8
64:ff9b::808:808 2002:808:808::1 169.253.0.1 223.255.255.255"""


@pytest.mark.parametrize("network", NOT_PUBLIC.split())
def test_no_address_of_these_networks_is_public(network: str) -> None:
    found = ipaddress.ip_network(network)
    for ip in (found[0], found[-1], found[found.num_addresses // 2]):
        assert why_not_public(ip), ip


@pytest.mark.parametrize("ip", PUBLIC.split())
def test_public_addresses_are_public(ip: str) -> None:
    assert why_not_public(ipaddress.ip_address(ip)) == ""


@pytest.mark.parametrize(
    ("tags", "reserved", "seen"),
    [
        ([], None, ""),
        (["noai"], None, "X-Robots-Tag: noai"),
        (["all", "NoArchive , NOIMAGEAI"], None, "X-Robots-Tag: NoArchive , NOIMAGEAI"),
        (["noindex"], None, "X-Robots-Tag: noindex"),
        (["noimageindex"], None, "X-Robots-Tag: noimageindex"),
        (["none"], None, "X-Robots-Tag: none"),
        (["nofollow, noarchive, noaiart"], None, ""),
        (["googlebot: noai, noindex"], None, ""),
        (["googlebot: nofollow", "noai"], None, "X-Robots-Tag: noai"),
        (["mlip-cli: noai"], None, "X-Robots-Tag: mlip-cli: noai"),
        (["*: noai"], None, "X-Robots-Tag: *: noai"),
        (["max-image-preview: large, noai"], None, "X-Robots-Tag: max-image-preview: large, noai"),
        (["unavailable_after: 25 Jun 2010 15:00:00 PST"], None, ""),
        ([], "1", "TDM-Reservation: 1"),
        ([], "0", ""),
    ],
)
def test_opt_outs(tags: list[str], reserved: str | None, seen: str) -> None:
    assert opt_out(tags, reserved, user_agent="mlip-cli/1.2") == seen


def test_retry_after_is_a_number_or_a_date() -> None:
    assert seconds_of("7") == 7
    assert seconds_of("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert 1e8 < (seconds_of("Wed, 21 Oct 2065 07:28:00 GMT") or 0) < 2e9
    assert [seconds_of(text) for text in (None, "", "-3", "soon", "1.5", "٣")] == [None] * 6


def test_connections_are_divided_among_processes() -> None:
    shared = DownloadOptions(connections=100, connections_per_host=8).shared_by(3)
    assert (shared.connections, shared.connections_per_host) == (33, 2)
    assert (shared.shared_by(50).connections, shared.shared_by(50).connections_per_host) == (1, 1)


def test_a_user_agent_is_one_line() -> None:
    with pytest.raises(UsageError, match=r"--user-agent 'a\\nb': not a line of ASCII; write a name such as mlip-cli/"):
        DownloadOptions(user_agent="a\nb")


def test_what_is_an_address() -> None:
    assert [is_address(text) for text in ("http://a", "HTTPS://a", "ftp://a", "http.jpg", "a/http://b")] == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_without_the_extra_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(UsageError) as error:
        check_installed()
    assert str(error.value) == (
        'pictures at addresses (https://...) are downloaded with aiohttp; pip install "mlip-cli[download]"'
    )


def test_options_and_help_import_no_client() -> None:
    code = (
        "import sys, mlip_cli.cli, mlip_cli.data.download.options as options, mlip_cli.data.sources.tables\n"
        "print(sorted({'aiohttp', 'yarl', 'PIL', 'numpy', 'asyncio'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
