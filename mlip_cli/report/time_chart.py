"""The main score of runs against the time of their training, from files alone."""

from collections.abc import Sequence

from mlip_cli.evaluate.results import ZeroshotResult
from mlip_cli.evaluate.statistics import metric_prefix
from mlip_cli.report.canvas import DASHES, MARKERS, MUTED, NUM_SERIES, SERIES, Chart, drawn, literal
from mlip_cli.report.costs import training_seconds
from mlip_cli.report.headlines import newest_zeroshot
from mlip_cli.report.record import RunRecord
from mlip_cli.report.tables import main_score

MEASURES = {"picture_r1": "picture_r1", "acc1": "mean_recall"}
"""Answers to single pictures -> the measure in metrics.jsonl that they belong to."""


def _results(record: RunRecord) -> list[ZeroshotResult]:
    """As training measures, at the recipe's merge rate, in the order of the recipe; data sets it lacks come last."""
    names = list(record.recipe.evaluate.zeroshot) if record.recipe is not None else []
    order = {name: number for number, name in enumerate(names)}
    return sorted(newest_zeroshot(record), key=lambda own: order.get(own.dataset, len(order)))


def time_chart(records: Sequence[RunRecord]) -> Chart | None:
    """The main score of the first shared data set against seconds of training; None where nothing was measured."""
    for result in _results(records[0]):
        score = main_score(result, chance=result.chance)
        key = f"{metric_prefix(result.dataset)}_{MEASURES[score.measure]}"
        curves = {record.name: _curve(record, key) for record in records}
        if not all(curves.values()):
            continue
        with drawn(
            f"{result.dataset}: {score.words} against training time",
            x_label="seconds of training, without evaluations",
            y_label=f"{score.words} %",
            size=(6.4, 3.6),
        ) as chart:
            for number, record in enumerate(records):
                seconds, values = zip(*curves[record.name], strict=True)
                own = next((own for own in _results(record) if own.data == result.data), None)
                _draw(chart, number, record.name, seconds, values, own)
            chart.axes.axhline(100 * score.chance, color=MUTED, linestyle=":", linewidth=1.2, label="chance")
            chart.axes.set_xlim(left=0)
            chart.axes.set_ylim(bottom=0)
            chart.legend(len(records) + 1)
        return chart
    return None


def _curve(record: RunRecord, key: str) -> list[tuple[float, float]]:
    """(seconds, score in per cent) of each evaluation, at the last logged step before it."""
    logged = list(training_seconds(record))
    curve = []
    for line in record.evaluations:
        before = [seconds for step, seconds in logged if step <= line["step"]]
        if line.get(key) is not None and before:
            curve.append((before[-1], 100 * line[key]))
    return curve


def _draw(
    chart: Chart,
    number: int,
    name: str,
    seconds: Sequence[float],
    values: Sequence[float],
    result: ZeroshotResult | None,
) -> None:
    """A curve, and the 95 % interval of the stored result at its end."""
    colour = SERIES[number % NUM_SERIES]
    chart.axes.plot(
        seconds,
        values,
        color=colour,
        linestyle=DASHES[number % len(DASHES)],
        marker=MARKERS[number % len(MARKERS)],
        markersize=4,
        label=literal(name),
    )
    if result is not None:
        low, high = main_score(result, chance=result.chance).interval
        chart.axes.vlines(seconds[-1], 100 * low, 100 * high, color=colour, linewidth=1.2)
