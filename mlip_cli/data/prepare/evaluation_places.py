"""Evaluation sets that were found, and that are read when all rows are prepared. Imports nothing heavy."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlip_cli.data.sources.records import json_bytes


@dataclass(frozen=True)
class EvaluationPlace:
    """An evaluation set whose pictures stay out of training."""

    name: str
    """As the user gave it."""
    path: str
    """What mlip prepared, a folder of pictures or tars, or a pattern of tars."""
    fingerprint: str
    """Changes with its files."""

    @property
    def is_prepared(self) -> bool:
        """Whether mlip wrote it."""
        return Path(self.path, "dataset.json").is_file()

    @property
    def absolute(self) -> str:
        """The path, which is never the name of a built-in source."""
        return str(Path(self.path).absolute())


def fingerprint_of(places: Sequence[EvaluationPlace]) -> str:
    """Changes when one of the sets does."""
    return hashlib.sha256(json_bytes([[place.name, place.fingerprint] for place in places])).hexdigest()
