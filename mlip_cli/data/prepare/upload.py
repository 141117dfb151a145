"""Prepared data at a URL: made in a folder of this machine as for any other OUT, then uploaded.

URL/.prepare/request.json   written before the work begins, so that a URL that cannot be written to is found at once
URL/SPLIT/                  shards and indexes, then the rest, then dataset.json
URL/prepared.json           written last: a URL without it is not finished
FOLDER/.upload/lock         held by the one process of this machine that uploads
FOLDER/.upload/KEY.jsonl    a line for each file that has been sent to the URL of this key

A file is sent again unless it is there with its size and a line says that this very file was sent: what the stores
themselves say of their content (ETag, md5Hash) differs from store to store, and with the way in which it was sent.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

from mlip_cli.data.cache import own_folder
from mlip_cli.data.prepare.request import check_same
from mlip_cli.data.prepare.retry import RETRY
from mlip_cli.data.prepare.summary import Summary, next_commands
from mlip_cli.data.prepare.workspace import DONE, OWN_FOLDER
from mlip_cli.data.transfers import MissingFileError, Transfers, errors_named, filesystem_of, side_by_side
from mlip_cli.errors import RunError, UsageError, interrupted_as
from mlip_cli.files import json_document, lock, parse_object
from mlip_cli.terminal.output import plural, say, size_in_words

MARK = f"{OWN_FOLDER}/request.json"
JOURNALS = ".upload"
CARD = "dataset.json"
AGAIN = "run the same command again: it goes on"


@dataclass(frozen=True)
class Store:
    """A place at a URL, and the folder of this machine where its data are made."""

    url: str
    folder: Path
    keeps_folder: bool
    """The user named the folder. Otherwise it goes when all of it is at the URL."""

    @classmethod
    def at(cls, url: str, workspace: Path | None) -> "Store":
        """The place at `url`.

        Raises:
            UsageError: it is a folder of this machine, or no package speaks its protocol.
        """
        protocol, _, path = url.partition("://")
        if protocol in ("file", "local"):
            raise UsageError(f"{url}: a folder of this machine; write {path}")
        filesystem_of(url)
        try:
            folder = workspace or own_folder() / "prepared" / hashlib.sha256(url.encode()).hexdigest()[:16]
        except UsageError:
            raise UsageError(f"{url}: this account has no home folder to prepare in; name one: --workspace") from None
        return cls(url, folder, workspace is not None)

    def finished(self, request: Mapping[str, Any]) -> Summary | None:
        """The summary in prepared.json, or None when the URL is not finished.

        Raises:
            UsageError: it is finished from another source or with other options, or is no longer whole.
        """
        content = self._read(DONE)
        if content is None:
            return None
        summary = Summary.parse(content, place=f"{self.url}/{DONE}")
        check_same(self.url, summary.request, request, state="was prepared")
        for split in summary.splits:
            if self._read(f"{split}/{CARD}") is None:
                cure = "remove what is there and prepare it again"
                raise UsageError(f"{self.url}: was prepared, but {split}/{CARD} is gone; {cure}")
        return summary

    @contextmanager
    def begun(self, request: Mapping[str, Any]) -> Iterator[None]:
        """Mark the URL as one where this request is at work. The mark goes if the preparation keeps nothing.

        Raises:
            UsageError: nothing can be written there, or it holds something else.
        """
        mark, others = self._read(MARK), self._names() - {OWN_FOLDER}
        if others and mark is None:
            raise UsageError(f"{self.url}: holds other files; name a new place")
        if others and mark is not None:
            check_same(self.url, _object(mark), request, state="is half uploaded")
        try:
            self._write(MARK, request)
        except MissingFileError as error:
            reason = str(error.__cause__).splitlines()[0]
            cure = "correct the URL, or make the bucket"
            raise UsageError(f"{self.url}: nothing can be written there ({reason}); {cure}") from None
        try:
            yield
        except (UsageError, RunError):
            if not self.folder.exists():
                self._remove(MARK)
            raise

    def named_in(self, summary: Summary) -> Summary:
        """The summary with the URL in place of the folder."""
        commands = next_commands(summary.request["format"], self.url, summary.splits)
        return replace(summary, out=self.url, next=commands)

    def upload(self, summary: Summary) -> Summary:
        """Send what the folder holds, `summary` last, and remove the folder unless the user named it.

        An upload that was interrupted goes on.

        Raises:
            UsageError: another process of this machine uploads the folder.
            RunError: the network failed, or a file is not there with its size though it was sent.
            Stopped: Ctrl-C or SIGTERM.
        """
        with interrupted_as(f"{self.url}: interrupted; {AGAIN}", hears_sigterm=True), self._locked():
            sizes = _sizes(self.folder)
            shards = [name for name in sizes if name.endswith((".tar", ".idx"))]
            cards = [name for name in sizes if name.endswith(f"/{CARD}")]
            rest = [name for name in sizes if name not in (*shards, *cards)]
            missing = self._missing(sizes)
            num_bytes = sum(sizes[name] for name in missing)
            say(f"uploading {plural(len(missing), 'file')}, {size_in_words(num_bytes)}, to {self.url}")
            for names in (shards, rest, cards):
                self._send([name for name in names if name in missing], label=f"uploading {self.url}")
                self._check_sizes(sizes, names)
            self._write(DONE, asdict(summary))
        self.clear()
        return summary

    def clear(self) -> None:
        """Remove what a finished URL has no need of, as a kill in the last steps leaves it too."""
        self._remove(MARK)
        if not self.keeps_folder:
            shutil.rmtree(self.folder, ignore_errors=True)
        elif self.folder.exists():
            say(f"the copy in {self.folder} stays")

    # files at the URL ------------------------------------------------------------------------------------------------

    @contextmanager
    def _at(self, name: str = "") -> Iterator[tuple[Any, str]]:
        """The file system, and the path in it of a file there, or of the place itself."""
        below = f"/{name}" if name else ""
        with errors_named(self.url + below):
            filesystem, path = filesystem_of(self.url)
            yield filesystem, path + below

    def _read(self, name: str) -> bytes | None:
        """A small file there; None: there is no such file."""
        try:
            with self._at(name) as (filesystem, path):
                return bytes(filesystem.cat_file(path))
        except MissingFileError:
            return None

    def _write(self, name: str, value: Any) -> None:
        with self._at(name) as (filesystem, path):
            filesystem.pipe_file(path, json_document(value))

    def _remove(self, name: str) -> None:
        with suppress(MissingFileError), self._at(name) as (filesystem, path):
            filesystem.rm_file(path)

    def _names(self) -> set[str]:
        """Names of the files and folders there."""
        try:
            with self._at() as (filesystem, path):
                filesystem.invalidate_cache()
                found = filesystem.ls(path, detail=False)
        except MissingFileError:
            return set()
        return {name.rstrip("/").rpartition("/")[2] for name in found if name.strip("/") != path.strip("/")}

    def _there(self) -> dict[str, int]:
        """The size of each file there by its name."""
        with self._at() as (filesystem, path):
            filesystem.invalidate_cache()
            found = filesystem.find(path, detail=True)
        return {name[len(path) :].lstrip("/"): int(info["size"]) for name, info in found.items()}

    # the upload ------------------------------------------------------------------------------------------------------

    @property
    def _journal(self) -> Path:
        key = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        return self.folder / JOURNALS / f"{key}.jsonl"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        def refuse() -> None:
            raise UsageError(f"{self.folder}: another mlip prepare-data is uploading it; wait for it")

        self._journal.parent.mkdir(exist_ok=True)
        with open(self._journal.parent / "lock", "a", encoding="utf-8") as file:
            lock(file, when_held=refuse)
            yield

    def _missing(self, sizes: Mapping[str, int]) -> set[str]:
        """Names of the files that must be sent."""
        there, sent = self._there(), set()
        if self._journal.exists():
            sent = set(self._journal.read_text("utf-8").splitlines())
        return {name for name, size in sizes.items() if there.get(name) != size or _line(self.folder, name) not in sent}

    def _send(self, names: Sequence[str], *, label: str) -> None:
        writing = Lock()

        def send(name: str, transfers: Transfers) -> None:
            line = _line(self.folder, name)
            transfers.send(self.folder / name, self.url, name)
            with writing, open(self._journal, "a", encoding="utf-8") as journal:
                journal.write(f"{line}\n")

        if names:
            side_by_side(send, names, label=label)

    def _check_sizes(self, sizes: Mapping[str, int], names: Sequence[str]) -> None:
        """See that the files are there, whole.

        Raises:
            RunError: one is not.
        """
        there = self._there()
        for name in names:
            if there.get(name) != sizes[name]:
                found = f"{there[name]} bytes" if name in there else "no such file"
                raise RunError(f"{self.url}/{name}: {found} where {sizes[name]} were sent; {AGAIN}")


def _sizes(folder: Path) -> dict[str, int]:
    """The size of each file to send, by its name in `folder`. Nothing at a URL is tried again."""
    found: dict[str, int] = {}
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [Path(where, name) for name in sorted(names) if name != RETRY]
        found |= {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    del found[DONE]
    return found


def _line(folder: Path, name: str) -> str:
    """A line of the journal; another one for another file of the same name."""
    state = (folder / name).stat()
    return json.dumps([name, state.st_size, state.st_mtime_ns])


def _object(content: bytes) -> dict[str, Any]:
    """The mark; an empty one if it is damaged."""
    try:
        return parse_object(content)
    except ValueError:
        return {}
