"""Are the data all there, and what a run will make of them: before anything is trained."""

from collections.abc import Sequence

from mlip_cli.data.dataset import ShardDataset
from mlip_cli.data.loader import check_divides, decoded
from mlip_cli.data.order import Order
from mlip_cli.output import plural


def preflight(datasets: Sequence[ShardDataset], order: Order, global_batch_size: int, world_size: int) -> list[str]:
    """Lines about what was found and what it makes of steps and epochs; the first sample of each data set is decoded.

    Raises:
        UsageError: the global batch does not divide by the ranks.
        RunError: a first sample that cannot be read.
    """
    check_divides(global_batch_size, world_size)
    lines = []
    for number, dataset in enumerate(datasets):
        decoded(dataset.read(0))
        share = f", {float(order.shares[number]):.1%} of what is seen" if order.shares else ""
        lines.append(f"{dataset.name}: {dataset.num_samples:,} samples in {plural(dataset.num_shards, 'shard')}{share}")
    if order.steps_per_epoch is not None:
        left_out = order.num_samples - order.steps_per_epoch * global_batch_size
        tail = f"; {left_out:,} samples are left out, others each epoch" if left_out else ""
        steps = order.steps_per_epoch
        lines.append(f"{order.num_samples:,} samples / {global_batch_size:,} = {steps:,} steps an epoch{tail}")
    if world_size > 1:
        lines.append(f"{global_batch_size:,} / {world_size} ranks = {global_batch_size // world_size:,} samples a rank")
    return lines
