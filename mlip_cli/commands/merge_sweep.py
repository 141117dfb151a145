"""`mlip merge-sweep`: one checkpoint at several merge rates, its speed and its accuracy beside the unmerged model's."""

from collections.abc import Sequence
from pathlib import Path

from mlip_cli.errors import RunError, interrupted_as
from mlip_cli.evaluate.merge_pictures import write_merge_pictures
from mlip_cli.evaluate.merge_points import check_methods, sweep_points
from mlip_cli.evaluate.sweep import find_datasets, measure_sweep
from mlip_cli.report.sweeps import print_sweep
from mlip_cli.report.write import rebuild
from mlip_cli.runs.loading import load_run
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
    as_json: bool,
) -> None:
    """Measure all methods and rates, the unmerged model first. Print the result and write it to RUN/, with pictures.

    Raises:
        UsageError: before anything is measured: a method is unknown, none of the named data sets is there, or no plan
            reaches a rate.
        RunError: the device has no memory for the batch; or some data sets could not be measured; the rest is printed
            and written all the same.
    """
    check_methods(methods)
    with interrupted_as("interrupted; nothing was written"):
        loaded = load_run(run, device=device)
        points = sweep_points(loaded, rates, methods)
        found, failures = find_datasets(loaded, datasets, root=data_root, batch_size=batch_size)
        settings = plural(len(points) - 1, "setting")
        say(f"{loaded.label}, step {loaded.step}: {settings} beside rate 0, {plural(rounds, 'timed round')}")
        result = measure_sweep(loaded, points, found, failures, batch_size=batch_size, rounds=rounds)
    path = loaded.run.evals / f"merge_sweep_{loaded.checkpoint.name}.json"
    result.write(path)  # before printing: the reader of the pipe may have gone
    if as_json:
        print_json(result.to_json())
    else:
        print_sweep(result)
    say(f"written to {path}")
    if num_pictures and len(points) > 1:
        write_merge_pictures(loaded, points, found, num_pictures=num_pictures)
    rebuild(loaded.run)
    if result.failed:
        reasons = "; ".join(failed.error for failed in result.failed)
        wanted = plural(len(result.failed) + len(result.datasets), "data set")
        raise RunError(f"{len(result.failed)} of {wanted} could not be measured: {reasons}")
