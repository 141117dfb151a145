"""A strict reader of tar files: it checks the checksum of every header and skips nothing in silence.

It understands ustar, PAX headers and GNU long names. Names are data: no name ever becomes a path on this machine.
Training, mlip prepare-data and evaluation all read headers through `walk`, so a member means the same to all of them.
The format: POSIX.1-2017 `pax` (ustar interchange format) and GNU tar's manual, "Basic Tar Format".
"""

import os
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, NamedTuple, cast

from mlip_cli.errors import RunError, UsageError

BLOCK = 512
MAX_EXTENSION_BYTES = 1 << 20
REGULAR = (b"0", b"\0", b"7")
NO_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
"""Links, devices, folders, pipes: no bytes follow, whatever size the header states."""
EXTENSIONS = (b"x", b"g", b"L", b"K")
ZEROS = bytes(BLOCK)
ADLER_MODULUS = 65_521
"""adler32 sums bytes modulo this number, ten times as fast as sum(); a header's checksum is compared modulo it too."""

COMPRESSIONS = {
    b"\x1f\x8b": ("gzip", "gzip"),
    b"BZh": ("bz2", "bzip2"),
    b"\xfd7zXZ\0": ("lzma", "xz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd"),
}
"""First bytes of a compressed file -> its format, by the name of Python's module where there is one, and its tool."""
NO_END = 1 << 62
"""Length of a tar that nobody knows before it is decompressed."""

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


class OpenTar(NamedTuple):
    """A tar that is open for reading; behind its end there are no bytes."""

    path: Path
    read: Read
    length: int
    is_compressed: bool


def compression_of(path: Path) -> tuple[str, str] | None:
    """The format of a compressed file and the tool that unpacks it, by its first bytes; None for other files."""
    with open(path, "rb") as file:
        head = file.read(6)
    return next((names for magic, names in COMPRESSIONS.items() if head.startswith(magic)), None)


def check_not_compressed(tar: Path, purpose: str) -> None:
    """See that a tar can be read in any order.

    Raises:
        UsageError: it is compressed.
    """
    if compression := compression_of(tar):
        _, tool = compression
        raise UsageError(f"{tar}: is {tool}, and {purpose} needs random access; {_unpack(tar, tool)}")


def _unpack(tar: Path, tool: str) -> str:
    return f"unpack it: {tool} -dc < {tar} > UNPACKED.tar"


@contextmanager
def open_tar(path: Path) -> Iterator[OpenTar]:
    """Open a tar. A compressed one is best read in order: to go back, it is decompressed from its start again.

    Raises:
        UsageError: it is zstd.
        DamagedTarError: (in the block) the compressed data are damaged.
    """
    compression = compression_of(path)
    if compression is None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield OpenTar(path, partial(os.pread, descriptor), os.fstat(descriptor).st_size, False)
        finally:
            os.close(descriptor)
        return
    format, tool = compression
    if format == "zstd":
        raise UsageError(f"{path}: is zstd, which is not read; {_unpack(path, tool)}")
    with closing(_decompressed(path, format)) as file:
        yield OpenTar(path, partial(_read_in_order, path, format, file), NO_END, True)


def read_decompressed(path: str, size: int, at: int) -> bytes:
    """Bytes of what a compressed file holds. Each process keeps the last file open, so that reading on is fast.

    Raises:
        DamagedTarError: the compressed data are damaged.
    """
    file, format = _kept_open(path)
    return _read_in_order(Path(path), format, file, size, at)


@lru_cache(maxsize=1)
def _kept_open(path: str) -> tuple[IO[bytes], str]:
    format, _ = cast(tuple[str, str], compression_of(Path(path)))
    return _decompressed(Path(path), format), format


def _decompressed(path: Path, format: str) -> IO[bytes]:
    from importlib import import_module

    return cast(IO[bytes], import_module(format).open(path))


def _read_in_order(path: Path, format: str, file: IO[bytes], size: int, at: int) -> bytes:
    errors: list[type[Exception]] = [EOFError, OSError, zlib.error]
    if format == "lzma":
        from lzma import LZMAError

        errors.append(LZMAError)
    try:
        file.seek(at)
        return file.read(size)
    except tuple(errors) as error:
        raise DamagedTarError(f"{path}: damaged {format}: {error} (at byte {at} of the tar in it)") from error


def read_members(path: Path) -> Iterator[Member]:
    """The members of a tar, in order.

    Raises:
        UsageError: it is compressed by zstd.
        DamagedTarError: a header's checksum is wrong, the file ends inside a member or without the end-of-archive
            block, or something follows that block.
    """
    with open_tar(path) as tar:
        try:
            end = yield from walk(tar.read, length=tar.length)
            _check_end(tar.read, end, tar.length)
        except HeaderError as error:
            raise DamagedTarError(f"{path}: {error}") from None


def members_before_damage(path: Path) -> tuple[list[Member], str | None]:
    """The members of a tar up to its end or its damage, and where and how it is damaged.

    The bytes of the last member may be lost. A compressed tar gives no members unless only its end is missing: its
    checksums lie behind the content, so nothing tells where bytes begin to be wrong.

    Raises:
        UsageError: it is compressed by zstd.
    """
    members: list[Member] = []
    try:
        members.extend(read_members(path))
    except DamagedTarError as error:
        return members if _is_whole_or_cut(path) else [], str(error)
    return members, None


def _is_whole_or_cut(path: Path) -> bool:
    """Whether a file can be decompressed up to its last byte; true of every file that is not compressed."""
    with open_tar(path) as tar:
        at = 0
        try:
            while tar.is_compressed and (block := tar.read(1 << 20, at)):
                at += len(block)
        except DamagedTarError as error:
            return isinstance(error.__cause__, EOFError)
    return True


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


def _member(name: str, kind: bytes, size: int, *, at: int, first: int) -> Member:
    return Member(name, first, at + BLOCK, size, kind in REGULAR and not name.endswith("/"))


def _checked_header(header: bytes, at: int) -> tuple[bytes, int]:
    """Kind and size of the member whose header lies at `at`, once the header's checksum is found to be right."""
    if len(header) < BLOCK:
        raise HeaderError(f"no tar header at byte {at}")
    field = header[148:156]  # counts as spaces in the sum
    found = (zlib.adler32(header) & 0xFFFF) - 1 - sum(field) + 8 * ord(" ")
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
