"""What prepare-data is asked to do. Imports nothing heavy."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlip_cli.data.download.options import DEFAULTS, DownloadOptions
from mlip_cli.data.prepare.engines import Engine
from mlip_cli.data.prepare.evaluation_places import EvaluationPlace
from mlip_cli.data.prepare.filters import AS_IT_IS, Cleaning
from mlip_cli.data.sources.formats import DataSource


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
