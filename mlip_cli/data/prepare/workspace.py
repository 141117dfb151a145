"""The output folder of prepare-data while it is written: lock, request, finished parts, and the last step.

OUT/.prepare/lock           held by the one process that writes here
OUT/.prepare/request.json   fingerprint of the source, options
OUT/.prepare/parts/         tars and tables of the parts; the JSON of a part is written last
OUT/.prepare/finished/      splits and rejects, moved to OUT at the end
OUT/prepared.json           written last: a folder without it is not finished
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from mlip_cli.data.download.options import DownloadOptions
from mlip_cli.data.prepare.summary import Summary
from mlip_cli.errors import UsageError
from mlip_cli.files import lock, read_own_object, remove, sync_folder, write_json
from mlip_cli.paths import escaped

OWN_FOLDER = ".prepare"
DONE = "prepared.json"


@dataclass(frozen=True)
class PartOptions:
    """How to prepare a part."""

    folder: str
    """That of the part's files."""
    size: int
    """Short side of stored pictures in pixels."""
    render: bool = False
    """The pictures are OpenMoji's SVGs."""
    download: DownloadOptions | None = None
    """What this process may take, where pictures are addresses."""


@dataclass(frozen=True)
class PartResult:
    """A part whose verified files are on the disk, as its JSON holds it."""

    number: int
    rows: int
    tar: str
    """Name in parts/. The tables of samples and rejects lie beside it."""
    reasons: dict[str, int]
    """Rejects by reason."""
    source_rows: int = 0
    """Rows of the source. Those that share a picture became one."""


@dataclass(frozen=True)
class Workspace:
    """`OUT` and the places in it."""

    out: Path

    @property
    def folder(self) -> Path:
        return self.out / OWN_FOLDER

    @property
    def parts(self) -> Path:
        return self.folder / "parts"

    @property
    def finished(self) -> Path:
        return self.folder / "finished"

    def results(self) -> dict[int, PartResult]:
        """The finished parts by number."""
        found: dict[int, PartResult] = {}
        for path in self.parts.glob("*.json"):
            cure = f"remove {self.out} and prepare it again"
            try:
                result = PartResult(**read_own_object(path, cure=cure))
            except TypeError:
                raise UsageError(f"{path}: damaged (it describes no part); {cure}") from None
            found[result.number] = result
        return found

    def publish(self, summary: Summary) -> None:
        """Move the finished splits to OUT, write prepared.json, and remove the rest."""
        for path in sorted(self.finished.iterdir()):
            target = self.out / path.name
            if target.is_dir():  # left by a run that was interrupted right here
                shutil.rmtree(target)
            os.replace(path, target)
        sync_folder(self.out)
        write_json(self.out / DONE, asdict(summary))
        shutil.rmtree(self.folder)

    def discard(self) -> None:
        """Remove everything of an unfinished run, and OUT if it is then empty."""
        remove(self.folder)
        if self.out.is_dir() and not self.out.is_symlink() and not any(self.out.iterdir()):
            self.out.rmdir()


def finished_summary(out: Path, request: Mapping[str, Any]) -> Summary | None:
    """The summary in prepared.json, or None when OUT is not finished.

    Raises:
        UsageError: OUT is finished from another source or with other options, is no longer whole, or holds something
            else.
    """
    if not out.exists():
        return None
    if (out / DONE).is_file():
        summary = Summary.read(out / DONE)
        _check_same(out, summary.request, request, state="was prepared")
        for split in summary.splits:
            if not (out / split / "dataset.json").is_file():
                raise UsageError(
                    f"{out}: was prepared, but {split}/dataset.json is gone; remove {out} and prepare it again"
                )
        return summary
    if os.path.lexists(out / OWN_FOLDER):
        refuse_links(out)
    half_done = out / OWN_FOLDER / "request.json"
    if half_done.is_file():
        old = read_own_object(half_done, cure=f"remove {out} and prepare it again")
        _check_same(out, old, request, state="is half prepared")
    elif any(path.name != OWN_FOLDER for path in out.iterdir()):
        raise UsageError(f"{out}: holds other files; name a new folder")
    return None


def refuse_links(out: Path) -> None:
    """Check that what would be written to OUT, or deleted there, stays in it. OUT itself may be a link to a folder.

    Raises:
        UsageError: there is a link in OUT, or in our folder there.
    """
    for path in chain(out.glob("*"), (out / OWN_FOLDER).rglob("*")):  # in this order: the second follows a first link
        if path.is_symlink():
            raise UsageError(
                f"{escaped(str(path))}: a link, which could lead out of {out}; remove it, or name another folder"
            )


@contextmanager
def opened(out: Path, request: Mapping[str, Any]) -> Iterator[Workspace]:
    """The workspace of OUT, locked and with its request. Half-written files are removed before and after.

    Raises:
        UsageError: another process writes here, or a link lies where this one would.
    """
    refuse_links(out)
    work = Workspace(out)
    work.parts.mkdir(parents=True, exist_ok=True)

    def refuse() -> None:
        raise UsageError(f"{out}: another mlip prepare-data is writing here; wait for it or name another folder")

    with open(work.folder / "lock", "a", encoding="utf-8") as file:
        lock(file, when_held=refuse)
        _remove_torn(work)
        try:
            if not (work.folder / "request.json").is_file():
                write_json(work.folder / "request.json", request)
            yield work
        finally:
            _remove_torn(work)


def _remove_torn(work: Workspace) -> None:
    shutil.rmtree(work.finished, ignore_errors=True)
    for path in (*work.folder.glob(".*.tmp"), *work.parts.glob(".*.tmp"), *work.out.glob(f".{DONE}.*.tmp")):
        path.unlink(missing_ok=True)


def _check_same(out: Path, old: Mapping[str, Any], new: Mapping[str, Any], *, state: str) -> None:
    changed = [key for key in new if old.get(key) != new[key] and key != "source_fingerprint"]
    if changed:
        what = ", ".join(f"{key} {_word(old.get(key))}, now {_word(new[key])}" for key in changed)
    elif old.get("source_fingerprint") != new["source_fingerprint"]:
        what = "files of the source have changed since"
    else:
        return
    raise UsageError(
        f"{out}: {state} from another source or with other options ({what}); remove it or name another folder"
    )


def _word(value: Any) -> str:
    return "none" if value is None else str(value)
