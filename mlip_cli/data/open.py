"""Open training data: prepared shards, prepared shards at a URL, or tars as they are."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from mlip_cli.data.dataset import ShardDataset
from mlip_cli.data.index import index_path, parse_card
from mlip_cli.data.remote import RemoteShards, check_fit
from mlip_cli.data.sources.find import find_source
from mlip_cli.data.sources.lists import prepare_command
from mlip_cli.data.sources.records import SPLITS
from mlip_cli.errors import UsageError
from mlip_cli.paths import is_url
from mlip_cli.recipe.config import Cache, Source


def open_sources(
    sources: Sequence[Source], *, cache: Cache | None = None, beside: Sequence[ShardDataset] = ()
) -> list[ShardDataset]:
    """The data sets of `data.train` or `data.validation`, in order; of those at URLs the indexes are fetched.

    Args:
        cache: for those at URLs and for tars as they are; None: the user's own.
        beside: other data sets in use; the cache must have room for them too.

    Raises:
        UsageError: a folder is missing, not prepared or empty, or the cache cannot hold what lies elsewhere.
        RunError: the network failed.
    """
    datasets = [_open_source(source, cache or Cache()) for source in sources]
    check_fit([dataset.remote for dataset in (*beside, *datasets) if dataset.remote is not None])
    return datasets


def check_there(source: Source) -> None:
    """Check that local data is where the recipe says, without opening it: the rest needs more time.

    Raises:
        UsageError: it is missing or not prepared.
    """
    if source.format == "webdataset":
        find_source(source.path, format="webdataset")
    elif not is_url(source.path):
        check_prepared(Path(source.path))


def _open_source(source: Source, cache: Cache) -> ShardDataset:
    if source.format == "webdataset":
        from mlip_cli.data.plain_tars import index_tars
        from mlip_cli.data.sources.tar_samples import Columns

        columns = Columns(source.image_column, source.caption_column)
        return ShardDataset(*index_tars(source.path, columns, cache), name=source.path, columns=columns)
    if is_url(source.path):
        remote = RemoteShards(source.path, cache)
        return _prepared(remote.folder, name=remote.url, remote=remote)
    return open_prepared(Path(source.path))


def open_prepared(folder: Path) -> ShardDataset:
    """The data set that mlip prepare-data wrote to `folder`.

    Raises:
        UsageError: the folder is not a prepared data set; the message names the command that makes one.
        RunError: an index is missing or damaged, or does not belong to its shard.
    """
    check_prepared(folder)
    return _prepared(folder, name=str(folder))


def check_prepared(folder: Path) -> None:
    """Check that `folder` has the card of a prepared data set.

    Raises:
        UsageError: as `open_prepared`.
    """
    if not (folder / "dataset.json").is_file():
        raise UsageError(_why_not_prepared(folder))


def _prepared(folder: Path, *, name: str, remote: RemoteShards | None = None) -> ShardDataset:
    """The shards that lie in `folder`, or will lie there once they are fetched."""
    path = folder / "dataset.json"
    card = parse_card(path.read_bytes(), place=str(path), folder=name)
    tars = [folder / shard["name"] for shard in card["shards"]]
    return ShardDataset(tars, list(map(index_path, tars)), card, name=name, columns=None, remote=remote)


def _why_not_prepared(folder: Path) -> str:
    source = "openmoji" if folder.parent.name == "openmoji" else "SOURCE"
    quoted = shlex.quote(str(folder))
    if not folder.exists():
        if folder.name in SPLITS:
            command = prepare_command(folder.parent.name, folder.parent)
            cure = f"make it with: {command or f'mlip prepare-data {source} {shlex.quote(str(folder.parent))}'}"
        else:  # prepare-data names the parts of what it writes
            cure = f"make it with: mlip prepare-data SOURCE {quoted}, and name {folder / SPLITS[0]}"
        return f"{folder}: no such folder; {cure}"
    if not folder.is_dir():
        return f"{folder}: a file, not a folder of shards; prepare it: mlip prepare-data {quoted} OUT"
    as_they_are = f"data.train: [{{path: {folder}, format: webdataset}}]"
    parts = sorted(child.parent for child in folder.glob("*/dataset.json"))
    if parts:
        return f"{folder}: no dataset.json here, but in {', '.join(map(str, parts))}; name one of these"
    what = "no dataset.json"
    if any(folder.glob("*.tar")):
        if not any(folder.glob("*.idx")):
            cure = f"prepare them: mlip prepare-data {quoted} OUT, or read them as they are: {as_they_are}"
            return f"{folder}: tars without index; {cure}"
        what = "shards without dataset.json"
    return f"{folder}: {what}; prepare it: mlip prepare-data {quoted} OUT"
