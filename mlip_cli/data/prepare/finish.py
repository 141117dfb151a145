"""Pass 2: one process puts the parts together to splits, and gives their room back as it goes.

The order of the steps lets any of them be killed. The tables and rejects of the parts stay until the end, so a rerun
makes the same plan. rejects.parquet is written before the first tar of a part goes, since it names dropped samples by
what the tars hold. The tar of a part goes when every sample of it lies in a shard that is verified and has its index.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlip_cli.data.prepare.plan import Decide, Plan, PlannedShard, plan_of
from mlip_cli.data.prepare.rejects import write_rejects
from mlip_cli.data.prepare.retried import write_retry
from mlip_cli.data.prepare.retry import RETRY, RETRYABLE
from mlip_cli.data.prepare.shards import WrittenSplit, write_card, write_shard
from mlip_cli.data.prepare.summary import SplitSummary
from mlip_cli.data.prepare.workspace import REJECTS, PartResult, Workspace
from mlip_cli.data.sources.records import SPLITS
from mlip_cli.files import remove
from mlip_cli.terminal.panel import progress


@dataclass(frozen=True)
class Finished:
    """What lies in the finished folder."""

    splits: dict[str, SplitSummary]
    """Empty: no row became a sample."""
    dropped: dict[str, int]
    """Rows that pass 2 dropped, by reason."""
    found: dict[str, int]
    """Equal pictures among the others: see `Summary.cleaning`."""
    is_held_out: bool
    """True if we drew validation."""


def write_splits(
    work: Workspace,
    results: Sequence[PartResult],
    *,
    holdout: float,
    provenance: Mapping[str, Any],
    holds: Mapping[str, str],
    decide: Decide,
) -> Finished:
    """Put the parts together to splits in `work.finished`. What an earlier run finished there is kept.

    Args:
        decide: says which rows are kept.
        holds: what a split holds, in words, where the source says more than its name.

    Raises:
        UsageError: the table of a part is damaged.
        RunError: the disk does not keep what is written, or a part is gone.
    """
    plan = plan_of(work.parts, results, holdout=holdout, decide=decide)
    dropped, found = plan.fates.by_reason(), plan.fates.found
    shards = plan.shards()
    if not shards:
        return Finished({}, dropped, found, False)
    work.finished.mkdir(exist_ok=True)
    work.take_back()
    write_rejects(work.finished / REJECTS, plan)
    written = write_shards(work.finished, plan, shards)
    splits = {}
    for split in filter(written.__contains__, SPLITS):
        own = {**provenance, "holds": holds[split]} if split in holds else provenance
        card = write_card(work.finished / split, split, written[split], provenance=own)
        splits[split] = SplitSummary(
            card["num_samples"],
            card["num_bytes"],
            card["fingerprint"],
            num_shards=len(card["shards"]),
            distinct_captions=card["statistics"]["distinct_captions"],
            holds=holds.get(split),
        )
    is_retryable = any(reason in RETRYABLE for result in results for reason in result.reasons)
    if is_retryable:
        write_retry(work.finished / RETRY, plan, shards)
    _remove_others(work.finished, shards)
    return Finished(splits, dropped, found, plan.is_held_out())


def write_shards(folder: Path, plan: Plan, shards: Sequence[PlannedShard]) -> dict[str, WrittenSplit]:
    """Write the shards of all splits to `folder`, and remove each tar after the last shard that holds samples of it.

    Returns:
        What each split holds.

    Raises:
        RunError: the disk does not keep what is written, or a part is gone.
    """
    splits: dict[str, WrittenSplit] = {}
    last, tars = plan.last_uses(shards), plan.tables.tars
    _remove_all(tar for tar, number in zip(tars, last.tolist(), strict=True) if number < 0)
    with progress(sum(len(shard.rows) for shard in shards), "writing shards") as bar:
        for number, shard in enumerate(shards):
            (folder / shard.split).mkdir(parents=True, exist_ok=True)
            of_rows = [tars[part] for part in plan.tables.parts(shard.rows).tolist()]
            records = plan.tables.records(shard.rows)
            path = folder / shard.split / shard.name
            written = WrittenSplit.first(path, write_shard(path, of_rows, records))
            if shard.split in splits:
                splits[shard.split].add(written)
            else:
                splits[shard.split] = written
            _remove_all(tars[part] for part in (last == number).nonzero()[0].tolist())
            bar.advance(bar.task_ids[0], len(shard.rows))
    return splits


def _remove_all(tars: Iterable[Path]) -> None:
    for tar in tars:
        tar.unlink(missing_ok=True)


def _remove_others(finished: Path, shards: Sequence[PlannedShard]) -> None:
    """Remove what the finished folder holds beside rejects, what a retry needs, planned shards, and cards."""
    names = {shard.split: {"dataset.json", "sizes.json"} for shard in shards}
    for shard in shards:
        names[shard.split] |= {shard.name, Path(shard.name).with_suffix(".idx").name}
    for path in finished.iterdir():
        if path.name not in (REJECTS, RETRY, *names):
            remove(path)
        elif path.name in names:
            for inner in path.iterdir():
                if inner.name not in names[path.name]:
                    remove(inner)
