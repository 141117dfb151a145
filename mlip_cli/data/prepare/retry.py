"""Which rejects can pass with time: the words of --retry-failed. Imports nothing heavy."""

from collections.abc import Mapping

from mlip_cli.data.download.outcome import CAN_PASS

PICTURE_MISSING, PICTURE_UNREADABLE = "picture missing", "picture cannot be read"
RETRYABLE = CAN_PASS | {PICTURE_MISSING, PICTURE_UNREADABLE}
"""Reasons of rejects that can be samples at another time."""
RETRY = "retry.npz"
"""In OUT, where there are such rejects: what --retry-failed needs besides the shards and rejects.parquet."""


def num_retryable(reasons: Mapping[str, int]) -> int:
    """How many rejects can pass with time, of those counted by reason."""
    return sum(n for reason, n in reasons.items() if reason in RETRYABLE)
