"""The results of `mlip eval-zeroshot` as tables for people. No torch: results may all come from files."""

from collections.abc import Sequence
from typing import Any

from mlip_cli.evaluate.statistics import paired
from mlip_cli.output import print_lines, print_table

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
    return {key: value for key, value in result.items() if key not in ("right", "predicted")}


def print_results(groups: Sequence[Sequence[Result]], *, failed: Sequence[str]) -> None:
    """One table of all classification sets, and one a data set with names (openmoji)."""
    named = [group for group in groups if "names" in group[0]]
    plain = [group for group in groups if "names" not in group[0]]
    for group in named:
        _print_named(group)
    if plain or failed:
        _print_plain(plain, failed=failed)
    results = [result for group in groups for result in group]
    print_lines("\n".join([_checkpoints(results), *_speeds(results)]))


def _print_named(group: Sequence[Result]) -> None:
    first = group[0]
    print_table(
        ("run", "rate", "group recall %", "name R@1 %", "name R@5 %", "n", "chance %", "images/s"),
        [
            (
                result["run"],
                _rate(result),
                score(result, "mean_per_class_recall"),
                score(result["names"], "r1"),
                score(result["names"], "r5"),
                result["n"],
                percent(result["chance"]),
                f"{result['images_per_s']:,.0f}",
            )
            for result in group
        ],
        title=f"{first['dataset']}: {first['n']} pictures of concepts that training did not see",
    )
    names = first["names"]
    print_lines(
        f"chance: group recall {percent(first['chance'])} % ({first['num_classes']} groups), "
        f"name R@1 {percent(names['r1_chance'])} %, R@5 {percent(names['r5_chance'])} % "
        f"({names['num_candidates']} names); {INTERVALS}"
    )
    print_lines("")


def _print_plain(groups: Sequence[Sequence[Result]], *, failed: Sequence[str]) -> None:
    rows: list[tuple[Any, ...]] = [
        (
            result["run"],
            result["dataset"],
            _rate(result),
            score(result, "acc1"),
            percent(result["acc5"]),
            percent(result["mean_per_class_recall"]),
            result["n"],
            percent(result["chance"]),
            f"{result['images_per_s']:,.0f}",
        )
        for group in groups
        for result in group
    ]
    rows += [("not evaluated", name, *[None] * 7) for name in failed]
    print_table(("run", "dataset", "rate", "acc1 %", "acc5 %", "recall %", "n", "chance %", "images/s"), rows)
    print_lines(f"recall: mean over the classes; {INTERVALS}")
    print_lines("")


def _rate(result: Result) -> str:
    rate = result["true_merge_rate"] if result["merge_rate"] is None else result["merge_rate"]
    return f"{rate:.2g}"


def percent(share: float | None) -> str | None:
    """0.316 -> 31.6"""
    return None if share is None else f"{100 * share:.1f}"


def score(scores: Result, name: str) -> str:
    """A fraction with its interval, in per cent: 31.6 (28.0-35.4)."""
    low, high = scores[f"{name}_interval"]
    return f"{percent(scores[name])} ({percent(low)}-{percent(high)})"


def _checkpoints(results: Sequence[Result]) -> str:
    """What was measured: the checkpoint of each run."""
    steps = {(result["run"], result["step"], result["is_last_checkpoint"]): None for result in results}
    which = {True: "last", False: "earlier"}
    return "measured: " + ", ".join(f"{run} at step {step} ({which[last]} checkpoint)" for run, step, last in steps)


def _speeds(results: Sequence[Result]) -> list[str]:
    """A word of caution when speeds come from several calls, between which the machine may have had other work."""
    calls = {(result["dataset"], result["measured_at"]) for result in results}
    if len(calls) == len({dataset for dataset, _ in calls}):
        return []
    return ["images/s: some rows were measured in an earlier call, so compare speeds with care (measured_at in --json)"]
