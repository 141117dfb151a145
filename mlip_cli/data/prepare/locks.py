"""Who may write in OUT: one process, or several that prepare shares of the parts."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import IO, Any

from mlip_cli.data.prepare.request import settle_request
from mlip_cli.data.prepare.share import Share
from mlip_cli.data.prepare.workspace import DONE, Workspace, refuse_links
from mlip_cli.errors import UsageError
from mlip_cli.files import lock


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
            settle_request(work, request)
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


def discard_leftovers(work: Workspace) -> None:
    """Remove what a run left that was killed after it wrote prepared.json, unless another process is at work."""
    if not work.folder.is_dir():
        return
    with suppress(UsageError), ExitStack() as stack:
        _lock(work, None, stack, may_be_finished=True)
        if (work.out / DONE).is_file():
            work.discard()


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
