"""Whether the disk has room for what prepare-data will write."""

from mlip_cli.data.prepare import shards
from mlip_cli.data.prepare.job import Job
from mlip_cli.data.prepare.workspace import Workspace
from mlip_cli.data.sources.survey import Survey
from mlip_cli.errors import UsageError
from mlip_cli.files import free_bytes
from mlip_cli.terminal.output import size_in_words

BYTES_A_PIXEL = 0.5
"""Estimate for the check of disk space: between JPEG and lossless WebP of photographs at 256 pixels."""
BYTES_A_SAMPLE = 4096
"""Tar headers and texts."""
SHARDS_BESIDE_PARTS = 3
"""What the disk holds beside the data themselves: a shard of each of two splits, and one that is being written."""


def check_room(job: Job, survey: Survey) -> None:
    """Refuse to start what cannot fit: the samples once, and a few shards that lie beside the parts they come from.

    Raises:
        UsageError: the estimated need is more than the free space and what an earlier run has written.
    """
    out = job.out
    sample = BYTES_A_PIXEL * job.size * job.size * 4 / 3
    num_rows = survey.pictures
    if source_bytes := 0 if survey.addresses else job.source.num_bytes:
        sample = min(sample, 2 * source_bytes / max(1, num_rows))
    samples = int(num_rows * (sample + BYTES_A_SAMPLE))
    needed = samples + min(samples, SHARDS_BESIDE_PARTS * shards.SHARD_BYTES) - Workspace(out).num_bytes()
    free = free_bytes(out)
    if needed > free:
        raise UsageError(
            f"{out}: about {size_in_words(needed)} needed, {size_in_words(free)} free on this disk; make room, "
            "name a folder on another disk, or take a smaller --size"
        )
