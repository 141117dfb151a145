"""What prepare-data is asked to do. Imports nothing heavy."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlip_cli.data.download.options import DEFAULTS, DownloadOptions
from mlip_cli.data.prepare.engines import Engine
from mlip_cli.data.prepare.evaluation_places import EvaluationPlace
from mlip_cli.data.prepare.filters import AS_IT_IS, Cleaning
from mlip_cli.data.sources.formats import ANY_COLUMNS, DataSource
from mlip_cli.data.sources.records import ReadOptions


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the user asks for, before anything is looked at."""

    source: str
    out: str
    """A folder, or a URL."""
    format: str = "auto"
    read: ReadOptions = ANY_COLUMNS
    cleaning: Cleaning = AS_IT_IS
    data_root: Path | None = None
    """Where the evaluation sets of `cleaning.exclude` lie; None: see `find.data_root`."""
    size: int | None = None
    """Short side of stored pictures in pixels; None: as the format of the source has it."""
    holdout: float | None = None
    engine: Engine
    workspace: Path | None = None
    """Where data for a URL are made; None: in the cache."""
    part: str | None = None
    """I/N: prepare the I-th of N shares of the parts, and finish nothing."""
    finish: bool = False
    """Make the shards of parts that are all prepared."""
    retry_failed: bool = False
    """Try rows of OUT again that failed for a reason that can pass."""
    download: DownloadOptions = DEFAULTS


@dataclass(frozen=True)
class Job:
    """A source that becomes shards in OUT."""

    source: DataSource
    out: Path
    request: Mapping[str, Any]
    """Format, size, holdout, the rules that are set, and the fingerprint of the source. It goes to prepared.json."""
    engine: Engine
    cleaning: Cleaning = AS_IT_IS
    excluded: tuple[EvaluationPlace, ...] = ()
    """Where the evaluation sets lie whose pictures stay out of training."""
    download: DownloadOptions = DEFAULTS

    @property
    def size(self) -> int:
        """Short side of stored pictures in pixels."""
        return int(self.request["size"])
