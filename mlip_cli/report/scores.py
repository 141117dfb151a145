"""Zero-shot scores: as tables on a terminal, and on the pages of a run and of several runs."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

from mlip_cli.evaluate.results import EvaluatedResult, PairedTest, ZeroshotResult, ZeroshotScores
from mlip_cli.evaluate.statistics import MANY_CLASSES
from mlip_cli.evaluate.stored import Measured
from mlip_cli.report.charts import ChartBar, bars_chart
from mlip_cli.report.headlines import by_recall, class_interval, far_apart, newest_zeroshot
from mlip_cli.report.page import Html, command, details, figure, note, section, tables
from mlip_cli.report.record import RunRecord
from mlip_cli.report.tables import (
    PAIRED_TEST,
    VERSUS,
    Cell,
    MainScore,
    Table,
    data_words,
    doubts,
    main_score,
    names_words,
    percent_cell,
    print_tables,
    recall_cell,
    versus_cells,
)
from mlip_cli.terminal.output import percent

CLASSES_SHOWN = 20
"""So many best and so many worst classes are shown where there are more than both together."""

HEADS = ("run", "step", "true rate", "precision", "feature")

Own = TypeVar("Own")
Evaluated = TypeVar("Evaluated", bound=EvaluatedResult)


def rate_words(result: EvaluatedResult) -> str:
    """The true merge rate, and the one asked for where it is another."""
    true, asked = result.true_merge_rate, result.merge_rate
    return f"{true:.3f}" + (f" (asked {asked:g})" if asked and abs(asked - true) > 5e-4 else "")


def setting(result: EvaluatedResult) -> tuple[float, str]:
    """The true merge rate and the precision: results of one setting are compared."""
    return result.true_merge_rate, result.precision


@dataclass(frozen=True)
class ZeroshotRow:
    """A result, and what stands beside its scores."""

    result: ZeroshotResult
    run: str | int | None = None
    """Name or number of the run, where there are several."""
    step: int | None = None
    test: PairedTest | None = None
    """Against the first run at the same merge rate and in the same precision."""


def zeroshot_tables(
    dataset: str, rows: Sequence[ZeroshotRow], *, notes: Sequence[str] = (), with_speed: bool = True
) -> list[Table]:
    """Scores on one data set, with a row for each kind of feature.

    Top-5 where there are many classes, and recall of names where there are names, stand in a second table: each fits 80
    columns.

    Args:
        with_speed: show images/s, which the pages take from merge-sweep and profile instead: these repeat their
            measurement.
    """
    results = [row.result for row in rows]
    first = results[0]
    if first.asks_names_alone:
        return _retrieval_tables(dataset, rows, notes=notes, with_speed=with_speed)
    lines: list[list[Cell]] = []
    more: list[list[Cell]] = []
    several = any(len(_features(row.result)) > 1 for row in rows)
    for row in rows:
        for feature, own in _features(row.result).items():
            head = _head(row, feature if several else None)
            lines.append(
                [
                    *head,
                    percent_cell(own.mean_per_class_recall, own.mean_per_class_recall_interval),
                    percent_cell(own.acc1, own.acc1_interval),
                    *_beside(row, own, with_speed=with_speed),
                ]
            )
            top5 = percent_cell(own.acc5, own.acc5_interval) if first.num_classes >= MANY_CLASSES else None
            more.append(
                [*head, top5, recall_cell(own.names, 1), recall_cell(own.names, 5), recall_cell(own.pictures, 5)]
            )
    columns = (*HEADS, "mean recall %", "top-1 %", "images/s", *VERSUS)
    words = [data_words(first, first), *doubts(first, results), *notes]
    tables = [Table(columns, lines, dataset, words)]
    if first.names or first.num_classes >= MANY_CLASSES:
        titles = (*HEADS, "top-5 %", "name R@1 %", "name R@5 %", "picture R@5 %")
        words = [names_words(first.names)] if first.names else []
        tables.append(Table(titles, more, f"{dataset}: more scores", words))
    return [table.without_empty_columns() for table in tables]


def _classes_words(group: Sequence[Measured[ZeroshotResult]], numbers: Mapping[str, int]) -> list[str]:
    """A line about the best and the worst class of each checkpoint, if its mean hides them, at its first rate."""
    lines = []
    for label, result in {own.checkpoint.label: own.result for own in reversed(group)}.items():
        if (apart := far_apart(result.per_class)) is not None:
            best, worst = (f"{own.class_} {percent(own.recall)} % of {own.n:,}" for own in apart)
            run = f"run {numbers[label]}, " if label in numbers else ""
            lines.append(f"recall by class ({run}rate {rate_words(result)}): from {worst} to {best}")
    return lines[::-1]


def _retrieval_tables(
    dataset: str, rows: Sequence[ZeroshotRow], *, notes: Sequence[str], with_speed: bool
) -> list[Table]:
    """Recalls both ways on a data set whose classes are the names of its pictures."""
    first = rows[0].result
    several = any(len(_features(row.result)) > 1 for row in rows)
    found = [(row, feature, own) for row in rows for feature, own in _features(row.result).items()]
    lines: dict[str, list[list[Cell]]] = {"text to image": [], "image to text": []}
    for row, feature, own in found:
        head = _head(row, feature if several else None)
        to_image, to_text = ([recall_cell(recalls, k) for k in (1, 5)] for recalls in (own.pictures, own.names))
        lines["text to image"].append([*head, *to_image, *_beside(row, own, with_speed=with_speed)])
        lines["image to text"].append([*head, *to_text])
    columns = (*HEADS, "R@1 %", "R@5 %", "images/s", *VERSUS)
    notes_of = {"text to image": [data_words(first, first), *notes], "image to text": []}
    tables = [Table(columns[: len(own[0])], own, f"{dataset}: {way}", notes_of[way]) for way, own in lines.items()]
    return [table.without_empty_columns() for table in tables]


def _head(row: ZeroshotRow, feature: str | None) -> list[Cell]:
    """Cells of the columns HEADS."""
    return [row.run, *step_cells(row.result, row.step), feature]


def step_cells(result: EvaluatedResult, step: int | None) -> list[Cell]:
    """Cells of the columns step, true rate and precision; a table without steps names precisions below it."""
    shown: list[Cell] = [None, rate_words(result), None]
    return shown if step is None else [f"{step:,}", rate_words(result), result.precision]


def _beside(row: ZeroshotRow, own: ZeroshotScores, *, with_speed: bool) -> list[Cell]:
    """Speed, if it is asked for, and paired test, which belong to the spatial feature."""
    speed = f"{row.result.images_per_s:,.0f}" if with_speed else None
    beside: list[Cell] = [speed, *versus_cells(row.test)]
    return beside if own is row.result else [None] * len(beside)


def _features(result: ZeroshotResult) -> dict[str, ZeroshotScores]:
    """The scores of each kind of feature, by its name."""
    found = {"spatial": result, "frequency": result.frequency, "sum": result.spatial_plus_frequency}
    return {name: scores for name, scores in found.items() if scores is not None}


def numbered(
    measured: Mapping[str, Sequence[Measured[Any]]], failed: Sequence[str]
) -> tuple[dict[str, int], list[str]]:
    """The number of each checkpoint by its label, if there are several, and lines that name them and what failed."""
    rows = [own for group in measured.values() for own in group]
    measured_of = {own.checkpoint.label: own for own in rows}
    words = {
        label: f"{label} at step {own.result.step} ({'last' if own.checkpoint.is_last else 'earlier'} checkpoint), in "
        f"{own.result.precision}"
        for label, own in measured_of.items()
    }
    numbers = {label: number for number, label in enumerate(words, start=1)} if len(words) > 1 else {}
    notes = [f"{dataset}: not evaluated" for dataset in failed]
    notes += [f"run {numbers[label]}: {text}" if numbers else f"measured: {text}" for label, text in words.items()]
    return numbers, notes


def print_zeroshot(measured: Mapping[str, Sequence[Measured[Any]]], *, failed: Sequence[str]) -> None:
    """Print results by data set. Several checkpoints are numbered in the tables, and the lines below name them.

    Args:
        failed: data sets that could not be measured.
    """
    numbers, notes = numbered(measured, failed)
    if any(len({own.result.measured_at for own in group}) > 1 for group in measured.values()):
        notes.append(
            "images/s: some rows were measured in an earlier call, so compare speeds with care (measured_at in --json)"
        )
    tables_of_sets = [
        zeroshot_tables(
            dataset,
            [ZeroshotRow(own.result, numbers.get(own.checkpoint.label)) for own in group],
            notes=_classes_words(group, numbers),
        )
        for dataset, group in measured.items()
    ]
    print_tables(chain.from_iterable(tables_of_sets), notes=notes)


def by_data(results: Iterable[tuple[tuple[str, str], Own]]) -> dict[str, list[Own]]:
    """Results by data set, in the order given; data that has changed since counts as another data set.

    Args:
        results: (data set, fingerprint of its data), and what belongs to it.
    """
    groups: dict[tuple[str, str], list[Own]] = {}
    for data, result in results:
        groups.setdefault(data, []).append(result)
    names = Counter(name for name, _ in groups)
    return {name if names[name] == 1 else f"{name} (data {print[:8]})": own for (name, print), own in groups.items()}


def newest_by_data(results: Iterable[Evaluated]) -> dict[str, list[Evaluated]]:
    """The last result of each checkpoint, rate and precision on each data set, later steps first."""
    found = {}
    for name, own in by_data((result.data, result) for result in results).items():
        last = {(result.step, *setting(result)): result for result in own}.values()
        found[name] = sorted(last, key=lambda result: (-result.step, result.true_merge_rate))
    return found


def beside_first(
    records: Sequence[RunRecord], kind: type[Evaluated]
) -> dict[str, list[tuple[str, Evaluated, Evaluated | None]]]:
    """Results of each run's newest checkpoint, by data set, the first run's first.

    Returns:
        (run, result, the first run's result at the same setting) of each.
    """
    newest = [
        (record.name, result)
        for record in records
        for result in {  # in the order of their steps
            (*result.data, *setting(result)): result for result in record.all_of(kind)
        }.values()
    ]
    found = {}
    for name, own in by_data((result.data, (run, result)) for run, result in newest).items():
        runs = list(dict.fromkeys(run for run, _ in own))
        reference = {setting(result): result for run, result in own if run == runs[0]}
        ordered = sorted(own, key=lambda pair: (runs.index(pair[0]), pair[1].true_merge_rate))
        found[name] = [(run, result, reference.get(setting(result))) for run, result in ordered]
    return found


def scores_section(record: RunRecord) -> Html:
    """Scores at every checkpoint and rate, later steps first, and recall by class at the recipe's merge rate."""
    results, headlines = record.all_of(ZeroshotResult), newest_zeroshot(record)
    parts: list[Html] = []
    if not results:
        names = record.recipe.evaluate.zeroshot if record.recipe is not None else ()
        dataset = "" if names else " --dataset NAME"
        parts.append(note("Not measured yet: ", command(f"mlip eval-zeroshot {record.place}{dataset}")))
    for name, ordered in newest_by_data(results).items():
        rows = [ZeroshotRow(result, step=result.step) for result in ordered]
        parts += tables(zeroshot_tables(name, rows, with_speed=False))
        shown = [own for own in ordered if not own.asks_names_alone and any(own is headline for headline in headlines)]
        parts += map(_by_class, shown)
    return section("results", "Zero-shot", *parts)


def _by_class(result: ZeroshotResult) -> Html:
    """Recall of each class, or of the best and the worst where there are many; unfolded where the mean hides them."""
    classes = by_recall(result.per_class)
    is_cut = len(classes) > 2 * CLASSES_SHOWN
    bars = [
        ChartBar(own.class_[:40], 100 * (own.recall or 0.0), f"{percent(own.recall)} % of {own.n:,}")
        for own in ([*classes[:CLASSES_SHOWN], *classes[-CLASSES_SHOWN:]] if is_cut else classes)
    ]
    which = f": the {CLASSES_SHOWN} best and the {CLASSES_SHOWN} worst of {len(classes):,}" if is_cut else ""
    title = f"{result.dataset}: recall by class, step {result.step:,}, merge rate {rate_words(result)}"
    chart = figure(bars_chart(title, bars, x_label="recall %").in_page(), kind="wide")
    return details(f"Recall by class{which}", chart, is_open=far_apart(result.per_class) is not None)


def compared_scores(records: Sequence[RunRecord]) -> list[Html]:
    """Scores of each run's newest checkpoint, each tested against the first run's at the same setting."""
    headlines = [result for record in records for result in newest_zeroshot(record)]
    parts = []
    for name, own in beside_first(records, ZeroshotResult).items():
        by_class = [(run, result) for run, result, _ in own if any(result is headline for headline in headlines)]
        parts += tables([*_compared(name, own), *_compared_classes(name, by_class)])
    return parts


def _compared(dataset: str, results: Sequence[tuple[str, ZeroshotResult, ZeroshotResult | None]]) -> list[Table]:
    """A row for each run and rate."""
    rows = [ZeroshotRow(result, run, result.step, _tested(first, result)) for run, result, first in results]
    run, result, _ = results[0]
    won = f"won / lost: {_main(result).won} this run alone / by {run} alone, at the same merge rate"
    return zeroshot_tables(dataset, rows, notes=[f"{won}; {PAIRED_TEST}"], with_speed=False)


def _compared_classes(dataset: str, results: Sequence[tuple[str, ZeroshotResult]]) -> list[Table]:
    """Recall of each class by each run, the first run's best first; none where no mean hides its classes."""
    if not any(far_apart(result.per_class) for _, result in results):
        return []
    recalls = [{own.class_: own for own in by_recall(result.per_class)} for _, result in results]
    names = list(recalls[0])
    if len(names) > 2 * CLASSES_SHOWN:
        names = [*names[:CLASSES_SHOWN], *names[-CLASSES_SHOWN:]]
    rows: list[list[Cell]] = []
    for name in names:
        found = [own.get(name) for own in recalls]
        cells = [None if own is None else percent_cell(own.recall, class_interval(own)) for own in found]
        rows.append([name, f"{recalls[0][name].n:,}", *cells])
    titles = [f"{run}, rate {result.true_merge_rate:.2f}: recall %" for run, result in results]
    return [Table(("class", "pictures", *titles), rows, f"{dataset}: recall by class")]


def _tested(first: ZeroshotResult | None, result: ZeroshotResult) -> PairedTest | None:
    """Against the first run's result, on the same pictures."""
    if first is None or first is result:
        return None
    measure = _main(result).measure
    return result.test_against(first, measure)


def _main(result: ZeroshotResult) -> MainScore:
    return main_score(result, chance=result.chance)
