"""Paths and names that people hand over: how they are read, checked and shown."""

import errno
import os
import re
import sys
import tempfile
from pathlib import Path

from mlip_cli.errors import UsageError

_UNSHOWN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, ends of lines, what turns the direction of writing, and what UTF-8 cannot encode."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_ELSEWHERE = re.compile(r"(pipe|s3|s3a|gs|gcs|https?|ftp|hdfs|hf|az|abfs|file):|[A-Za-z][\w+.-]+:/")
"""How a path begins that is a stream or a URL."""


def escaped(text: str, *, keep: str = "") -> str:
    r"""`text` on one line that is safe to print: `a<newline>b` -> `a\nb`, an escape character -> `\x1b`.

    Args:
        keep: characters that stay as they are.
    """
    return _UNSHOWN.sub(lambda match: match[0] if match[0] in keep else _escape(match[0]), text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def encodable(text: str) -> str:
    """`text` with escapes for what UTF-8 cannot encode: what files of ours hold."""
    return text.encode("utf-8", "backslashreplace").decode()


def check_utf8(name: str, *, place: str = "") -> None:
    """Refuse a name that is not UTF-8, or that Python here does not read as UTF-8.

    Raises:
        UsageError: it begins with `place`, and has the cure.
    """
    if encodable(name) == name:
        return
    try:
        os.fsencode(name).decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{place}{escaped(name)}: a name that is not UTF-8; rename it") from None
    raise _wrong_encoding(f"{place}{escaped(name)}")


def _wrong_encoding(place: str) -> UsageError:
    return UsageError(f"{place}: Python reads names as {sys.getfilesystemencoding()} here; set PYTHONUTF8=1")


def check_current_folder() -> None:
    """Check that the current folder is still there: relative paths mean nothing without it, and PyTorch does not load.

    Raises:
        UsageError: it was removed.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UsageError("the current folder was removed; change to another one with cd") from None


def read_path(text: str) -> str:
    """A local path as typed, with `~` and `~NAME` replaced by the home folder; it need not exist.

    Raises:
        UsageError: it is empty, a URL or a stream, no file can have this name, or the home folder is not known.
    """
    if not text:
        raise UsageError("an empty path; write . for the current folder")
    if _CONTROL.search(text):
        raise UsageError(f"{escaped(text)}: a name with control characters; rename it")
    if is_elsewhere(text):
        raise UsageError(f"{text}: a URL or a stream, and a path of this machine is needed; copy the data to a disk")
    path = os.path.expanduser(text)
    if path.startswith("~"):
        name = path.partition("/")[0]
        what = "the home folder is not known; set HOME" if name == "~" else f"there is no user {name[1:]}; correct it"
        raise UsageError(f"{text}: {what}, or write ./{text} for a file or folder of this name")
    try:
        os.lstat(path)
    except UnicodeEncodeError:
        raise _wrong_encoding(text) from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UsageError(f"{text[:60]}...: too long for a path, {len(path):,} characters; shorten it") from None
    return path


def read_variable(name: str) -> str | None:
    """The path in an environment variable; None if it is not set or empty.

    Raises:
        UsageError: it cannot be a path.
    """
    text = os.environ.get(name)
    try:
        return read_path(text) if text else None
    except UsageError as error:
        raise UsageError(f"${name}: {error}") from None


def is_url(path: str) -> bool:
    """True for `s3://bucket/folder` and the like, whatever the protocol."""
    return "://" in path


def read_place(text: str) -> str:
    """A local path as `read_path` reads it; a URL as it is, without a slash at its end.

    Raises:
        UsageError: as `read_path`, but for URLs only where they hold control characters.
    """
    if not is_url(text) or _CONTROL.search(text):
        return read_path(text)
    return text.rstrip("/")


def inside(folder: str, name: str) -> str:
    """The path or URL of `name` in a folder, which may be at a URL."""
    return f"{folder}/{name}" if is_url(folder) else str(Path(folder, name))


def is_elsewhere(text: str) -> bool:
    """True for URLs, whatever the protocol, and for `pipe:`: what a path of this machine cannot be."""
    return _ELSEWHERE.match(text) is not None


def read_dataset_name(text: str) -> str:
    """The name of an evaluation set; where it holds a path, as in folder:~/x, that is read and shortened.

    Raises:
        UsageError: the path cannot be one.
    """
    kind, colon, path = text.partition(":")
    return f"{kind}:{os.path.normpath(read_path(path))}" if colon and path else text


def check_can_be_made(folder: Path, *, option: str) -> None:
    """Check that files can be written into `folder`, which need not exist; nothing of it stays.

    Raises:
        UsageError: a file has its place, or the folder around it is read-only or full.
    """
    place = f"{option} {folder}"
    above = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not above.exists():
        raise UsageError(f"{place}: {above} is a link to nothing; make the folder that it names, or remove the link")
    if not above.is_dir():
        raise UsageError(f"{place}: {above} is a file; name another folder")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".mlip-", dir=above))
    except OSError as error:
        reason = f"nothing can be written in {above} ({error.strerror})"
        raise UsageError(f"{place}: {reason}; name another folder") from None
