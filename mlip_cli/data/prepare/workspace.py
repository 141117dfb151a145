"""The output folder of prepare-data while it is written: locks, request, finished parts, and the last step.

OUT/.prepare/lock           held by the one process that finishes, or shared by those that prepare parts
OUT/.prepare/part-1-of-3.lock   held by the process that prepares the first of three shares of the parts
OUT/.prepare/request.json   fingerprint of the source, options
OUT/.prepare/parts/         tars and tables of the parts; the JSON of a part is written last
OUT/.prepare/finished/      splits and rejects, moved to OUT at the end
OUT/prepared.json           written last: a folder without it is not finished
"""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

from mlip_cli.data.download.options import DownloadOptions
from mlip_cli.data.prepare.filters import AS_IT_IS, Cleaning
from mlip_cli.data.prepare.retry import RETRY
from mlip_cli.data.prepare.share import Share
from mlip_cli.data.prepare.summary import Summary
from mlip_cli.data.sources.records import SPLITS
from mlip_cli.errors import UsageError
from mlip_cli.files import lock, read_own_object, remove, sync_folder, write_json
from mlip_cli.paths import escaped

OWN_FOLDER = ".prepare"
DONE = "prepared.json"
REJECTS = "rejects.parquet"
REQUEST = "request.json"
FINGERPRINTS = {
    "source_fingerprint": "files of the source have changed since",
    "excluded_fingerprint": "evaluation sets of --exclude have changed since",
    "uids_file": "the file of --uids has changed since",
    "captions_from_file": "the file of --captions-from has changed since",
}
"""Keys of a request that no user gives, and what another value of them means."""


@dataclass(frozen=True)
class PartOptions:
    """How to prepare a part."""

    folder: str
    """That of the part's files."""
    size: int
    """Short side of stored pictures in pixels."""
    render: bool = False
    """The pictures are OpenMoji's SVGs."""
    cleaning: Cleaning = AS_IT_IS
    captions: str = ""
    """Where captions lie that are joined by the sha256 of pictures (rewritten.py)."""
    adds_captions: bool = False
    """They add to a row's own; else they take their place."""
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
    captions_left_out: int = 0
    """Captions that fell to a rule while others of the same picture stay."""
    rewritten: int = 0
    """Samples that have captions of another file by the sha256 of their pictures."""

    @classmethod
    def is_described_by(cls, values: Mapping[str, Any]) -> bool:
        """Whether these are the fields of a part, and its tar has the name that its number gives it."""
        if values.keys() != asdict(cls(0, 0, "", {})).keys() or not isinstance(values["reasons"], dict):
            return False
        counts = [value for name, value in values.items() if name not in ("tar", "reasons")]
        are_counts = all(type(n) is int and n >= 0 for n in (*counts, *values["reasons"].values()))
        return are_counts and values["tar"] == f"part-{values['number']:06d}.tar"


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

    def is_begun(self) -> bool:
        """Whether there is an unfinished run."""
        return (self.folder / REQUEST).is_file()

    def results(self) -> dict[int, PartResult]:
        """The finished parts by number."""
        found: dict[int, PartResult] = {}
        for path in self.parts.glob("*.json"):
            cure = f"remove {self.out} and prepare it again"
            fields = read_own_object(path, cure=cure)
            if not PartResult.is_described_by(fields) or fields["tar"] != path.with_suffix(".tar").name:
                raise UsageError(f"{path}: damaged (it does not describe this part); {cure}")
            found[fields["number"]] = PartResult(**fields)
        return found

    def counts_of_shares(self) -> set[int]:
        """Into how many shares the parts were divided, by each run with --part so far."""
        names = [re.fullmatch(r"part-\d+-of-(\d+)\.lock", path.name) for path in self.folder.glob("*.lock")]
        return {int(name[1]) for name in names if name}

    def num_bytes(self) -> int:
        """Bytes of the samples that are there already."""
        folders = (self.parts, self.finished, self.out)
        tars = chain(self.parts.glob("part-*.tar"), *(folder.glob("*/*.tar") for folder in folders))
        return sum(tar.stat().st_size for tar in tars if tar.exists())

    def take_back(self) -> None:
        """Undo what a `publish` that was killed had moved."""
        for name in (*SPLITS, REJECTS, RETRY):
            if (self.out / name).exists() and not (self.finished / name).exists():
                os.replace(self.out / name, self.finished / name)

    def publish(self, summary: Summary) -> None:
        """Move the finished splits to OUT, write prepared.json, and remove the rest."""
        for path in sorted(self.finished.iterdir()):
            os.replace(path, self.out / path.name)
        sync_folder(self.out)
        write_json(self.out / DONE, asdict(summary))
        shutil.rmtree(self.folder)

    def discard_unbegun(self) -> None:
        """Remove what was written for a source that is refused, unless an unfinished run needs it."""
        if self.folder.is_dir() and not (self.folder / "lock").is_file():
            self.discard()

    def discard_leftovers(self) -> None:
        """Remove what a run left that was killed after it wrote prepared.json, unless another process is at work."""
        if not self.folder.is_dir():
            return
        with suppress(UsageError), ExitStack() as stack:
            _lock(self, None, stack, may_be_finished=True)
            if (self.out / DONE).is_file():
                self.discard()

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
        check_same(out, summary.request, request, state="was prepared")
        for split in summary.splits:
            if not (out / split / "dataset.json").is_file():
                raise UsageError(
                    f"{out}: was prepared, but {split}/dataset.json is gone; remove {out} and prepare it again"
                )
        return summary
    if os.path.lexists(out / OWN_FOLDER):
        refuse_links(out)
    half_done = out / OWN_FOLDER / REQUEST
    if half_done.is_file():
        old = read_own_object(half_done, cure=f"remove {out} and prepare it again")
        check_same(out, old, request, state="is half prepared")
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
def opened(
    out: Path, request: Mapping[str, Any], share: Share | None = None, *, may_be_finished: bool = False
) -> Iterator[Workspace]:
    """The workspace of OUT, locked and with its request. Half-written files are removed before and after.

    Args:
        share: the parts to prepare beside processes that prepare other shares; None: nobody else may write here.
        may_be_finished: OUT may be finished already.

    Raises:
        UsageError: another process writes here with what this one must not share, it was begun with another request,
            or a link lies where this process would write.
    """
    refuse_links(out)
    work = Workspace(out)
    work.parts.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        _lock(work, share, stack, may_be_finished=may_be_finished)
        _remove_torn(work, share)
        try:
            _settle_request(work, request)
            yield work
        finally:
            _remove_torn(work, share)


def _lock(work: Workspace, share: Share | None, stack: ExitStack, *, may_be_finished: bool) -> None:
    """Hold the locks of a share, or keep everybody else out, until `stack` ends.

    Processes with one share in three and with one in two have parts in common, so they do not work side by side.
    """

    def refuse(which: str) -> None:
        wait = "wait for it" if share else "wait for it or name another folder"
        raise UsageError(f"{work.out}: another mlip prepare-data{which} is writing here; {wait}")

    main = stack.enter_context(_lock_file(work, "lock"))
    lock(main, when_held=lambda: refuse(" without --part" if share else ""), is_shared=share is not None)
    is_finished = (work.out / DONE).is_file() and not may_be_finished
    if is_finished or _is_gone(main, work.folder / "lock"):
        raise UsageError(f"{work.out}: another mlip prepare-data has just finished here; nothing is left to do")
    if share is None:
        return
    own = stack.enter_context(_lock_file(work, share.lock_name))
    lock(own, when_held=lambda: refuse(f" --part {share}"))
    for path in work.folder.glob("part-*.lock"):
        if not path.name.endswith(f"-of-{share.count}.lock"):
            other = path.stem.removeprefix("part-").replace("-of-", "/")
            with _lock_file(work, path.name) as file:
                lock(file, when_held=lambda other=other: refuse(f" --part {other}"))  # type: ignore[misc]


def _lock_file(work: Workspace, name: str) -> IO[str]:
    """A lock file, open for reading too, which a shared lock needs."""
    try:
        return open(work.folder / name, "a+", encoding="utf-8")
    except FileNotFoundError:  # the folder went when another process finished
        raise UsageError(
            f"{work.out}: another mlip prepare-data has just finished here; nothing is left to do"
        ) from None


def _is_gone(file: IO[str], path: Path) -> bool:
    """Whether the file at `path` is no longer this open one."""
    try:
        return not os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return True


def _settle_request(work: Workspace, request: Mapping[str, Any]) -> None:
    """Write request.json, of many processes that start at once only the first one; the others check theirs by it.

    Raises:
        UsageError: the folder was begun with another request.
    """
    path = work.folder / REQUEST
    with open(work.folder / "request.lock", "a", encoding="utf-8") as file:
        lock(file, when_held=lambda: None)
        if not path.is_file():
            write_json(path, request)
    old = read_own_object(path, cure=f"remove {work.out} and prepare it again")
    check_same(work.out, old, request, state="is half prepared")


def _remove_torn(work: Workspace, share: Share | None) -> None:
    """Remove half-written files: all, or those of the parts of a share, since nobody else writes these."""
    if share is not None:
        for path in work.parts.glob(".part-*.tmp"):
            if share.has(int(re.sub(r"\D.*", "", path.name.removeprefix(".part-")) or -1)):
                path.unlink(missing_ok=True)
        return
    torn = [work.out.glob(f".{DONE}.*.tmp")]
    torn.append(work.parts.glob("*/.*.tmp"))
    torn += [folder.glob(".*.tmp") for folder in (work.folder, work.parts, work.finished, *work.finished.glob("*"))]
    for path in chain.from_iterable(torn):
        path.unlink(missing_ok=True)


def check_same(out: Path | str, old: Mapping[str, Any], new: Mapping[str, Any], *, state: str) -> None:
    """See that `out`, a folder or a URL, was made by this request. `state` says what is known of it.

    Raises:
        UsageError: it was not; the message says what differs.
    """
    changed = [key for key in {**new, **old} if old.get(key) != new.get(key)]
    options = [key for key in changed if key not in FINGERPRINTS]
    if not changed:
        return
    what = ", ".join(f"{key} {_word(old.get(key))}, now {_word(new.get(key))}" for key in options)
    what = what or "; ".join(FINGERPRINTS[key] for key in changed)
    raise UsageError(
        f"{out}: {state} from another source or with other options ({what}); remove it or name another folder"
    )


def _word(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else "none" if value is None else str(value)
