"""Averages of weights: as tables, as JSON, and as charts of one data set against another on the pages."""

from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from mlip_cli.evaluate.average_results import AveragedData, AverageResult, Coefficients
from mlip_cli.evaluate.before_after import MEASURES, Change
from mlip_cli.evaluate.statistics import Interval
from mlip_cli.report.before_after import points_cell
from mlip_cli.report.canvas import Chart
from mlip_cli.report.charts import Dot, dots_chart
from mlip_cli.report.page import Html, figure, note, section, tables
from mlip_cli.report.record import RunRecord
from mlip_cli.report.tables import INTERVALS, PAIRED_TEST, Cell, Table, percent_cell, print_tables
from mlip_cli.runs.result_files import json_value
from mlip_cli.terminal.output import percent, plural

CHARTS = "average"
"""Beginning of the names of chart files."""

CAPTION = "Each dot is an average of the weights, from the start to the tuned run. Whiskers are 95 % intervals."
SOUP_CAPTION = "Each dot is a run, and the soup is the average of all. Whiskers are 95 % intervals."


def average_tables(result: AverageResult) -> list[Table]:
    """Scores of every average on each data set, beside the runs alone."""
    return [(_path_table if result.is_path else _soup_table)(result, data) for data in result.datasets]


def _path_table(result: AverageResult, data: AveragedData) -> Table:
    ends = result.ends
    rows: list[list[Cell]] = []
    for point in data.points:
        own = point.coefficients
        changes = [data.beside(own, end) for end in ends]
        score = percent_cell(changes[0].after, changes[0].after_interval)
        beside = [_beside(change) if own != end else [None] * 2 for change, end in zip(changes, ends, strict=True)]
        rows.append([result.name_of(own), score, *chain(*beside)])
    columns = ("weight", f"{MEASURES[data.measure]} %", "points beside 0", "p", "points beside 1", "p")
    return Table(columns, rows, data.dataset, _notes(data))


def _soup_table(result: AverageResult, data: AveragedData) -> Table:
    soup = next(own.coefficients for own in data.points if 1.0 not in own.coefficients)
    rows: list[list[Cell]] = []
    for point in data.points:
        own = point.coefficients
        change = data.beside(soup, own)
        beside = _beside(change) if own != soup else [None] * 2
        rows.append([result.name_of(own), percent_cell(change.before, change.before_interval), *beside])
    columns = ("run", f"{MEASURES[data.measure]} %", "the soup beside it, points", "p")
    return Table(columns, rows, data.dataset, _notes(data))


def _beside(change: Change) -> list[Cell]:
    return [points_cell(change), f"{change.test.p:.2g}"]


def _notes(data: AveragedData) -> list[str]:
    return [f"{plural(data.n, 'question')}: chance {percent(data.chance)} %; {INTERVALS}; {PAIRED_TEST}"]


def ingredients_words(result: AverageResult) -> list[str]:
    """What the weights of the tables are."""
    words = [own.words for own in result.ingredients]
    measured = f"measured in {result.precision}"
    if not result.is_path:
        return [f"soup: the mean of the weights of {', '.join(words[:-1])} and {words[-1]}", measured]
    return [f"weight w: (1 - w) times the weights of {words[0]} plus w times those of {words[1]}", measured]


def print_average(result: AverageResult, *, failures: Iterable[str]) -> None:
    """Print all tables."""
    print_tables(
        average_tables(result), notes=[*(f"{own}: not evaluated" for own in failures), *ingredients_words(result)]
    )


def average_json(
    result: AverageResult, *, chosen: Coefficients | None, out: Path | None, failures: Mapping[str, Exception]
) -> dict[str, Any]:
    """For --json: without the answers to single questions."""
    return {
        "runs": [json_value(own) for own in result.ingredients],
        "precision": result.precision,
        "datasets": [_data_json(result, data) for data in result.datasets],
        "failed": [{"dataset": name, "error": str(error)} for name, error in failures.items()],
        "chosen": None if chosen is None else list(chosen),
        "written": None if out is None else str(out),
    }


def _data_json(result: AverageResult, data: AveragedData) -> dict[str, Any]:
    runs = list(zip((own.run for own in result.ingredients), result.ends, strict=True))
    points = []
    for point in data.points:
        changes = {run: data.beside(point.coefficients, end) for run, end in runs}
        first = next(iter(changes.values()))
        points.append(
            {
                "coefficients": list(point.coefficients),
                "value": first.after,
                "interval": list(first.after_interval),
                "beside": {
                    run: {**json_value(change.test), "interval": list(change.interval), "is_shown": change.is_shown}
                    for (run, end), change in zip(runs, changes.values(), strict=True)
                    if end != point.coefficients
                },
            }
        )
    return {
        "dataset": data.dataset,
        "data_fingerprint": data.fingerprint,
        "measure": data.measure,
        "n": data.n,
        "chance": data.chance,
        "points": points,
    }


def average_charts(record: RunRecord) -> dict[str, Chart]:
    """Charts that are written as files too, by name: each data set against the first, of every result."""
    charts = list(chain.from_iterable(map(_charts, record.all_of(AverageResult))))
    return {CHARTS if number == 1 else f"{CHARTS}_{number}": chart for number, chart in enumerate(charts, start=1)}


def _charts(result: AverageResult) -> list[Chart]:
    if not result.datasets:
        return []
    first, *others = result.datasets
    return [_chart(result, first, other) for other in others if other.dataset != first.dataset]


def _chart(result: AverageResult, across: AveragedData, up: AveragedData) -> Chart:
    """The averages that both data sets have, by their scores on them."""
    named = {own.coefficients for own in up.points}
    dots: dict[str, list[Dot]] = {}
    for point in across.points:
        if point.coefficients not in named:
            continue
        x, y = (data.beside(point.coefficients, point.coefficients) for data in (across, up))
        name = result.name_of(point.coefficients)
        dot = Dot(name, 100 * x.after, _percents(x.after_interval), 100 * y.after, _percents(y.after_interval))
        series = " to ".join(own.run for own in result.ingredients) if result.is_path else name
        dots.setdefault(series, []).append(dot)
    return dots_chart(
        f"averages: {up.words}",
        dots,
        x_label=f"{across.words} %",
        y_label=f"{MEASURES[up.measure]} %",
        chance=100 * up.chance,
    )


def _percents(interval: Interval) -> tuple[float, float]:
    return 100 * interval.low, 100 * interval.high


def average_sections(record: RunRecord, charts: Mapping[str, Chart]) -> list[Html]:
    """The section of a page; none for a run that was not averaged. `charts` are those of `average_charts`."""
    results = record.all_of(AverageResult)
    if not results:
        return []
    drawn = [chart for name, chart in charts.items() if name.startswith(CHARTS)]
    caption = CAPTION if all(own.is_path for own in results) else SOUP_CAPTION
    parts: list[Html] = [figure(chart.in_page(), caption, kind="wide") for chart in drawn]
    for result in results:
        parts += [*map(note, ingredients_words(result)), *tables(average_tables(result))]
    return [section("averages", "Averages of weights", *parts)]
