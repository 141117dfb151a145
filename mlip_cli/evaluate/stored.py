"""Results that are stored in the runs: zero-shot and retrieval. What lies in evals/ is read; only the rest is measured.

Torch is imported only where something is measured, so that stored results are shown at once.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from mlip_cli.errors import UsageError, interrupted_as
from mlip_cli.evaluate.datasets.benchmark import Benchmark
from mlip_cli.evaluate.datasets.pairs import PairData
from mlip_cli.evaluate.results import EvaluatedResult, ZeroshotResult
from mlip_cli.evaluate.retrieval_results import RetrievalResult
from mlip_cli.evaluate.wanted import FAILURES, VALIDATION, Failures
from mlip_cli.runs.find import find_checkpoint
from mlip_cli.runs.folder import Run, evaluation_precision, now
from mlip_cli.terminal.output import plural, say, warn

if TYPE_CHECKING:
    from mlip_cli.runs.loading import LoadedRun, MergedEncoder

Own = TypeVar("Own", bound=EvaluatedResult)

ANSWERS = ("right", "predicted", "picture_of_text")
"""Keys of results about single pictures and texts."""

PROTOCOL = 1
"""Raised when the same data and weights would give other numbers: results of other protocols are measured again."""


Encoders = Sequence[tuple["LoadedRun", "MergedEncoder"]]


@dataclass(frozen=True)
class Task:
    """What is measured on a data set."""

    name: str
    result: type[EvaluatedResult]
    scores: Callable[[Any, Encoders, int], list[dict[str, Any]]]
    """Data set, runs with their encoders, batch size -> the scores of each, as fields of the result. Imports torch."""
    prefix: str = ""
    """Of the names of its files: both tasks may use the same data."""


def _zeroshot_scores(benchmark: Benchmark, encoders: Encoders, batch_size: int) -> list[dict[str, Any]]:
    from mlip_cli.evaluate.evaluators import measure_runs

    return measure_runs(benchmark, encoders, batch_size=batch_size)


def _retrieval_scores(data: PairData, encoders: Encoders, batch_size: int) -> list[dict[str, Any]]:
    from mlip_cli.evaluate.retrieval_runs import measure_retrieval

    return measure_retrieval(data, encoders, batch_size=batch_size)


ZEROSHOT = Task("zeroshot", ZeroshotResult, _zeroshot_scores)
RETRIEVAL = Task("retrieval", RetrievalResult, _retrieval_scores, prefix="retrieval-")
TASKS = {task.name: task for task in (ZEROSHOT, RETRIEVAL)}
"""By the word of --task."""


@dataclass(frozen=True)
class EvaluatedCheckpoint:
    """A checkpoint to evaluate."""

    label: str
    """Unique among those of one call: the run's name, or its path, with the checkpoint unless it is the last."""
    run: Run
    folder: Path
    is_last: bool
    """Whether it is the run's newest."""
    sha256: str
    """Of its weights."""


@dataclass(frozen=True)
class Measurement:
    """A checkpoint at a merge rate on a data set."""

    checkpoint: EvaluatedCheckpoint
    benchmark: Benchmark
    merge_rate: float | None
    """None for the recipe's."""
    batch_size: int
    device: str
    task: Task = ZEROSHOT
    precision: str | None = None
    """As asked for; None: see `evaluation_precision`."""

    @property
    def identity(self) -> dict[str, Any]:
        """All that the numbers depend on. A stored result with the same identity is reused."""
        return {
            "protocol": PROTOCOL,
            "dataset": self.benchmark.name,
            "data_fingerprint": self.benchmark.fingerprint,
            "checkpoint": self.checkpoint.folder.name,
            "checkpoint_sha256": self.checkpoint.sha256,
            "merge_rate": self.merge_rate,
            "batch_size": self.batch_size,
            "device": self.device,
            **({} if self.precision is None else {"precision": self.precision}),
        }

    @property
    def path(self) -> Path:
        """Where the result lies in the run folder."""
        key = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:12]
        rate = "recipe_rate" if self.merge_rate is None else f"rate_{self.merge_rate:g}"
        name = re.sub(r"[^\w.-]+", "_", self.benchmark.name)
        return self.checkpoint.run.evals / f"{self.task.prefix}{name}-{self.checkpoint.folder.name}-{rate}-{key}.json"

    def stored(self) -> EvaluatedResult | None:
        """The result, if it was measured before and its file is whole."""
        if not self.path.is_file():
            return None
        try:
            result = self.task.result.read(self.path)
        except ValueError as error:
            warn(f"{self.path}: damaged ({error}); measured again")
            return None
        usual = evaluation_precision(self.checkpoint.run.read_recipe(), result.device_type)
        wanted = {"precision": usual, **self.identity}
        return result if all(getattr(result, key) == value for key, value in wanted.items()) else None


@dataclass(frozen=True)
class Measured(Generic[Own]):
    """The result of a checkpoint."""

    checkpoint: EvaluatedCheckpoint
    result: Own

    def to_json(self, first: "Measured[Own]") -> dict[str, Any]:
        """The result for --json: without the answers to single pictures, with tests against the first row."""
        value = {
            **{key: own for key, own in self.result.to_json().items() if key not in ANSWERS},
            "run": self.checkpoint.label,
            "run_folder": str(self.checkpoint.run.folder),
            "is_last_checkpoint": self.checkpoint.is_last,
        }
        if first is not self:
            value["compared_to_first"] = {
                "first": {"run": first.checkpoint.label, "merge_rate": first.result.merge_rate},
                **{name: vars(self.result.test_against(first.result, name)) for name in self.result.right},
            }
        return value


def find_checkpoints(targets: Sequence[str]) -> list[EvaluatedCheckpoint]:
    """The checkpoints that the targets name; the newest run's where there is no target.

    Raises:
        UsageError: a target names no checkpoint.
    """
    found = [find_checkpoint(target) for target in targets] or [find_checkpoint(None)]
    names = [run.folder.resolve().name for run in dict(found)]
    checkpoints = []
    for run, folder in found:
        label = run.folder.resolve().name
        if names.count(label) > 1:  # runs of one name in several folders
            label = str(run.folder)
        last = run.latest_checkpoint()
        is_last = last is not None and last.resolve() == folder.resolve()
        if not is_last:
            label = f"{label}/{folder.name}"
        weights = folder / "model.safetensors"
        if not weights.is_file():
            raise UsageError(
                f"{folder}: not a checkpoint (no {weights.name} inside); name a run folder or a checkpoint"
            )
        with open(weights, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        checkpoints.append(EvaluatedCheckpoint(label, run, folder, is_last, sha256))
    return checkpoints


def default_datasets(checkpoints: Sequence[EvaluatedCheckpoint], task: Task) -> list[str]:
    """The data sets that the recipes of the runs evaluate on; for retrieval their validation pairs.

    Raises:
        UsageError: the recipes name no data set.
    """
    if task is RETRIEVAL:
        return [VALIDATION]
    recipes = [checkpoint.run.read_recipe() for checkpoint in checkpoints]
    names = [name for recipe in recipes for name in recipe.evaluate.zeroshot]
    if not names:
        raise UsageError("no data set: the recipe's evaluate.zeroshot is empty; name one, as in --dataset openmoji")
    return names


@interrupted_as("interrupted; results of finished data sets are kept; repeat the command to continue")
def complete(rows: Mapping[str, Sequence[Measurement]]) -> tuple[dict[str, list[Measured[Any]]], Failures, list[str]]:
    """Results on each data set, stored or measured now; the errors of the other data sets; what could not be stored.

    Args:
        rows: the wanted results by data set.

    Raises:
        UsageError: a damaged checkpoint, or a merge rate that no plan reaches, before anything is measured.
    """
    stored = {row: row.stored() for own in rows.values() for row in own}
    found = {row: result for row, result in stored.items() if result is not None}
    missing = [row for row in stored if row not in found]
    if found:
        say(f"{plural(len(found), 'row')} measured before, in evals/ of the runs; to measure: {len(missing)}")
    loaded = _load(missing) if missing else {}
    failures: Failures = {}
    unstored: list[str] = []
    for dataset, own in rows.items():
        try:
            measured = _measure([row for row in own if row not in found], loaded)
        except FAILURES as error:
            failures[dataset] = error
            continue
        found |= measured
        unstored += [why for row, result in measured.items() if (why := result.why_unstored(row.path))]
    results = {
        dataset: [Measured(row.checkpoint, found[row]) for row in own]
        for dataset, own in rows.items()
        if dataset not in failures
    }
    return results, failures, unstored


def _load(rows: Sequence[Measurement]) -> dict[Path, "LoadedRun"]:
    """Load the models by checkpoint, and check all merge rates."""
    say("loading PyTorch and the weights")
    from mlip_cli.runs.loading import load_run

    loaded: dict[Path, LoadedRun] = {}
    for row in rows:
        folder = row.checkpoint.folder
        if folder not in loaded:
            loaded[folder] = load_run(str(folder), device=row.device, precision=row.precision)
        loaded[folder].at_rate(row.merge_rate)
    return loaded


def _measure(rows: Sequence[Measurement], loaded: Mapping[Path, "LoadedRun"]) -> dict[Measurement, EvaluatedResult]:
    """Measure rows of one data set side by side."""
    if not rows:
        return {}
    say(f"{rows[0].benchmark.words}: {plural(len(rows), 'row')} to measure, in turn on each batch")
    runs = [loaded[row.checkpoint.folder] for row in rows]
    encoders = [run.at_rate(row.merge_rate) for run, row in zip(runs, rows, strict=True)]
    measured_at = now()
    task = rows[0].task
    scores = task.scores(rows[0].benchmark, list(zip(runs, encoders, strict=True)), rows[0].batch_size)
    results = {}
    for row, run, encoder, scores_of_row in zip(rows, runs, encoders, scores, strict=True):
        results[row] = task.result.from_json(
            {
                "kind": task.result.KIND,
                **row.identity,
                "precision": run.precision,
                "step": run.step,
                "true_merge_rate": encoder.plan.rate,
                "merge_method": encoder.plan.method if encoder.plan.rate else None,
                "tokens": encoder.plan.tokens,
                "image_size": run.model.image_size,
                "device_type": run.device.type,
                "measured_at": measured_at,
                **scores_of_row,
            }
        )
    return results
