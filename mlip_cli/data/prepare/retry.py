"""Which rejects can pass with time: the words of --retry-failed. Imports nothing heavy."""

from collections.abc import Mapping
from pathlib import Path

from mlip_cli.data.download.outcome import CAN_PASS

PICTURE_MISSING, PICTURE_UNREADABLE = "picture missing", "picture cannot be read"
RETRYABLE = CAN_PASS | {PICTURE_MISSING, PICTURE_UNREADABLE}
"""Reasons of rejects that can be samples at another time."""
RETRY = "retry.npz"
"""In OUT, where there are such rejects: what --retry-failed needs besides the shards and rejects.parquet."""
EARLIER = "earlier.json"
"""In OUT/.prepare: prepared.json of before. While it is here, the work there is a retry."""


def is_begun(folder: Path) -> bool:
    """Whether the work in OUT/.prepare is a retry."""
    return (folder / EARLIER).is_file()


def num_retryable(reasons: Mapping[str, int]) -> int:
    """How many rejects can pass with time, of those counted by reason."""
    return sum(n for reason, n in reasons.items() if reason in RETRYABLE)
