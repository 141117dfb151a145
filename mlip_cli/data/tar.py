"""A strict reader of tar files: it checks the checksum of every header and skips nothing in silence.

It understands ustar, PAX headers and GNU long names. Names are data: no name ever becomes a path on this machine.
Training, mlip prepare-data and evaluation all read headers through `walk`, so a member means the same to all of them.
The format: POSIX.1-2017 `pax` (ustar interchange format) and GNU tar's manual, "Basic Tar Format".
"""

import os
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple
from zlib import adler32

from mlip_cli.errors import RunError

BLOCK = 512
MAX_EXTENSION_BYTES = 1 << 20
REGULAR = (b"0", b"\0", b"7")
NO_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
"""Links, devices, folders, pipes: no bytes follow, whatever size the header states."""
EXTENSIONS = (b"x", b"g", b"L", b"K")
ZEROS = bytes(BLOCK)
ADLER_MODULUS = 65_521
"""adler32 sums bytes modulo this number, ten times as fast as sum(); a header's checksum is compared modulo it too."""

Read = Callable[[int, int], bytes]
"""(size, at) -> the bytes of the tar from byte `at` on; fewer than `size` at its end."""


class DamagedTarError(RunError):
    """The tar is not whole: `path: what is wrong at which byte`."""


class HeaderError(ValueError):
    """The tar is damaged. The message says where and how, but not in which file."""


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    header_offset: int
    """Of its first header: PAX and long-name headers count."""
    offset: int
    """Of its bytes."""
    size: int
    is_file: bool
    """False for links, folders, devices and sparse files: their bytes must not be read."""


def padded(size: int) -> int:
    """Bytes that `size` bytes take up in a tar."""
    return (size + BLOCK - 1) // BLOCK * BLOCK


def read_members(path: Path) -> Iterator[Member]:
    """The members of a tar, in order.

    Raises:
        DamagedTarError: a header's checksum is wrong, the file ends inside a member or without the end-of-archive
            block, or something follows that block.
    """
    with open(path, "rb") as file:
        read, length = partial(os.pread, file.fileno()), os.fstat(file.fileno()).st_size
        try:
            end = yield from walk(read, length=length)
            _check_end(read, end, length)
        except HeaderError as error:
            raise DamagedTarError(f"{path}: {error}") from None


def walk(read: Read, *, length: int, start: int = 0) -> Generator[Member, None, int]:
    """The members from byte `start` on, where a header begins, in a tar of `length` bytes.

    Returns:
        The byte at which the headers end: where a block of zeros begins, or too few bytes for a header are left.

    Raises:
        HeaderError: a header is damaged, or states more bytes than there are.
    """
    at = first = start
    stated: dict[str, str] = {}
    while at + BLOCK <= length and (header := read(BLOCK, at)) != ZEROS:
        kind, size = _checked_header(header, at)
        if kind not in EXTENSIONS and kind not in NO_DATA and "size" in stated:
            size = int(stated["size"])
        if at + BLOCK + size > length:
            there = length - at - BLOCK
            raise HeaderError(f"cut at byte {length}: the member at byte {at} needs {size} bytes, {there} are there")
        if kind in EXTENSIONS:
            stated |= _extension(read, kind, size, at)
            at += BLOCK + padded(size)
            continue
        yield _member(stated.get("path") or _name(header), kind, size, at=at, first=first)
        stated = {}
        at = first = at + BLOCK + padded(size)
    return at


def member_at(read: Read, at: int) -> Member:
    """The member whose only header lies at byte `at`: none of PAX or long names precedes it.

    Raises:
        HeaderError: no header lies there, or a damaged one.
    """
    header = read(BLOCK, at)
    kind, size = _checked_header(header, at)
    return _member(_name(header), kind, size, at=at, first=at)


def _member(name: str, kind: bytes, size: int, *, at: int, first: int) -> Member:
    return Member(name, first, at + BLOCK, size, kind in REGULAR and not name.endswith("/"))


def _checked_header(header: bytes, at: int) -> tuple[bytes, int]:
    """Kind and size of the member whose header lies at `at`, once the header's checksum is found to be right."""
    if len(header) < BLOCK:
        raise HeaderError(f"no tar header at byte {at}")
    field = header[148:156]  # counts as spaces in the sum
    found = (adler32(header) & 0xFFFF) - 1 - sum(field) + 8 * ord(" ")
    if (found - _number(field, at)) % ADLER_MODULUS:
        raise HeaderError(f"no tar header at byte {at}: its checksum is wrong")
    kind = header[156:157]
    return kind, 0 if kind in NO_DATA else _number(header[124:136], at)


def _check_end(read: Read, end: int, length: int) -> None:
    """See that only zeros follow the headers, a block of them at least."""
    if end + BLOCK > length:
        raise HeaderError(f"cut at byte {length}: no end-of-archive block")
    at = end
    while block := read(1 << 20, at):
        if block.strip(b"\0"):
            raise HeaderError(f"more data after the end-of-archive block at byte {end}")
        at += len(block)


def _extension(read: Read, kind: bytes, size: int, at: int) -> dict[str, str]:
    """What a PAX header (x) or a GNU long name (L) states about the next member; global headers (g) are ignored."""
    if size > MAX_EXTENSION_BYTES:
        raise HeaderError(f"an extension header of {size} bytes at byte {at}")
    content = read(size, at + BLOCK)
    if kind == b"L":
        return {"path": content.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    return _pax(content, at) if kind == b"x" else {}


def _number(digits: bytes, at: int) -> int:
    """A number in octal, or in base 256 when its first bit is set."""
    if digits[0] & 0x80:
        return int.from_bytes(bytes([digits[0] & 0x7F]) + digits[1:])
    octal = digits.strip(b" \0") or b"0"
    if octal.strip(b"01234567"):  # int() would take signs and underscores too
        raise HeaderError(f"no tar header at byte {at}: {digits!r} is not a number")
    return int(octal, 8)


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _pax(content: bytes, at: int) -> dict[str, str]:
    """Records `LENGTH KEY=VALUE\\n` of a PAX header."""
    fields = {}
    while content:
        digits = content.split(b" ", 1)[0]
        length = int(digits) if digits.isdigit() else 0
        record = content[len(digits) + 1 : length]
        key, equals, value = record.partition(b"=")
        if not (equals and value.endswith(b"\n") and length <= len(content)):
            raise HeaderError(f"damaged PAX header at byte {at}")
        fields[key.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "surrogateescape")
        content = content[length:]
    if not fields.get("size", "0").isdecimal():
        raise HeaderError(f"damaged PAX header at byte {at}")
    return fields
