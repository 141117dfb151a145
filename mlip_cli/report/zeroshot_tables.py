"""Zero-shot results as tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlip_cli.evaluate.results import PairedTest, ZeroshotResult, ZeroshotScores
from mlip_cli.evaluate.statistics import MANY_CLASSES
from mlip_cli.evaluate.stored import Measured
from mlip_cli.report.tables import (
    VERSUS,
    Cell,
    Table,
    data_words,
    names_words,
    percent_cell,
    print_tables,
    recall_cell,
    versus_cells,
)
from mlip_cli.terminal.output import print_lines, print_prose


def rate_words(result: ZeroshotResult) -> str:
    """The true merge rate, and the one asked for where it is another."""
    true, asked = result.true_merge_rate, result.merge_rate
    return f"{true:.3f}" + (f" (asked {asked:g})" if asked and abs(asked - true) > 5e-4 else "")


@dataclass(frozen=True)
class ZeroshotRow:
    """A result, and what stands beside its scores."""

    result: ZeroshotResult
    run: str | int | None = None
    """Name or number of the run, where there are several."""
    step: int | None = None
    test: PairedTest | None = None
    """Against the first run at the same merge rate."""


def zeroshot_tables(dataset: str, rows: Sequence[ZeroshotRow], *, notes: Sequence[str] = ()) -> list[Table]:
    """Scores on one data set, with a row for each kind of feature.

    Top-5 where there are many classes, and recall of names where there are names, stand in a second table: each fits 80
    columns.
    """
    first = rows[0].result
    lines: list[list[Cell]] = []
    more: list[list[Cell]] = []
    several = any(len(_features(row.result)) > 1 for row in rows)
    for row in rows:
        step = None if row.step is None else f"{row.step:,}"
        for feature, own in _features(row.result).items():
            head = [row.run, step, rate_words(row.result), feature if several else None]
            beside: list[Cell] = [f"{row.result.images_per_s:,.0f}", *versus_cells(row.test)]
            lines.append(
                [
                    *head,
                    percent_cell(own.mean_per_class_recall, own.mean_per_class_recall_interval),
                    percent_cell(own.acc1, own.acc1_interval),
                    *(beside if own is row.result else [None] * len(beside)),
                ]
            )
            top5 = percent_cell(own.acc5, own.acc5_interval) if first.num_classes >= MANY_CLASSES else None
            more.append([*head, top5, recall_cell(own.names, 1), recall_cell(own.names, 5)])
    heads = ("run", "step", "true rate", "feature")
    columns = (*heads, "mean recall %", "top-1 %", "images/s", *VERSUS)
    tables = [Table(columns, lines, dataset, [data_words(first, first), *notes])]
    if first.names or first.num_classes >= MANY_CLASSES:
        titles = (*heads, "top-5 %", "name R@1 %", "name R@5 %")
        words = [names_words(first.names)] if first.names else []
        tables.append(Table(titles, more, f"{dataset}: more scores", words))
    return [table.without_empty_columns() for table in tables]


def _features(result: ZeroshotResult) -> dict[str, ZeroshotScores]:
    """The scores of each kind of feature, by its name."""
    found = {"spatial": result, "frequency": result.frequency, "sum": result.spatial_plus_frequency}
    return {name: scores for name, scores in found.items() if scores is not None}


def print_zeroshot(measured: Mapping[str, Sequence[Measured]], *, failed: Sequence[str]) -> None:
    """Print results by data set. Several checkpoints are numbered in the tables, and the lines below name them.

    Args:
        failed: data sets that could not be measured.
    """
    rows = [own for group in measured.values() for own in group]
    words = {}
    for own in rows:
        which = "last" if own.checkpoint.is_last else "earlier"
        words[own.checkpoint.label] = f"{own.checkpoint.label} at step {own.result.step} ({which} checkpoint)"
    numbers = {label: number for number, label in enumerate(words, start=1)} if len(words) > 1 else {}
    print_tables(
        table
        for dataset, group in measured.items()
        for table in zeroshot_tables(
            dataset, [ZeroshotRow(own.result, numbers.get(own.checkpoint.label)) for own in group]
        )
    )
    print_lines("")
    for dataset in failed:
        print_prose(f"{dataset}: not evaluated")
    for label, text in words.items():
        print_prose(f"run {numbers[label]}: {text}" if numbers else f"measured: {text}")
    if any(len({own.result.measured_at for own in group}) > 1 for group in measured.values()):
        print_prose(
            "images/s: some rows were measured in an earlier call, so compare speeds with care (measured_at in --json)"
        )
