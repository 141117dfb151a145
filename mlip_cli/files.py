"""Write files so that they are either whole or absent."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlip_cli.errors import RunError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""errno values for a full disk, an exceeded quota or a file-size limit."""


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success it is synced and renamed to `path`, on any error removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def full_disk_named(place: Path, cure: str) -> Iterator[None]:
    """Turn what the system says of a full disk (or quota, or limit on file sizes) into one line with place and cure.

    Raises:
        RunError: there was no room for something that the block wrote.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK:
            raise RunError(f"{place}: {os.strerror(error.errno)}; {cure}") from error
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Replace `path` atomically with UTF-8 text."""
    write_bytes(path, content.encode())


def write_json(path: Path, value: Any) -> None:
    """Replace `path` atomically with strict, readable JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
