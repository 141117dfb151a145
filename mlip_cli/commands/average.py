"""`mlip average`: averages of the weights of runs, measured on data sets; one of them is written as a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlip_cli.errors import RunError, UsageError, interrupted_as
from mlip_cli.evaluate.average_results import AverageResult, Coefficients, alone, best_point, path_point, soup
from mlip_cli.evaluate.stored import EvaluatedCheckpoint, find_checkpoints
from mlip_cli.evaluate.stored_averages import Averages, check_same_form
from mlip_cli.evaluate.wanted import VALIDATION, WantedData, find_wanted, wanted_names
from mlip_cli.paths import check_can_be_made
from mlip_cli.report.average import average_json, print_average
from mlip_cli.report.write import rebuild
from mlip_cli.runs.folder import Run
from mlip_cli.terminal.output import plural, print_json, say

HALF = 0.5
"""The weight of the tuned run that Wortsman et al. (CVPR 2022) recommend where nothing else is known."""

BEST = "best:"

DEFAULT_WEIGHTS = tuple(number / 10 for number in range(11))


@dataclass(frozen=True)
class Wanted:
    """What is asked for, checked before torch is loaded."""

    checkpoints: Sequence[EvaluatedCheckpoint]
    points: list[Coefficients]
    """To measure and to show: each run alone is among them."""
    data: WantedData
    choose: str | None
    """`--choose`, as typed."""
    out: Path | None


def average(
    targets: Sequence[str],
    *,
    weights: Sequence[float] | None,
    datasets: Sequence[str],
    choose: str | None,
    out: Path | None,
    data_root: Path | None,
    batch_size: int,
    device: str,
    precision: str | None = None,
    as_json: bool,
) -> None:
    """Measure what is not measured yet, print all of it, and write the chosen average.

    Raises:
        UsageError: before torch is loaded: no such run or data set, runs of two architectures, or a wrong choice;
            later, weights that have no average.
        RunError: some data sets could not be measured, or the result not stored; what there is is printed before.
    """
    wanted = check_average(targets, weights=weights, datasets=datasets, choose=choose, out=out, data_root=data_root)
    averages = Averages(wanted.checkpoints, wanted.points, batch_size=batch_size, device=device, precision=precision)
    with interrupted_as("interrupted; what finished data sets gave is kept; repeat the command to continue"):
        shown, failures, unstored = averages.measured(wanted.data)
        if failures and not shown.datasets:
            raise next(iter(failures.values()))
        chosen = _chosen(wanted, shown)
        if chosen is not None and wanted.out is not None:
            averages.write(chosen, wanted.out, beside=shown)
    if as_json:
        print_json(average_json(shown, chosen=chosen, out=wanted.out, failures=failures))
    else:
        print_average(shown, failures=failures)
    if wanted.out is not None and chosen is not None:
        rebuild(Run(wanted.out))
        name = f"weight {shown.name_of(chosen)}" if shown.is_path else shown.name_of(chosen)
        say(f"{name}: written to {wanted.out}{_doubt(choose)}")
    if unstored:
        raise RunError(unstored)
    rebuild(wanted.checkpoints[-1].run)
    if failures:
        reasons = "; ".join(str(error) for error in failures.values())
        all_sets = plural(len(wanted.data.found) + len(wanted.data.failures), "data set")
        raise RunError(f"{len(failures)} of {all_sets} could not be measured: {reasons}")


def check_average(
    targets: Sequence[str],
    *,
    weights: Sequence[float] | None,
    datasets: Sequence[str],
    choose: str | None,
    out: Path | None,
    data_root: Path | None,
) -> Wanted:
    """What is asked for. Nothing here loads torch; raises as `average`."""
    if len(targets) < 2:
        raise UsageError("average: name two runs or more, the start first: mlip average START TUNED")
    checkpoints = find_checkpoints(targets)
    hashes = [own.sha256 for own in checkpoints]
    for number, own in enumerate(checkpoints):
        if own.sha256 in hashes[:number]:
            first = checkpoints[hashes.index(own.sha256)].label
            raise UsageError(f"{own.label}: the same weights as {first}; name each run once")
    if out is not None and out.exists():
        raise UsageError(f"--out {out}: exists already; name another folder")
    if out is not None:
        check_can_be_made(out, option="--out")
    recipes = {str(own.run.folder): own.run.read_recipe() for own in checkpoints}
    check_same_form(recipes)
    last = recipes[str(checkpoints[-1].run.folder)]
    names = wanted_names(last, datasets)
    if last.data.validation is not None and VALIDATION not in names:
        say(f"not measured: {VALIDATION}, the pairs that training held out; add it with --dataset {VALIDATION}")
    if choose is None and out is not None and len(checkpoints) == 2:
        choose = f"{HALF:g}"
    points = wanted_points(len(checkpoints), weights=weights, choose=choose)
    check_choice(choose, names=names, out=out, is_path=len(checkpoints) == 2)
    if not names and out is None:
        raise UsageError("no data set: the recipe's evaluate.zeroshot is empty; name one, as in --dataset openmoji")
    data = find_wanted(names, root=data_root, own=VALIDATION)
    if names and not data.found:
        raise next(iter(data.failures.values()))
    return Wanted(checkpoints, points, data, choose, out)


def wanted_points(num_runs: int, *, weights: Sequence[float] | None, choose: str | None) -> list[Coefficients]:
    """The averages to measure, the first run alone first.

    Raises:
        UsageError: weights for more than two runs.
    """
    if num_runs > 2:
        if weights is not None:
            raise UsageError("--weights: is for two runs; three or more are averaged uniformly; leave it out")
        return [*alone(num_runs), soup(num_runs)]
    fraction = [] if choose is None or choose.startswith(BEST) else [_fraction(choose)]
    given = DEFAULT_WEIGHTS if weights is None else weights
    return [path_point(weight) for weight in sorted({0.0, 1.0, *given, *fraction})]


def _fraction(text: str) -> float:
    """The weight in `--choose`.

    Raises:
        UsageError: it is not a number from 0 to 1.
    """
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not 0 <= weight <= 1:
        raise UsageError(f"--choose {text}: not a weight from 0 to 1 and not best:DATASET")
    return weight


def check_choice(choose: str | None, *, names: Sequence[str], out: Path | None, is_path: bool) -> None:
    """Check `--choose` beside the other options.

    Raises:
        UsageError: it does not fit them.
    """
    if choose is None:
        return
    if out is None:
        raise UsageError(f"--choose {choose}: says which average --out writes; add --out RUN")
    if not is_path:
        raise UsageError(f"--choose {choose}: three or more runs have one average, the uniform one; leave it out")
    if choose.startswith(BEST) and choose.removeprefix(BEST) not in names:
        raise UsageError(f"--choose {choose}: not one of the data sets that are measured: {', '.join(names) or 'none'}")


def _chosen(wanted: Wanted, shown: AverageResult) -> Coefficients | None:
    """The average to write; None without `--out`.

    Raises:
        UsageError: the data set that chooses could not be measured.
    """
    if wanted.out is None:
        return None
    if len(wanted.checkpoints) > 2:
        return soup(len(wanted.checkpoints))
    assert wanted.choose is not None, "two runs, and no choice"
    if not wanted.choose.startswith(BEST):
        return path_point(_fraction(wanted.choose))
    dataset = wanted.choose.removeprefix(BEST)
    measured = [data for data in shown.datasets if data.dataset == dataset]
    if not measured:
        raise UsageError(f"--choose {wanted.choose}: {dataset} could not be measured; name a weight instead")
    return best_point(measured, wanted.points)


def _doubt(choose: str | None) -> str:
    """What must be said of a choice by a score."""
    if choose is None or not choose.startswith(BEST):
        return ""
    dataset = choose.removeprefix(BEST)
    return f"; it was chosen by {dataset}, so its score there is too good: measure it on other pictures"
