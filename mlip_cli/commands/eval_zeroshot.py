"""`mlip eval-zeroshot`: classification or retrieval by runs at merge rates. Only missing results are measured."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from mlip_cli.errors import RunError, UsageError
from mlip_cli.evaluate.datasets.find import find_benchmark
from mlip_cli.evaluate.datasets.pairs import find_pair_data
from mlip_cli.evaluate.stored import (
    RETRIEVAL,
    TASKS,
    ZEROSHOT,
    Measurement,
    complete,
    default_datasets,
    find_checkpoints,
)
from mlip_cli.evaluate.wanted import check_rates, find_wanted
from mlip_cli.report.retrieval import print_retrieval
from mlip_cli.report.scores import print_zeroshot
from mlip_cli.report.write import rebuild_if_older
from mlip_cli.terminal.output import plural, print_json, warn


def eval_zeroshot(
    runs: Sequence[str],
    *,
    task: str,
    datasets: Sequence[str],
    merge_rates: Sequence[float],
    data_root: Path | None,
    batch_size: int,
    device: str,
    precision: str | None = None,
    as_json: bool,
) -> None:
    """Measure what is not measured yet, and print all of it.

    Raises:
        UsageError: no such run or data set, or a merge rate that no plan reaches.
        RunError: some data sets could not be evaluated, or some results not stored; what there is is printed before.
    """
    asked = TASKS[task]
    named = find_wanted(datasets, root=data_root) if datasets and asked is ZEROSHOT else None
    if named is not None and not named.found:  # before weights of other programs are copied
        raise _one_error(named.failures)
    checkpoints = find_checkpoints(runs)
    names = list(dict.fromkeys(datasets or default_datasets(checkpoints, asked)))
    recipes = [checkpoint.run.read_recipe() for checkpoint in checkpoints]
    for recipe in recipes:
        check_rates(recipe, merge_rates)
    find = partial(find_pair_data, recipes=recipes) if asked is RETRIEVAL else find_benchmark
    wanted = named or find_wanted(names, root=data_root, find=find)
    rates: list[float | None] = list(dict.fromkeys(merge_rates)) or [None]
    rows = {
        benchmark.name: [
            Measurement(checkpoint, benchmark, rate, batch_size, device, asked, precision)
            for checkpoint in checkpoints
            for rate in rates
        ]
        for benchmark in wanted.found.values()
        if benchmark is not None
    }
    found, failures, unstored = complete(rows)
    failures = wanted.failures | failures
    if not found:
        raise _one_error(failures)
    results = {name: found[name] for name in names if name in found}
    if as_json:
        flat = [row.to_json(group[0]) for group in results.values() for row in group]
        print_json({"results": flat, "failed": [{"dataset": name, "error": str(e)} for name, e in failures.items()]})
    else:
        (print_retrieval if asked is RETRIEVAL else print_zeroshot)(results, failed=list(failures))
    if unstored:
        raise RunError("\n".join(unstored))
    for run in {own.run.folder.resolve(): own.run for own in checkpoints}.values():
        rebuild_if_older(run)
    if failures:
        for name, error in failures.items():
            warn(f"{name}: not evaluated: {str(error).removeprefix(f'{name}: ')}")
        raise RunError(
            f"{len(failures)} of {plural(len(names), 'data set')} could not be evaluated: {', '.join(failures)}"
        )


def _one_error(failures: Mapping[str, Exception]) -> Exception:
    """The error of a call that evaluated nothing: wrong usage if every failure is."""
    errors = list(failures.values())
    if len(errors) == 1:
        return errors[0]
    text = "\n".join(str(error) for error in errors)
    return UsageError(text) if all(isinstance(error, UsageError) for error in errors) else RunError(text)
