"""Whether OUT was made, or begun, from the same files with the same options."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlip_cli.data.prepare.summary import Summary
from mlip_cli.data.prepare.workspace import DONE, OWN_FOLDER, REQUEST, Workspace, refuse_links
from mlip_cli.errors import UsageError
from mlip_cli.files import lock, read_own_object, write_json

FINGERPRINTS = {
    "source_fingerprint": "files of the source have changed since",
    "excluded_fingerprint": "evaluation sets of --exclude have changed since",
    "uids_file": "the file of --uids has changed since",
    "captions_from_file": "the file of --captions-from has changed since",
}
"""Keys of a request that no user gives, and what another value of them means."""


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


def settle_request(work: Workspace, request: Mapping[str, Any]) -> None:
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
