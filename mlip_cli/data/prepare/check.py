"""Check what prepare-data wrote: `mlip prepare-data --check DIR`. All problems of all files are told.

Every byte is read: the sha256 of each tar, the checksum of each sample, the header of each picture. Pictures are not
decoded: what a checksum proves to be as it was written was decoded when it was written.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlip_cli.data.index import index_path
from mlip_cli.data.open import check_prepared
from mlip_cli.data.prepare.check_shard import CheckedShard, ShardToCheck, check_shard
from mlip_cli.data.prepare.summary import Summary
from mlip_cli.data.prepare.workers import run_parallel
from mlip_cli.data.prepare.workspace import DONE, OWN_FOLDER
from mlip_cli.data.sources.records import json_bytes
from mlip_cli.errors import UsageError
from mlip_cli.files import read_object
from mlip_cli.paths import escaped
from mlip_cli.terminal.output import plural
from mlip_cli.terminal.panel import progress

CARD, SIZES, REJECTS = "dataset.json", "sizes.json", "rejects.parquet"
SHARD_FIELDS = {"name": str, "n": int, "bytes": int, "sha256": str}


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file."""

    file: str
    """Relative to the folder that is checked."""
    what: str


@dataclass(frozen=True)
class Checked:
    """The outcome."""

    folder: str
    num_splits: int
    num_shards: int
    num_samples: int
    num_bytes: int
    problems: tuple[Problem, ...]
    """Empty: all is right."""


@dataclass(frozen=True)
class _Split:
    """The files of a split but for its shards, checked."""

    folder: Path
    card: Mapping[str, Any]
    """Empty if it is damaged."""
    shards: tuple[ShardToCheck, ...]
    problems: tuple[Problem, ...]


def check(folder: Path, *, num_workers: int) -> Checked:
    """Check prepared data: OUT with all its splits, or the folder of one split.

    Raises:
        UsageError: the folder does not hold prepared data.
    """
    is_split = (folder / CARD).is_file()
    summary, problems = (None, []) if is_split else _read_summary(folder)
    names = [""] if is_split else _split_names(folder, summary)
    splits = [_check_split(folder / name, name) for name in names]
    if summary is not None:
        problems += _summary_problems(folder, summary, dict(zip(names, splits, strict=True)))
    shards = [shard for split in splits for shard in split.shards]
    found: dict[Path, CheckedShard] = {}
    with progress(sum(shard.stated.get("n", 0) for shard in shards), "checking") as bar:
        for checked in run_parallel(check_shard, shards, num_workers=max(1, min(num_workers, len(shards)))):
            found[checked.shard.tar] = checked
            bar.advance(bar.task_ids[0], checked.shard.stated.get("n", 0))
    for split in splits:
        own = [found[shard.tar] for shard in split.shards]
        problems += split.problems
        problems += _shard_problems(folder, own)
    return Checked(
        str(folder),
        len(splits),
        len(shards),
        sum(own.num_samples for own in found.values()),
        sum(own.num_bytes for own in found.values()),
        tuple(problems),
    )


def _read_summary(folder: Path) -> tuple[Summary | None, list[Problem]]:
    """prepared.json of OUT, and its problem.

    Raises:
        UsageError: neither it nor a split is there.
    """
    if (folder / DONE).is_file():
        try:
            return Summary.read(folder / DONE), []
        except UsageError:
            return None, [Problem(DONE, "damaged: mlip prepare-data did not write it")]
    if not folder.exists():
        raise UsageError(f"--check {folder}: no such folder; name what mlip prepare-data wrote, OUT or one split of it")
    if (folder / OWN_FOLDER).is_dir():
        raise UsageError(f"{folder}: half prepared; run its mlip prepare-data again, which goes on")
    if not any(folder.glob(f"*/{CARD}")):
        check_prepared(folder)  # raises: it says what the folder is
    return None, [Problem(DONE, "missing")]


def _split_names(folder: Path, summary: Summary | None) -> list[str]:
    """The splits that prepared.json names, and those that are there."""
    stated = [name for name in (summary.splits if summary else ()) if _is_plain(name)]
    there = sorted(path.parent.name for path in folder.glob(f"*/{CARD}"))
    return list(dict.fromkeys([*stated, *there]))


def _summary_problems(folder: Path, summary: Summary, splits: Mapping[str, _Split]) -> Iterator[Problem]:
    """Where prepared.json, the cards of the splits and rejects.parquet differ."""
    for name, split in splits.items():
        if name not in summary.splits:
            yield Problem(name, f"a split that {DONE} does not name")
        elif split.card:
            own, card = summary.splits[name], split.card
            there = {"num_samples": own.num_samples, "num_bytes": own.num_bytes, "fingerprint": own.fingerprint}
            for key, value in there.items():
                if card.get(key) != value:
                    yield Problem(DONE, f"{key} of {name} is {value} where {name}/{CARD} says {card.get(key)}")
            if own.num_shards != len(split.shards):
                yield Problem(DONE, f"{own.num_shards} shards of {name} where {name}/{CARD} names {len(split.shards)}")
    num_samples = sum(own.num_samples for own in summary.splits.values())
    if num_samples + summary.rejects != summary.pictures:
        counts = f"{summary.pictures} pictures in, but {num_samples} samples, {summary.rejects} rejects out"
        yield Problem(DONE, counts)
    if sum(summary.reasons.values()) != summary.rejects:
        yield Problem(DONE, f"{summary.rejects} rejects, but {sum(summary.reasons.values())} by their reasons")
    rows = _num_rejects(folder / REJECTS)
    if isinstance(rows, str):
        yield Problem(REJECTS, rows)
    elif rows != summary.rejects:
        yield Problem(REJECTS, f"{plural(rows, 'row')} where {DONE} says {plural(summary.rejects, 'reject')}")
    for path in sorted(folder.glob("*.tar")):
        yield Problem(escaped(path.name), "does not belong here: shards lie in the folders of splits")


def _num_rejects(path: Path) -> int | str:
    """The rows of rejects.parquet, or what is wrong with it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        return "missing"
    try:
        with pq.ParquetFile(path) as file:
            rows = sum(batch.num_rows for batch in file.iter_batches())
    except (pa.ArrowException, OSError) as error:
        return f"damaged: {str(error).splitlines()[0]}"
    return rows


def _check_split(folder: Path, name: str) -> _Split:
    """Check dataset.json, sizes.json, and that no other tars lie beside the shards.

    Args:
        name: of the split in OUT, or empty.
    """

    def problem(file: str, what: str) -> Problem:
        return Problem(f"{name}/{file}" if name else file, what)

    def object_of(file: str) -> tuple[dict[str, Any], list[Problem]]:
        try:
            return read_object(folder / file), []
        except (FileNotFoundError, NotADirectoryError):
            return {}, [problem(file, "missing")]
        except (ValueError, OSError) as error:
            return {}, [problem(file, f"damaged ({error})")]

    card, problems = object_of(CARD)
    shards = _shards(card)
    if card and shards is None:
        card = {}
        problems.append(problem(CARD, "damaged: it does not describe shards"))
    problems += [problem(CARD, what) for what in _card_faults(card)]
    if shards is None:  # those that are there are checked by their indexes
        shards = [{"name": path.name} for path in sorted(folder.glob("*.tar"))]
    sizes, of_sizes = object_of(SIZES)
    if not of_sizes and card and sizes != {shard["name"]: shard["n"] for shard in shards}:
        of_sizes = [problem(SIZES, f"its samples of each shard are not those of {CARD}")]
    names = {shard["name"] for shard in shards} | {index_path(Path(shard["name"])).name for shard in shards}
    others = sorted(path.name for path in folder.glob("*") if path.suffix in (".tar", ".idx"))
    foreign = [
        problem(escaped(file), f"does not belong here: {CARD} does not name it") for file in others if file not in names
    ]
    tasks = tuple(ShardToCheck(folder, shard) for shard in shards)
    return _Split(folder, card, tasks, (*problems, *of_sizes, *foreign))


def _shards(card: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The shards of a dataset.json; None if it does not describe them."""
    with suppress(KeyError, TypeError):
        shards = card["shards"]
        if all(type(shard[key]) is kind for shard in shards for key, kind in SHARD_FIELDS.items()) and all(
            _is_plain(shard["name"]) for shard in shards
        ):
            return list(shards)
    return None


def _is_plain(name: str) -> bool:
    """Whether a name stays in its folder."""
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name


def _card_faults(card: Mapping[str, Any]) -> Iterator[str]:
    """Numbers of a dataset.json that contradict each other."""
    if not card:
        return
    shards = card["shards"]
    for key, own in {"num_samples": "n", "num_bytes": "bytes"}.items():
        total = sum(shard[own] for shard in shards)
        if card.get(key) != total:
            yield f"{key} is {card.get(key)}, but its shards have {total}"
    if card.get("fingerprint") != hashlib.sha256(json_bytes(shards)).hexdigest():
        yield "its fingerprint is not that of its shards: what it says of them was changed"


def _shard_problems(folder: Path, checked: list[CheckedShard]) -> Iterator[Problem]:
    """The problems of the shards of a split. A shard that holds another one's bytes is said to, and no more."""
    named = {own.shard.stated.get("sha256"): own.shard.tar.name for own in checked}
    for own in checked:
        tar = str(own.shard.tar.relative_to(folder))
        yield from (Problem(str(Path(tar).with_suffix(".idx")), what) for what in own.of_index)
        other = named.get(own.sha256, own.shard.tar.name)
        if own.sha256 is not None and other != own.shard.tar.name:
            yield Problem(tar, f"holds the bytes of {other}")
        else:
            yield from (Problem(tar, what) for what in (*own.of_tar, *own.of_samples))
