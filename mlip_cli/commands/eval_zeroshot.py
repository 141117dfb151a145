"""`mlip eval-zeroshot`: runs at merge rates on data sets. What is measured already is read from the runs' evals/."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlip_cli.errors import RunError, UsageError, interrupted_as
from mlip_cli.evaluate.datasets.find import Benchmark, data_root, find_benchmark
from mlip_cli.files import write_json
from mlip_cli.recipe.load import load_recipe
from mlip_cli.report.tables import compared, print_results, without_answers
from mlip_cli.report.write import rebuild_if_older
from mlip_cli.runs.folder import Run, find_checkpoint, now
from mlip_cli.terminal.output import plural, print_json, say, warn

if TYPE_CHECKING:
    from mlip_cli.runs.loading import LoadedRun


PROTOCOL = 1
"""Raised when the same data and weights would give other numbers: results of other protocols are measured again."""

NEEDED = frozenset(
    {"kind", "step", "true_merge_rate", "measured_at", "n", "chance", "right", "num_classes", "per_class"}
    | {"acc1", "acc1_interval", "acc5", "mean_per_class_recall", "mean_per_class_recall_interval", "images_per_s"}
)
"""Keys of a stored result that the tables and the run's page read."""


@dataclass(frozen=True)
class Subject:
    """A checkpoint that is evaluated."""

    label: str
    run: Run
    checkpoint: Path
    is_last: bool
    """Whether it is the run's newest."""
    sha256: str
    """Of its weights."""


@dataclass(frozen=True)
class Entry:
    """One row: a checkpoint at a merge rate on a data set."""

    subject: Subject
    benchmark: Benchmark
    identity: dict[str, Any]
    """What the numbers depend on. A stored result with the same identity is the result."""

    @property
    def path(self) -> Path:
        """Where the result lies in the run folder."""
        key = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:12]
        rate = self.identity["merge_rate"]
        name = re.sub(r"[^\w.-]+", "_", self.benchmark.name)
        return self.subject.run.evals / f"{name}-{self.subject.checkpoint.name}-{_shown(rate)}-{key}.json"

    def stored(self) -> dict[str, Any] | None:
        """The result, if it was measured already and its file is whole."""
        if not self.path.is_file():
            return None
        try:
            result = json.loads(self.path.read_bytes())
            lacks = sorted(NEEDED - result.keys()) if isinstance(result, dict) else ["JSON object in it"]
            why = f"no {lacks[0]}" if lacks else None
        except ValueError as error:
            why = str(error)
        if why:
            warn(f"{self.path}: damaged ({why}); measured again")
            return None
        return result if all(result.get(key) == value for key, value in self.identity.items()) else None


def eval_zeroshot(
    runs: Sequence[str],
    *,
    datasets: Sequence[str],
    merge_rates: Sequence[float],
    data_root: Path | None,
    batch_size: int,
    device: str,
    as_json: bool,
) -> None:
    """Measure what is not measured yet, and print all of it.

    Raises:
        UsageError: no such run or data set, or a merge rate that no plan reaches.
        RunError: some data sets could not be evaluated; the others are printed all the same.
    """
    subjects = find_subjects(runs)
    names = list(dict.fromkeys(datasets or _default_datasets(subjects)))
    benchmarks, failures = _find(names, data_root)
    rates: list[float | None] = list(dict.fromkeys(merge_rates)) or [None]
    rows = {
        benchmark.name: [
            Entry(subject, benchmark, _identity(benchmark, subject, rate, batch_size, device))
            for subject in subjects
            for rate in rates
        ]
        for benchmark in benchmarks
    }
    results, measuring_failures = _complete(rows, batch_size=batch_size, device=device)
    failures |= measuring_failures
    if not results:
        raise _as_one(failures)
    report = [compared(results[name]) for name in names if name in results]
    if as_json:
        flat = [without_answers(result) for group in report for result in group]
        failed = [{"dataset": name, "error": str(error)} for name, error in failures.items()]
        print_json({"results": flat, "failed": failed})
    else:
        print_results(report, failed=list(failures))
    for run in {subject.run.folder.resolve(): subject.run for subject in subjects}.values():
        rebuild_if_older(run)
    if failures:
        for name, error in failures.items():
            warn(f"{name}: not evaluated: {str(error).removeprefix(f'{name}: ')}")
        raise RunError(
            f"{len(failures)} of {plural(len(names), 'data set')} could not be evaluated: {', '.join(failures)}"
        )


def find_subjects(targets: Sequence[str]) -> list[Subject]:
    """The checkpoints that the targets name; the newest run's where none is named.

    Raises:
        UsageError: there is none.
    """
    subjects = []
    wanted: Sequence[str | None] = targets or [None]
    found = [find_checkpoint(target) for target in wanted]
    names = [run.folder.resolve().name for run in dict(found)]
    for run, checkpoint in found:
        label = run.folder.resolve().name
        if names.count(label) > 1:  # runs of one name in several folders
            label = str(run.folder)
        last = run.latest_checkpoint()
        is_last = last is not None and last.resolve() == checkpoint.resolve()
        if not is_last:
            label = f"{label}/{checkpoint.name}"
        subjects.append(Subject(label, run, checkpoint, is_last, _sha256(checkpoint / "model.safetensors")))
    return subjects


def _sha256(path: Path) -> str:
    if not path.is_file():
        folder = path.parent
        raise UsageError(f"{folder}: not a checkpoint (no {path.name} inside); name a run folder or a checkpoint")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _default_datasets(subjects: Sequence[Subject]) -> list[str]:
    """Those that the recipes of the runs measure.

    Raises:
        UsageError: none does.
    """
    recipes = [load_recipe(str(subject.run.recipe)).recipe for subject in subjects]
    names = [name for recipe in recipes for name in recipe.evaluate.zeroshot]
    if not names:
        raise UsageError("no data set: the recipe's evaluate.zeroshot is empty; name one, as in --dataset openmoji")
    return names


def _find(names: Sequence[str], root: Path | None) -> tuple[list[Benchmark], dict[str, Exception]]:
    benchmarks: list[Benchmark] = []
    failures: dict[str, Exception] = {}
    for name in names:
        try:
            benchmarks.append(find_benchmark(name, root=data_root(root)))
        except (UsageError, OSError) as error:
            failures[name] = error
    return benchmarks, failures


def _identity(
    benchmark: Benchmark, subject: Subject, rate: float | None, batch_size: int, device: str
) -> dict[str, Any]:
    return {
        "protocol": PROTOCOL,
        "dataset": benchmark.name,
        "data_fingerprint": benchmark.fingerprint,
        "checkpoint": subject.checkpoint.name,
        "checkpoint_sha256": subject.sha256,
        "merge_rate": rate,
        "batch_size": batch_size,
        "device": device,
    }


@interrupted_as("interrupted; results of finished data sets are kept, repeat the command to go on")
def _complete(
    rows: dict[str, list[Entry]], *, batch_size: int, device: str
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Exception]]:
    """Results of each data set, stored or measured now, and what went wrong with the others."""
    stored = {name: [entry.stored() for entry in entries] for name, entries in rows.items()}
    missing = {
        name: [entry for entry, result in zip(entries, stored[name], strict=True) if result is None]
        for name, entries in rows.items()
    }
    num_missing = sum(map(len, missing.values()))
    num_stored = sum(map(len, rows.values())) - num_missing
    if num_stored:
        say(f"measured already, in evals/ of the runs: {plural(num_stored, 'row')}; to measure: {num_missing}")
    loaded = _load([entry for entries in missing.values() for entry in entries], device)
    results: dict[str, list[dict[str, Any]]] = {}
    failures: dict[str, Exception] = {}
    for name, entries in rows.items():
        try:
            fresh = iter(_measure(missing[name], loaded, batch_size=batch_size) if missing[name] else ())
        except (UsageError, RunError, OSError) as error:
            failures[name] = error
            continue
        found = [result or next(fresh) for result in stored[name]]
        results[name] = [
            result
            | {
                "run": entry.subject.label,
                "run_folder": str(entry.subject.run.folder),
                "is_last_checkpoint": entry.subject.is_last,
            }
            for entry, result in zip(entries, found, strict=True)
        ]
    return results, failures


def _load(entries: Sequence[Entry], device: str) -> dict[Path, "LoadedRun"]:
    """The models that entries need, by checkpoint. Torch is imported here and not before.

    Raises:
        UsageError: a damaged checkpoint, or a merge rate that no plan reaches, before anything is measured.
    """
    if not entries:
        return {}
    say("loading PyTorch and the weights")
    from mlip_cli.runs.loading import at_rate, load_run

    loaded = {path: load_run(str(path), device=device) for path in dict.fromkeys(e.subject.checkpoint for e in entries)}
    for entry in entries:
        at_rate(loaded[entry.subject.checkpoint].model, entry.identity["merge_rate"])
    return loaded


def _measure(entries: Sequence[Entry], loaded: dict[Path, "LoadedRun"], *, batch_size: int) -> list[dict[str, Any]]:
    """Measure entries of one data set side by side and store each result in its run folder."""
    from mlip_cli.evaluate.evaluators import measure_runs
    from mlip_cli.runs.loading import at_rate

    say(f"{entries[0].benchmark.name}: {plural(len(entries), 'row')} to measure, in turn on each batch")
    by_checkpoint: dict[Path, list[Entry]] = {}
    for entry in entries:
        by_checkpoint.setdefault(entry.subject.checkpoint, []).append(entry)
    groups = list(by_checkpoint.values())
    runs = [
        (run, [at_rate(run.model, entry.identity["merge_rate"]) for entry in group])
        for group in groups
        for run in [loaded[group[0].subject.checkpoint]]
    ]
    measured_at = now()
    scores = measure_runs(entries[0].benchmark, runs, batch_size=batch_size)
    results: dict[int, dict[str, Any]] = {}
    for group, (run, encoders), group_scores in zip(groups, runs, scores, strict=True):
        for entry, encoder, own_scores in zip(group, encoders, group_scores, strict=True):
            result = {
                "kind": "zeroshot",
                **entry.identity,
                "step": run.step,
                "true_merge_rate": encoder.plan.rate,
                "merge_method": encoder.plan.method if encoder.plan.rate else None,
                "tokens": list(encoder.plan.tokens),
                "image_size": run.model.image_size,
                "device_type": run.device.type,
                "measured_at": measured_at,
                **own_scores,
            }
            entry.path.parent.mkdir(exist_ok=True)
            write_json(entry.path, result)
            results[id(entry)] = result
    return [results[id(entry)] for entry in entries]


def _shown(rate: float | None) -> str:
    return "recipe_rate" if rate is None else f"rate_{rate:g}"


def _as_one(failures: dict[str, Exception]) -> Exception:
    """What to raise when no data set could be evaluated: wrong usage if all of it is."""
    errors = list(failures.values())
    if len(errors) == 1:
        return errors[0]
    text = "\n".join(str(error) for error in errors)
    return UsageError(text) if all(isinstance(error, UsageError) for error in errors) else RunError(text)
