"""Open training data: prepared shards or tars as they are, fetched from a bucket first where they lie in one."""

from collections.abc import Sequence
from pathlib import Path

from mlip_cli.data.dataset import ShardDataset
from mlip_cli.data.remote import check_fit, is_url
from mlip_cli.recipe.config import Cache, Source


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
