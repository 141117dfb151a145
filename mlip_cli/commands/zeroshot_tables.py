"""The results of `mlip eval-zeroshot` as tables for people. No torch: results may all come from files."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlip_cli.evaluate.statistics import MANY_CLASSES, paired
from mlip_cli.evaluate.words import percent
from mlip_cli.output import plural, print_lines, print_prose, print_table

Result = dict[str, Any]

INTERVALS = "in brackets: 95 % intervals"


def compared(results: Sequence[Result]) -> list[Result]:
    """Results on one data set, each but the first with its paired comparison to the first (McNemar's exact test)."""
    first, *others = results
    return [first, *({**other, "compared_to_first": _comparison(first, other)} for other in others)]


def _comparison(first: Result, other: Result) -> Result:
    return {
        "first": {"run": first["run"], "merge_rate": first["merge_rate"]},
        **{name: paired(first["right"][name], answers) for name, answers in other["right"].items()},
    }


def without_answers(result: Result) -> Result:
    """`result` without the line of single answers, which only its file needs."""
    return {key: value for key, value in result.items() if key not in ("right", "predicted", "mosaic")}


def print_results(groups: Sequence[Sequence[Result]], *, failed: Sequence[str]) -> None:
    """One table of all classification sets, and one a data set with names (openmoji). Each fits 80 columns.

    Runs are numbered where there are several, and named below: their names are longer than any of their numbers.
    """
    named = [group for group in groups if "names" in group[0]]
    plain = [group for group in groups if "names" not in group[0]]
    results = [result for group in groups for result in group]
    checkpoints = checkpoint_words(results)
    numbers = {run: number for number, run in enumerate(checkpoints, start=1)} if len(checkpoints) > 1 else {}
    for group in named:
        _print_named(group, numbers)
    if plain or failed:
        _print_plain(plain, numbers, failed=failed)
    for run, checkpoint in checkpoints.items():
        print_prose(f"run {numbers[run]}: {checkpoint}" if numbers else f"measured: {checkpoint}")
    for line in _speeds(results):
        print_prose(line)


def _print_named(group: Sequence[Result], numbers: Mapping[str, int]) -> None:
    first = group[0]
    names = first["names"]
    rows = [
        [
            *run_cell(result, numbers),
            merge_rate(result),
            score(result, "mean_per_class_recall"),
            score(result["names"], "r1"),
            score(result["names"], "r5"),
            f"{result['images_per_s']:,.0f}",
        ]
        for result in group
    ]
    print_table(
        (*run_column(numbers), "true rate", "group recall %", "name R@1 %", "name R@5 %", "images/s"),
        rows,
        title=f"{first['dataset']}: {plural(first['n'], 'picture')} of concepts that training did not see",
    )
    print_prose(
        f"chance: group recall {percent(first['chance'])} % ({plural(first['num_classes'], 'group')}), "
        f"name R@1 {percent(names['r1_chance'])} %, R@5 {percent(names['r5_chance'])} % "
        f"({plural(names['num_candidates'], 'name')}); {INTERVALS}"
    )
    print_lines("")


def _print_plain(groups: Sequence[Sequence[Result]], numbers: Mapping[str, int], *, failed: Sequence[str]) -> None:
    shows_top5 = any(_has_top5(first) for first, *_ in groups)
    rows: list[list[Any]] = [
        [
            result["dataset"],
            *run_cell(result, numbers),
            merge_rate(result),
            score(result, "acc1"),
            *([percent(result["acc5"]) if _has_top5(result) else None] if shows_top5 else []),
            percent(result["mean_per_class_recall"]),
            f"{result['images_per_s']:,.0f}",
        ]
        for group in groups
        for result in group
    ]
    top5 = ("top-5 %",) if shows_top5 else ()
    columns = ("data set", *run_column(numbers), "rate", "top-1 %", *top5, "recall %", "images/s")
    rows += [[name, *[None] * (len(columns) - 1)] for name in failed]
    print_table(columns, rows)
    for first, *_ in groups:
        print_prose(
            f"{first['dataset']}: {plural(first['n'], 'picture')}, {plural(first['num_classes'], 'class', 'classes')}, "
            f"chance {percent(first['chance'])} %"
            + (f", of top-5 {percent(min(1, 5 / first['num_classes']))} %" if _has_top5(first) else "")
        )
    for name in failed:
        print_prose(f"{name}: not evaluated")
    print_prose(f"rate: the true merge rate; recall: mean over the classes; {INTERVALS}")
    print_lines("")


def _has_top5(result: Result) -> bool:
    return result["num_classes"] >= MANY_CLASSES


def run_column(numbers: Mapping[str, int]) -> tuple[str, ...]:
    """The title of the column of runs, where there are several."""
    return ("run",) if numbers else ()


def run_cell(result: Result, numbers: Mapping[str, int]) -> list[int]:
    """The number of a result's run in that column."""
    return [numbers[result["run"]]] if numbers else []


def merge_rate(result: Result) -> str:
    """The true one."""
    return f"{result['true_merge_rate']:.3f}"


def score(scores: Result, name: str) -> str:
    """A fraction with its interval, in per cent: 31.6 (28.0-35.4)."""
    low, high = scores[f"{name}_interval"]
    return f"{percent(scores[name])} ({percent(low)}-{percent(high)})"


def checkpoint_words(results: Sequence[Result]) -> dict[str, str]:
    """What was measured: run -> its checkpoint in words."""
    which = {True: "last", False: "earlier"}
    return {
        result["run"]: f"{result['run']} at step {result['step']} ({which[result['is_last_checkpoint']]} checkpoint)"
        for result in results
    }


def _speeds(results: Sequence[Result]) -> list[str]:
    """A word of caution when speeds come from several calls, between which the machine may have had other work."""
    calls = {(result["dataset"], result["measured_at"]) for result in results}
    if len(calls) == len({dataset for dataset, _ in calls}):
        return []
    return ["images/s: some rows were measured in an earlier call, so compare speeds with care (measured_at in --json)"]
