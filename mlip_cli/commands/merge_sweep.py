"""`mlip merge-sweep`: one checkpoint at several merge rates, its speed and its accuracy beside the unmerged model's."""

from collections.abc import Sequence
from pathlib import Path

from mlip_cli.data.open import check_there
from mlip_cli.errors import RunError, interrupted_as
from mlip_cli.evaluate.wanted import VALIDATION, WantedData, check_methods, check_rates, find_wanted, wanted_names
from mlip_cli.report.sweeps import print_sweep
from mlip_cli.report.write import rebuild
from mlip_cli.runs.find import find_checkpoint
from mlip_cli.terminal.output import plural, print_json, say


def merge_sweep(
    run: str | None,
    *,
    rates: Sequence[float],
    methods: Sequence[str],
    datasets: Sequence[str],
    data_root: Path | None,
    batch_size: int,
    rounds: int,
    num_pictures: int,
    device: str,
    precision: str | None = None,
    as_json: bool,
) -> None:
    """Measure all methods and rates, the unmerged model first. Print the result and write it to RUN/, with pictures.

    Raises:
        UsageError: before torch is loaded: a method is unknown, none of the named data sets is there, or no plan
            reaches a rate.
        RunError: the device has no memory for the batch; the result cannot be stored; or some data sets could not be
            measured. What there is is printed before.
    """
    check_methods(methods)
    with interrupted_as("interrupted; nothing was written"):
        checkpoint, wanted = check_sweep(run, rates=rates, methods=methods, datasets=datasets, data_root=data_root)
        say("loading PyTorch")
        from mlip_cli.evaluate.merge_pictures import write_merge_pictures
        from mlip_cli.evaluate.merge_points import sweep_points
        from mlip_cli.evaluate.sweep import measure_sweep, open_datasets
        from mlip_cli.runs.loading import load_run

        loaded = load_run(str(checkpoint), device=device, precision=precision)
        points = sweep_points(loaded, rates, methods)
        found, failures = open_datasets(loaded, wanted, batch_size=batch_size)
        if datasets and not found:
            raise next(iter(failures.values()))
        settings = plural(len(points) - 1, "setting")
        say(f"{loaded.label}, step {loaded.step}: {settings} beside rate 0, {plural(rounds, 'timed round')}")
        result = measure_sweep(loaded, points, found, failures, batch_size=batch_size, rounds=rounds)
    path = loaded.run.evals / result.file_name
    unstored = result.why_unstored(path)  # before printing: the reader of the pipe may have gone
    if as_json:
        print_json(result.to_json())
    else:
        print_sweep(result)
    if unstored:
        raise RunError(unstored)
    say(f"written to {path}")
    if num_pictures and len(points) > 1:
        write_merge_pictures(loaded, points, found, num_pictures=num_pictures)
    rebuild(loaded.run)
    if result.failed:
        reasons = "; ".join(failed.error for failed in result.failed)
        all_sets = plural(len(result.failed) + len(result.datasets), "data set")
        raise RunError(f"{len(result.failed)} of {all_sets} could not be measured: {reasons}")


def check_sweep(
    run: str | None, *, rates: Sequence[float], methods: Sequence[str], datasets: Sequence[str], data_root: Path | None
) -> tuple[Path, WantedData]:
    """The checkpoint to sweep, and its data sets. Nothing here loads torch; raises as `merge_sweep`."""
    own, checkpoint = find_checkpoint(run)
    recipe = own.read_recipe()
    check_rates(recipe, rates, methods)
    names = wanted_names(recipe, datasets)
    if not names:
        say("no scores: the recipe has no evaluate.zeroshot and no data.validation; name data sets with --dataset")
    wanted = find_wanted(names, root=data_root, own=VALIDATION)
    if datasets and not wanted.found:
        raise next(iter(wanted.failures.values()))
    if VALIDATION in datasets:
        for source in recipe.data.validation or ():
            check_there(source)
    return checkpoint, wanted
