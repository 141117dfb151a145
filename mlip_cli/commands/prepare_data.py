"""`mlip prepare-data`: a source of pictures and captions to shards."""

import os
import shlex
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlip_cli import __version__
from mlip_cli.data.prepare.workspace import Workspace, finished_summary, opened
from mlip_cli.data.sources.find import DataSource, ReadOptions, count_records, find_source, read_records
from mlip_cli.data.sources.records import MAX_HELD_OUT, parts_of, printable
from mlip_cli.data.sources.tables import columns_in_words
from mlip_cli.errors import UsageError
from mlip_cli.recipe.config import Recipe
from mlip_cli.recipe.load import load_recipe
from mlip_cli.terminal.output import plural, print_json, print_table, say, say_to_copy, warn
from mlip_cli.terminal.panel import progress

DEFAULT_SIZE = {"openmoji": 64}
OTHER_SIZE = 256
"""Sources of photographs: 256 pixels leave room for a random crop of 224."""

FEW_HELD_OUT = 10
"""Fewer held-out samples are worth a warning."""

STEPS_AN_EPOCH = 8
"""Of the trainings proposed, at least."""

FEWEST_TO_TRAIN = 4 * STEPS_AN_EPOCH
"""Pairs for which a training is proposed: batches of four, at least."""

DEMO_FOLDER = Path("data/openmoji")
"""Where recipes/openmoji.yaml looks."""


def prepare_data(
    source: str,
    out: Path,
    *,
    format: str,
    size: int | None,
    holdout: float,
    limit: int | None,
    image_column: str | None,
    caption_column: str | None,
    skin_tones: bool,
    workers: int | None,
    as_json: bool,
) -> None:
    """Prepare `source` in `out`, or say that it is prepared; the summary goes to stdout.

    Raises:
        UsageError: no such source, columns that cannot be told, OUT is taken by something else.
        RunError: a damaged tar, a source of which most rows fail, a full disk, a killed worker.
    """
    for name in (source, str(out)):
        if printable(name) != name:
            raise UsageError(f"{printable(name)}: a name that is not UTF-8; rename it")
    found = find_source(source, format=format)
    if skin_tones and found.format != "openmoji":
        raise UsageError("--skin-tones: for the source openmoji only; leave it out")
    if (image_column or caption_column) and found.format != "metadata":
        raise UsageError(f"--image-column, --caption-column: for tables only, and {source} is read as {found.format}")
    size = size or DEFAULT_SIZE.get(found.format, OTHER_SIZE)
    read = ReadOptions(limit, image_column, caption_column, skin_tones)
    request = {
        "format": found.format,
        "size": size,
        "holdout": holdout,
        **vars(read),
        "source_fingerprint": found.fingerprint(),
    }
    summary = finished_summary(out, request)
    if summary is None:
        _check_apart(found, out)
        summary = _prepare(found, out, read, request, num_workers=workers or os.cpu_count() or 1)
    else:
        Workspace(out).discard()  # what a kill between the last two steps may have left
        summary |= {"out": str(out), "next": _next_commands(found.format, out, _samples(summary["splits"]))}
        say(f"{out}: prepared already, from the same files with the same options; nothing to do")
    _report(out, summary, as_json=as_json)


def _prepare(
    source: DataSource, out: Path, read: ReadOptions, request: dict[str, Any], *, num_workers: int
) -> dict[str, Any]:
    from mlip_cli.data.prepare.assemble import SourceError, check_disk, finish, interruptions_named, prepare_parts
    from mlip_cli.data.prepare.parts import PartOptions

    started = time.monotonic()
    with progress(None, "counting rows"):
        rows = count_records(source, read)
    say(f"{source.name}: {source.describe()}; {plural(rows, 'row')}")
    if source.format == "metadata":
        tables = source.tables()
        say(columns_in_words(source.root, tables, image_column=read.image_column, caption_column=read.caption_column))
    check_disk(out, rows=rows, size=request["size"], source_bytes=sum(file.size for file in source.files))
    provenance = _provenance(source, request)
    with interruptions_named(out), opened(out, request) as work:
        options = PartOptions(str(work.parts), request["size"], render=source.format == "openmoji")
        try:
            with progress(rows, "preparing") as bar:
                results = prepare_parts(
                    work,
                    parts_of(read_records(source, read)),
                    options,
                    num_rows=rows,
                    num_workers=num_workers,
                    advance=lambda n: bar.advance(bar.task_ids[0], n),
                )
            done = finish(work, results, holdout=request["holdout"], provenance=provenance)
        except SourceError as error:
            work.discard()
            raise SourceError(f"{source.name}: {error}; nothing was kept") from None
        reasons = sum((Counter(result.reasons) for result in results), Counter[str]())
        summary = {
            "out": str(out),
            "source": source.name,
            "request": request,
            "rows": rows,
            "rejects": sum(reasons.values()),
            "reasons": dict(reasons.most_common()),
            "splits": {
                split: {key: card[key] for key in ("num_samples", "num_bytes", "fingerprint")}
                | {"num_shards": len(card["shards"])}
                for split, card in done.cards.items()
            },
            "held_out": done.is_held_out,
            "attribution": provenance.get("attribution"),
            "seconds": round(time.monotonic() - started, 2),
            "next": _next_commands(source.format, out, _samples(done.cards)),
        }
        work.publish(summary)
    return summary


def _provenance(source: DataSource, request: dict[str, Any]) -> dict[str, Any]:
    provenance = {"tool": f"mlip-cli {__version__}", "source": source.name, **request}
    if source.format == "openmoji":
        from mlip_cli.data.sources.openmoji import attribution

        provenance |= {"packages": list(source.versions), **attribution()}
    return provenance


def _check_apart(source: DataSource, out: Path) -> None:
    """The output must not become part of the source."""
    if source.format == "openmoji" or not Path(source.name).is_dir():
        return
    if out.resolve().is_relative_to(source.root.resolve()):
        raise UsageError(f"{out}: lies inside the source {source.name}; name a folder elsewhere")


def _samples(splits: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    return {split: part["num_samples"] for split, part in splits.items()}


def _next_commands(format: str, out: Path, splits: Mapping[str, int]) -> dict[str, str]:
    """Trainings to go on with, by what they need; `splits` holds the samples of each. None for a few pictures."""
    if format == "openmoji" and out == DEMO_FOLDER:
        return {"no GPU": "mlip pretrain recipes/openmoji.yaml"}
    train = "train" if "train" in splits else next(iter(splits))
    if splits[train] < FEWEST_TO_TRAIN:
        return {}
    held_out = next((split for split in ("validation", "test") if split in splits and split != train), None)
    changes = [f"data.train={out / train}", f"data.validation={out / held_out if held_out else 'null'}"]
    recipes = {"no GPU": "openmoji"} if format == "openmoji" else {"no GPU": "laptop", "one GPU": "single_gpu"}
    return {
        need: shlex.join(["mlip", "pretrain", name, *changes, *_fitted(load_recipe(name).recipe, splits[train])])
        for need, name in recipes.items()
    }


def _fitted(recipe: Recipe, num_samples: int) -> list[str]:
    """Changes that give an epoch at least eight steps, and a warm-up of at most a tenth of all steps."""
    train = recipe.train
    batch_size = min(train.global_batch_size, 1 << ((num_samples // STEPS_AN_EPOCH).bit_length() - 1))
    steps = train.steps or (train.epochs or 0) * (num_samples // batch_size)
    changes = []
    if batch_size < train.global_batch_size:
        changes.append(f"train.global_batch_size={batch_size}")
    if train.given_micro_batch_size is not None and batch_size <= train.given_micro_batch_size:
        changes.append("train.micro_batch_size=null")
    if recipe.optim.warmup_steps > steps // 10:
        changes.append(f"optim.warmup_steps={max(1, steps // 10)}")
    return changes


def _report(out: Path, summary: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(summary)
    else:
        rows = [
            [split, part["num_samples"], part["num_shards"], f"{part['num_bytes'] / 2**20:.1f}"]
            for split, part in summary["splits"].items()
        ]
        print_table(["split", "samples", "shards", "MiB"], rows)
    request = summary["request"]
    if "validation" not in summary["splits"] and "test" not in summary["splits"] and request["holdout"]:
        warn(f"no picture was held out: {request['holdout']:.0%} of so few; say --holdout 0.2 for a validation split")
    num_samples = summary["rows"] - summary["rejects"]
    if summary["held_out"]:
        num_held_out = _samples(summary["splits"])["validation"]
        share = f"--holdout {request['holdout']:g}, at most {MAX_HELD_OUT:,}"
        say(
            f"validation/ is {num_held_out:,} of {plural(num_samples, 'sample')}, held out by the hash of the pixels "
            f"({share}); the source has no splits"
        )
        if num_held_out < FEW_HELD_OUT:
            warn(f"validation/ has {plural(num_held_out, 'sample')}, too few to measure by; say --holdout 0.2 for more")
    say(f"{plural(summary['rows'], 'row')}: {plural(num_samples, 'sample')}, {plural(summary['rejects'], 'reject')}")
    for reason, n in summary["reasons"].items():
        say(f"  {n:,} x {reason}")
    if summary["rejects"]:
        say(f"each reject with file, row and reason: {out / 'rejects.parquet'}")
    if summary["attribution"]:
        say(summary["attribution"])
    for need, command in summary["next"].items():
        say(f"next, with {need}:")
        say_to_copy(command)
    if not summary["next"]:
        warn(f"fewer than {FEWEST_TO_TRAIN} samples to train on: too few for a contrastive loss")
