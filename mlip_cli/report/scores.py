"""Zero-shot scores on the pages: of every checkpoint of a run, and of several runs side by side."""

from collections import Counter
from collections.abc import Sequence
from typing import Protocol, TypeVar

from mlip_cli.evaluate.results import PairedTest, ZeroshotResult
from mlip_cli.evaluate.statistics import paired
from mlip_cli.report.charts import ChartBar, bars_chart
from mlip_cli.report.page import Html, command, details, figure, note, section, tables
from mlip_cli.report.record import RunRecord
from mlip_cli.report.tables import PAIRED_TEST, Table
from mlip_cli.report.zeroshot_tables import ZeroshotRow, rate_words, zeroshot_tables
from mlip_cli.terminal.output import percent

CLASSES_SHOWN = 20
"""So many best and so many worst classes are shown where there are more than both together."""


class OfData(Protocol):
    """A result on one data set."""

    @property
    def data(self) -> tuple[str, str]:
        """The data set, and the fingerprint of its data."""


Own = TypeVar("Own", bound=OfData)


def by_data(results: Sequence[Own]) -> dict[str, list[Own]]:
    """Results by data set, in the order given; data that has changed since counts as another data set."""
    groups: dict[tuple[str, str], list[Own]] = {}
    for result in results:
        groups.setdefault(result.data, []).append(result)
    names = Counter(name for name, _ in groups)
    return {name if names[name] == 1 else f"{name} (data {print[:8]})": own for (name, print), own in groups.items()}


def scores_section(record: RunRecord) -> Html:
    """Scores at every checkpoint and rate, later steps first, and the recall by class of the newest checkpoint."""
    results = record.all_of(ZeroshotResult)
    parts: list[Html] = []
    if not results:
        names = record.recipe.evaluate.zeroshot if record.recipe is not None else ()
        dataset = "" if names else " --dataset NAME"
        parts.append(note("Not measured yet: ", command(f"mlip eval-zeroshot {record.place}{dataset}")))
    for name, own in by_data(results).items():
        last = {(result.step, result.true_merge_rate): result for result in own}.values()
        ordered = sorted(last, key=lambda result: (-result.step, result.true_merge_rate))
        parts += tables(zeroshot_tables(name, [ZeroshotRow(result, step=result.step) for result in ordered]))
        parts.append(_by_class(ordered[0]))
    return section("results", "Zero-shot", *parts)


def _by_class(result: ZeroshotResult) -> Html:
    """Recall of each class, or of the best and the worst where there are many."""
    classes = sorted(
        ((own.recall, own) for own in result.per_class if own.recall is not None),
        key=lambda pair: (-pair[0], pair[1].class_),
    )
    is_cut = len(classes) > 2 * CLASSES_SHOWN
    bars = [
        ChartBar(own.class_[:40], 100 * recall, f"{percent(recall)} % of {own.n:,}")
        for recall, own in ([*classes[:CLASSES_SHOWN], *classes[-CLASSES_SHOWN:]] if is_cut else classes)
    ]
    which = f": the {CLASSES_SHOWN} best and the {CLASSES_SHOWN} worst of {len(classes):,}" if is_cut else ""
    title = f"{result.dataset}: recall by class, step {result.step:,}, merge rate {rate_words(result)}"
    return details(
        f"Recall by class{which}", figure(bars_chart(title, bars, x_label="recall %").in_page(), kind="wide")
    )


def compared_scores(records: Sequence[RunRecord]) -> list[Html]:
    """Scores of each run's newest checkpoint, each tested against the first run's at the same merge rate."""
    run_of = {id(result): record.name for record in records for result in record.all_of(ZeroshotResult)}
    newest = [
        result
        for record in records
        for result in {  # in the order of their steps
            (*result.data, result.true_merge_rate): result for result in record.all_of(ZeroshotResult)
        }.values()
    ]
    return [
        part
        for name, own in by_data(newest).items()
        for part in tables(_compared(name, [(run_of[id(result)], result) for result in own]))
    ]


def _compared(dataset: str, results: Sequence[tuple[str, ZeroshotResult]]) -> list[Table]:
    """Rows by run and rate; the first run's stand first."""
    runs = list(dict.fromkeys(run for run, _ in results))
    reference = {result.true_merge_rate: result for run, result in results if run == runs[0]}
    rows = [
        ZeroshotRow(result, run, result.step, _tested(reference.get(result.true_merge_rate), result))
        for run, result in sorted(results, key=lambda pair: (runs.index(pair[0]), pair[1].true_merge_rate))
    ]
    won = f"won / lost: pictures that only this run / only {runs[0]} classifies correctly at the same merge rate"
    return zeroshot_tables(dataset, rows, notes=[f"{won}; {PAIRED_TEST}"])


def _tested(first: ZeroshotResult | None, result: ZeroshotResult) -> PairedTest | None:
    """Against the first run's result, on the same pictures."""
    if first is None or first is result:
        return None
    return PairedTest(**paired(first.right["acc1"], result.right["acc1"]))
