"""Files that are either whole or absent, JSON that is checked when it is read, and locks between processes."""

import errno
import fcntl
import glob
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mlip_cli.errors import RunError, UsageError

MIB, GIB = 2**20, 2**30
"""Bytes."""

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""errno values for a full disk, an exceeded quota or a file-size limit."""


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_path(path: Path) -> Path:
    """The name beside `path` that this process writes under until the content is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def writer_of(path: Path) -> int | None:
    """The number of the process that made a temporary name; None: the name is not one of `temporary_path`."""
    found = re.fullmatch(r"\..+\.(\d+)\.tmp", path.name)
    return int(found[1]) if found else None


def remove(path: Path) -> None:
    """Delete a file, a folder with all that is in it, or a link, whose target stays. What is missing is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def lives(process: int) -> bool:
    """Whether this machine has a process of this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # somebody else's
        return True
    return True


def remove_leftovers(path: Path) -> None:
    """Delete what killed processes wrote under temporary names of `path`."""
    for other in path.absolute().parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        writer = writer_of(other)
        if writer is not None and not lives(writer):
            remove(other)


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk where `folder` lies, or would lie if it were made."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.is_dir())).free


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`. On success it is synced and renamed to `path`, on any error removed."""
    temporary = temporary_path(path)
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
    """Turn errors of a full disk (or quota, or limit on file sizes) into one line with place and cure.

    Raises:
        RunError: the block wrote something for which there was no room.
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
    """Replace `path` atomically with UTF-8 text. What UTF-8 lacks, as in some names of files, is escaped as in JSON."""
    write_bytes(path, content.encode("utf-8", "backslashreplace"))


def json_document(value: Any) -> bytes:
    """Strict, readable JSON in UTF-8, escaped as `write_text` does."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", "backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Replace `path` atomically with strict, readable JSON."""
    write_bytes(path, json_document(value))


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text without the spaces around them; empty ones are left out.

    Raises:
        UsageError: it is not UTF-8.
    """
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not UTF-8 text") from None
    return [line for line in map(str.strip, text.splitlines()) if line]


def parse_object(text: str | bytes, *, constant: Callable[[str], Any] | None = None) -> dict[str, Any]:
    """The JSON object that a text is.

    Args:
        constant: makes the values of NaN and infinities from their names; None: they are floats.

    Raises:
        ValueError: it is something else; the text says what.
    """
    try:
        value = json.loads(text, parse_constant=constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds; raises as `parse_object`."""
    return parse_object(path.read_bytes())


def read_own_object(path: Path, *, cure: str) -> dict[str, Any]:
    """The same for a file that mlip writes whole, so that damage came from elsewhere.

    Raises:
        UsageError: it holds something else; the message ends with `cure`.
    """
    try:
        return read_object(path)
    except ValueError as error:
        raise UsageError(f"{path}: damaged ({error}); {cure}") from None


def lock(file: IO[Any], *, when_held: Callable[[], None], is_shared: bool = False) -> None:
    """Lock a file that is open for writing, against other processes, until it is closed.

    The lock is a POSIX record lock, which forked processes do not inherit: after kill -9 of a training its loader
    processes do not keep the lock. Closing any other handle of the same file in this process releases it too.

    Args:
        when_held: called if another process holds the lock. Unless it raises, `lock` then waits for that process.
        is_shared: others may hold the lock too, if theirs is shared. The file must then be open for reading as well.

    Raises:
        OSError: the file system has no locks.
    """
    kind = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows both
        when_held()
        fcntl.lockf(file, kind)
