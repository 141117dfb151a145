"""The results of `mlip eval-zeroshot --task pointing` as tables for people. No torch: results may come from files."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlip_cli.evaluate.statistics import paired_by_cluster
from mlip_cli.report.tables import INTERVALS, checkpoint_words, merge_rate, run_cell, run_column, score
from mlip_cli.terminal.output import READINGS, percent, plural, print_lines, print_prose, print_table

Result = dict[str, Any]


def compared_pointing(results: Sequence[Result]) -> list[Result]:
    """Results on one data set, each but the first with its difference to the first on the same mosaics."""
    first, *others = results
    return [first, *({**other, "compared_to_first": _comparison(first, other)} for other in others)]


def _comparison(first: Result, other: Result) -> Result:
    mosaic_of = [int(number) for number in first["mosaic"].split()]
    return {
        "first": {"run": first["run"], "merge_rate": first["merge_rate"]},
        **{
            reading: paired_by_cluster(_numbers(first["right"][reading]), _numbers(shares), mosaic_of)
            for reading, shares in other["right"].items()
            if reading in first["right"]
        },
    }


def _numbers(line: str) -> list[float]:
    return [float(number) for number in line.split()]


def print_pointing(groups: Sequence[Sequence[Result]], *, failed: Sequence[str]) -> None:
    """One table a data set, a row a reading. Each fits 80 columns; runs are numbered where there are several."""
    checkpoints = checkpoint_words([result for group in groups for result in group])
    numbers = {run: number for number, run in enumerate(checkpoints, start=1)} if len(checkpoints) > 1 else {}
    for group in groups:
        _print_group(group, numbers)
    for name in failed:
        print_prose(f"{name}: not evaluated")
    for run, checkpoint in checkpoints.items():
        print_prose(f"run {numbers[run]}: {checkpoint}" if numbers else f"measured: {checkpoint}")


def _print_group(group: Sequence[Result], numbers: Mapping[str, int]) -> None:
    first = group[0]
    rows = [
        [
            *run_cell(result, numbers),
            merge_rate(result),
            words,
            score(result["pointing"][reading], "accuracy"),
            *([_difference(result, reading)] if len(group) > 1 else []),
        ]
        for result in group
        for reading, words in READINGS.items()
        if reading in result["pointing"]
    ]
    versus = ("against the first",) if len(group) > 1 else ()
    mosaics = plural(first["num_mosaics"], "mosaic")
    print_prose(f"{first['dataset']}: {plural(first['n'], 'picture')} in {mosaics} of 2 x 2")
    print_table((*run_column(numbers), "true rate", "patches by", "pointing %", *versus), rows)
    print_prose(
        f"pointing: names whose most similar patch lies in their own picture; chance {percent(first['chance'])} %; "
        f"{plural(first['num_names'], 'name')}; {INTERVALS}, by drawing mosaics again"
    )
    print_lines("")


def _difference(result: Result, reading: str) -> str | None:
    """+3.1 (-0.2-+6.4)"""
    own = result.get("compared_to_first", {}).get(reading)
    if own is None:
        return None
    low, high = own["difference_interval"]
    return f"{100 * own['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
