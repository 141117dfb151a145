"""Which URLs and which IP addresses may be asked.

URLs are read as browsers read them (WHATWG URL Standard): spaces and other letters are encoded, names of hosts become
IDNA, fragments are dropped. Stricter than there: names and passwords, and odd spellings of IP addresses, are refused.
"""

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import quote, unquote, urljoin, urlsplit

from mlip_cli.data.download.failure import DownloadError
from mlip_cli.data.download.outcome import NOT_AN_ADDRESS, REFUSED

SCHEMES = ("http", "https")
WEB_PORTS = (80, 443)
FIRST_FREE_PORT = 1024
"""Ports below belong to other services, such as mail, but for WEB_PORTS. Those above are asked."""
LONGEST = 8_190
"""Characters of a URL that servers commonly take in one line."""
SAFE_IN_PATH = "%/:@!$&'()*+,;=~[]|^\\"
"""ASCII that is left as it is, beside letters, digits, `_`, `.` and `-` (URL Standard: path percent-encode set)."""
SAFE_IN_QUERY = "%/:@!$&()*+,;=~[]|^\\?`{}"
"""The same for the query (special-query percent-encode set)."""

NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        ("fec0::/10", "64:ff9b:1::/48", "2001:db8::/32", "3fff::/20", "5f00::/16", "100.64.0.0/10"),
    )
)
"""Not public, whatever the version of Python: IANA's registries of special addresses, 2024."""
NAT64 = ipaddress.ip_network("64:ff9b::/96")
COMPATIBLE = ipaddress.ip_network("::/96")

IP = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Address:
    """A URL that may be asked, encoded as it is sent."""

    url: str
    host: str
    """A name in ASCII, or an IP address without brackets."""


def read_address(text: str, *, base: str = "", allow_private: bool = False) -> Address:
    """Read the URL of a list, or the Location of a redirect from `base`.

    Raises:
        DownloadError: it is no URL of http or https, or may not be asked.
    """
    cleaned = re.sub(r"[\t\n\r]", "", text.strip("".join(map(chr, range(33)))))
    if len(cleaned) > LONGEST:
        raise DownloadError(NOT_AN_ADDRESS, f"{len(cleaned):,} characters, at most {LONGEST:,}")
    head, mark, tail = cleaned.partition("?")
    try:
        parts = urlsplit(urljoin(base, head.replace("\\", "/") + mark + tail))
        port = parts.port
    except ValueError as error:
        raise DownloadError(NOT_AN_ADDRESS, str(error)) from None
    if parts.scheme not in SCHEMES:
        raise DownloadError(REFUSED, f"{parts.scheme or 'no scheme'}: neither http nor https")
    if "@" in parts.netloc:
        raise DownloadError(REFUSED, "a name or password before @; none is sent")
    if port is not None and port not in WEB_PORTS and port < FIRST_FREE_PORT:
        raise DownloadError(REFUSED, f"port {port} is not one of the web")
    host = _read_host(parts.hostname or "", is_bracketed="[" in parts.netloc)
    ip = literal_ip(host)
    if ip is not None and not allow_private and (why := why_not_public(ip)):
        raise DownloadError(REFUSED, f"{ip} is {why}")
    shown = f"[{host}]" if ":" in host else host
    place = shown if port is None else f"{shown}:{port}"
    try:
        path = quote(parts.path or "/", safe=SAFE_IN_PATH, errors="surrogateescape")
        query = "?" + quote(parts.query, safe=SAFE_IN_QUERY, errors="surrogateescape") if parts.query else ""
    except UnicodeEncodeError:  # JSON can hold half of a pair of surrogates
        raise DownloadError(NOT_AN_ADDRESS, "a letter that is none: half of a pair of surrogates") from None
    return Address(f"{parts.scheme}://{place}{path}{query}", host)


def _read_host(text: str, *, is_bracketed: bool) -> str:
    """The name of a host in ASCII, or the usual spelling of its IP address."""
    if is_bracketed:
        try:
            return str(ipaddress.IPv6Address(text))  # a zone (%eth0) stays in it and is refused with its address
        except ValueError:
            raise DownloadError(NOT_AN_ADDRESS, f"[{text}] is no IPv6 address") from None
    name = unquote(text)
    if not name.isascii():
        import idna

        try:
            name = idna.encode(name, uts46=True).decode()
        except idna.IDNAError as error:
            raise DownloadError(NOT_AN_ADDRESS, f"name of the host: {error}") from None
    name = name.lower().removesuffix(".")
    if not name or len(name) > 253 or not all(re.fullmatch(r"[a-z0-9_-]{1,63}", label) for label in name.split(".")):
        raise DownloadError(NOT_AN_ADDRESS, "no name of a host in it" if not name else "no possible name of a host")
    if re.fullmatch(r"[0-9]+|0x[0-9a-f]*", name.rpartition(".")[2]):  # the URL Standard reads these as numbers
        try:
            return str(ipaddress.IPv4Address(name))
        except ValueError:
            raise DownloadError(REFUSED, f"{name}: an odd spelling of an IP address") from None
    return name


def literal_ip(host: str) -> IP | None:
    """The IP address that a host is given by, or None where it is a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def why_not_public(ip: IP) -> str:
    """Why an address is not one of the public internet, in words; empty where it is.

    An IPv6 address that carries an IPv4 address (mapped, compatible, 6to4, NAT64) is as public as that one.
    """
    for inner in _carried(ip):
        if why := why_not_public(inner):
            return f"{inner} in IPv6, {why}"
    for words, is_so in (
        ("unspecified", ip.is_unspecified),
        ("this machine", ip.is_loopback),
        ("link-local", ip.is_link_local),
        ("multicast", ip.is_multicast),
        ("private", not ip.is_global or ip.is_reserved or any(ip in network for network in NOT_PUBLIC)),
    ):
        if is_so and not (words == "private" and any(_carried(ip))):
            return words
    return "of one link" if isinstance(ip, ipaddress.IPv6Address) and ip.scope_id else ""


def _carried(ip: IP) -> list[ipaddress.IPv4Address]:
    """The IPv4 addresses in an IPv6 address."""
    if isinstance(ip, ipaddress.IPv4Address):
        return []
    found = [ip.ipv4_mapped, ip.sixtofour]
    if ip in NAT64 or (ip in COMPATIBLE and int(ip) > 1):
        found.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
    return [inner for inner in found if inner is not None]
