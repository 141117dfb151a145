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
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from mlip_cli.data.download.options import DownloadOptions
from mlip_cli.data.prepare.filters import AS_IT_IS, Cleaning
from mlip_cli.data.prepare.retry import RETRY
from mlip_cli.data.prepare.summary import Summary
from mlip_cli.data.sources.records import SPLITS
from mlip_cli.errors import UsageError
from mlip_cli.files import read_own_object, remove, sync_folder, write_json
from mlip_cli.paths import escaped

OWN_FOLDER = ".prepare"
DONE = "prepared.json"
REJECTS = "rejects.parquet"
REQUEST = "request.json"


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
class PartInHand:
    """How far the work on a part is."""

    number: int
    rows: int
    """Those that are samples or rejects by now."""
    reasons: dict[str, int]
    """Rejects by reason."""


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

    def discard(self) -> None:
        """Remove everything of an unfinished run, and OUT if it is then empty."""
        remove(self.folder)
        if self.out.is_dir() and not self.out.is_symlink() and not any(self.out.iterdir()):
            self.out.rmdir()


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
