"""Open training data: prepared shards or tars as they are, fetched from a bucket first where they lie in one."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlip_cli.data.dataset import ShardDataset
from mlip_cli.data.order import Order
from mlip_cli.data.remote import check_fit, is_url
from mlip_cli.recipe.config import Cache, Source

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


def open_sources(
    sources: Sequence[Source], *, cache: Cache | None = None, beside: Sequence[ShardDataset] = ()
) -> list[ShardDataset]:
    """The data sets of `data.train` or `data.validation`, in order; of those at URLs the indexes are fetched.

    Args:
        cache: for those at URLs; None: the user's own.
        beside: data sets that are in use too, for which the cache must have room as well.

    Raises:
        UsageError: a folder is missing, not prepared or empty, or the cache cannot hold what lies elsewhere.
        RunError: the network failed.
    """
    datasets = [_open_source(source, cache or Cache()) for source in sources]
    check_fit([dataset.remote for dataset in (*beside, *datasets) if dataset.remote is not None])
    return datasets


def _open_source(source: Source, cache: Cache) -> ShardDataset:
    if source.format == "webdataset":
        from mlip_cli.data.plain_tars import PlainTars

        return PlainTars(source.path, cache)
    return ShardDataset.at_url(source.path, cache) if is_url(source.path) else ShardDataset(Path(source.path))
