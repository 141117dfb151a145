"""Which shards a run will read, so that they are on this machine before it begins."""

from collections.abc import Sequence

import numpy as np

from mlip_cli.data.dataset import ShardDataset
from mlip_cli.data.order import Order

CHUNK = 65_536
"""Positions that are looked at in one go."""


def fetch_ahead(datasets: Sequence[ShardDataset], order: Order, positions: range) -> None:
    """Fetch the shards that these positions of the run read, of the data that lies elsewhere.

    In training that is soon every one: the order is random over all shards. Samples that take the place of bad ones are
    not looked at; should their shard be missing, it is fetched when it is read.

    Raises:
        RunError: the network failed, or a shard is missing or not what dataset.json says.
    """
    missing = [set(range(dataset.num_shards)) if dataset.remote is not None else set[int]() for dataset in datasets]
    wanted: list[set[int]] = [set() for _ in datasets]
    for start in range(positions.start, positions.stop, CHUNK):
        if not any(missing):
            break
        found = order.positions(np.arange(start, min(start + CHUNK, positions.stop)))
        for number, dataset in enumerate(datasets):
            if missing[number]:
                shards = set(np.unique(dataset.shards_of(found.index[found.source == number])).tolist())
                wanted[number] |= shards
                missing[number] -= shards
    for dataset, shards in zip(datasets, wanted, strict=True):
        dataset.fetch(sorted(shards))
