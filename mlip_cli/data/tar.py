"""A strict reader of tar files: every header's checksum is checked, nothing is skipped without a word.

Understands ustar, PAX headers and GNU long names. Names are data: none ever becomes a path on this machine.
The format: POSIX.1-2017 `pax` (ustar interchange format) and GNU tar's manual, "Basic Tar Format".
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mlip_cli.errors import RunError

BLOCK = 512
MAX_EXTENSION_BYTES = 1 << 20
REGULAR = (b"0", b"\0", b"7")
NO_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
"""Links, devices, folders, pipes: whatever size they state, nothing follows."""
EXTENSIONS = (b"x", b"g", b"L", b"K")
ZEROS = bytes(BLOCK)


class DamagedTarError(RunError):
    """Not a whole tar: `path: what is wrong at which byte`."""


@dataclass(frozen=True)
class Member:
    """A file in a tar."""

    name: str
    header_offset: int
    """Of its first header, PAX and long-name headers included."""
    offset: int
    """Of its bytes."""
    size: int
    is_file: bool
    """False for links, folders, devices and sparse files, whose bytes nobody should read."""


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
        length = os.fstat(file.fileno()).st_size
        at = start = 0
        extension: dict[str, str] = {}
        while (header := _header_at(path, file, at, length)) is not None:
            kind = header[156:157]
            size = 0 if kind in NO_DATA else _number(path, header[124:136], at)
            if kind not in EXTENSIONS and "size" in extension:
                size = int(extension["size"])
            if at + BLOCK + size > length:
                there = f"the member at byte {at} needs {size} bytes, {length - at - BLOCK} are there"
                raise DamagedTarError(f"{path}: cut at byte {length}: {there}")
            if kind in EXTENSIONS:
                extension |= _extension(path, file, kind, size, at)
            else:
                name = extension.get("path") or _name(header)
                yield Member(name, start, at + BLOCK, size, kind in REGULAR and not name.endswith("/"))
                extension = {}
            at += BLOCK + padded(size)
            if kind not in EXTENSIONS:
                start = at


def _header_at(path: Path, file: BinaryIO, at: int, length: int) -> bytes | None:
    """The checked header at `at`, or None at the end of the archive."""
    file.seek(at)
    header = file.read(BLOCK)
    if len(header) < BLOCK:
        raise DamagedTarError(f"{path}: cut at byte {length}: no end-of-archive block")
    if header == ZEROS:
        while block := file.read(1 << 20):
            if block.strip(b"\0"):
                raise DamagedTarError(f"{path}: more data after the end-of-archive block at byte {at}")
        return None
    if sum(header) - sum(header[148:156]) + 8 * ord(" ") != _number(path, header[148:156], at):
        raise DamagedTarError(f"{path}: no tar header at byte {at}: its checksum is wrong")
    return header


def _extension(path: Path, file: BinaryIO, kind: bytes, size: int, at: int) -> dict[str, str]:
    """What a PAX header (x) or a GNU long name (L) says about the member after it. Global ones (g) say nothing."""
    if size > MAX_EXTENSION_BYTES:
        raise DamagedTarError(f"{path}: an extension header of {size} bytes at byte {at}")
    content = file.read(size)
    if kind == b"L":
        return {"path": content.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    return _pax(path, content, at) if kind == b"x" else {}


def _number(path: Path, digits: bytes, at: int) -> int:
    """A number in octal, or in base 256 when its first bit is set."""
    if digits[0] & 0x80:
        return int.from_bytes(bytes([digits[0] & 0x7F]) + digits[1:])
    try:
        return int(digits.strip(b" \0") or b"0", 8)
    except ValueError:
        raise DamagedTarError(f"{path}: no tar header at byte {at} ({digits!r} is no number)") from None


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _pax(path: Path, content: bytes, at: int) -> dict[str, str]:
    """Records `LENGTH KEY=VALUE\\n` of a PAX header."""
    fields = {}
    while content:
        digits = content.split(b" ", 1)[0]
        length = int(digits) if digits.isdigit() else 0
        record = content[len(digits) + 1 : length]
        key, equals, value = record.partition(b"=")
        if not (equals and value.endswith(b"\n") and length <= len(content)):
            raise DamagedTarError(f"{path}: damaged PAX header at byte {at}")
        fields[key.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "surrogateescape")
        content = content[length:]
    if not fields.get("size", "0").isdigit():
        raise DamagedTarError(f"{path}: damaged PAX header at byte {at}")
    return fields


def checked_header(header: bytes) -> tuple[str, int]:
    """Name and size of a tar member by its header; ValueError for what is none."""
    if len(header) != TAR_BLOCK or header[257:262] not in (b"ustar", bytes(5)):  # nothing there in the oldest form
        raise ValueError("no tar header where the index says")
    name = header[:100].rstrip(b"\0").decode("ascii", "replace")
    checksum = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if checksum != _octal(header[148:156]):
        raise ValueError(f"damaged tar header of {name!r}")
    return name, _octal(header[124:136])


def _octal(field: bytes) -> int:
    digits = field.strip(b" \0")
    return int(digits, 8) if digits else 0


TAR_BLOCK = 512
