"""One page about several runs: what their scores show, pictures and scores side by side, curves in shared charts."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mlip_cli.evaluate.results import SweepResult, ZeroshotResult
from mlip_cli.recipe.load import differences
from mlip_cli.report.costs import costs_table
from mlip_cli.report.curves import curves_section
from mlip_cli.report.galleries import compared_galleries
from mlip_cli.report.opening import comparison_opening
from mlip_cli.report.page import (
    Html,
    command,
    details,
    element,
    figure,
    joined,
    note,
    page,
    section,
    table,
    tables,
)
from mlip_cli.report.record import RunRecord
from mlip_cli.report.retrieval import compared_retrieval
from mlip_cli.report.run_page import known_chances, method
from mlip_cli.report.scores import compared_scores
from mlip_cli.report.sweeps import CUT, failures_words, pareto_charts, sweep_tables
from mlip_cli.report.tables import Table
from mlip_cli.report.time_chart import time_chart
from mlip_cli.runs.result_files import Result


def comparison_page(records: Sequence[RunRecord], *, links: Mapping[str, str], written: str) -> str:
    """The whole page.

    Args:
        links: address of each run's own page, by the run's name.
        written: the line about the page's making.
    """
    chances = {name: chance for record in records for name, chance in known_chances(record).items()}
    attributions = dict.fromkeys(text for record in records for text in record.attributions)
    return page(
        f"{len(records)} runs · mlip",
        heading=f"{len(records)} runs compared",
        lead=[
            comparison_opening(records, methods={record.name: method(record) for record in records}),
            *(note(line) for record in records for line in record.damaged),
        ],
        sections=[
            *_time_section(records),
            _runs_section(records, links),
            compared_galleries(records),
            _scores_section(records),
            *compared_retrieval(records),
            _sweeps_section(records),
            curves_section(records, chances=chances),
            _recipes_section(records),
        ],
        foot=joined(note(line) for line in [written, *attributions]),
    )


def _time_section(records: Sequence[RunRecord]) -> list[Html]:
    """The main score against training time, where it was measured during training."""
    chart = time_chart(records)
    if chart is None:
        return []
    return [section("time", "Accuracy against time", figure(chart.in_page(), "Bars are 95 % intervals.", kind="wide"))]


def _runs_section(records: Sequence[RunRecord], links: Mapping[str, str]) -> Html:
    heads = {record.name: [element("a", record.name, href=links[record.name]), method(record)] for record in records}
    return section("runs", "Runs and their cost", *tables([costs_table(records, heads=heads)]))


def _unmeasured(records: Sequence[RunRecord], kind: type[Result], measured_by: str) -> list[Html]:
    """For each run without such a result, the command that measures it."""
    lacking = [record for record in records if record.newest(kind) is None]
    return [note(f"{record.name}: not measured yet: ", command(f"{measured_by} {record.place}")) for record in lacking]


def _scores_section(records: Sequence[RunRecord]) -> Html:
    unmeasured = _unmeasured(records, ZeroshotResult, "mlip eval-zeroshot")
    return section("scores", "Zero-shot", *compared_scores(records), *unmeasured)


def _sweeps_section(records: Sequence[RunRecord]) -> Html:
    sweeps = [(record.name, sweep) for record in records if (sweep := record.newest(SweepResult)) is not None]
    charts = [figure(chart.in_page(), CUT, kind="wide") for chart in pareto_charts(sweeps)]
    numbers = [
        details(f"{name}: every setting", *tables(sweep_tables(sweep)), *map(note, failures_words(sweep)))
        for name, sweep in sweeps
    ]
    unmeasured = _unmeasured(records, SweepResult, "mlip merge-sweep")
    return section("sweep", "Merge sweeps", *charts, *numbers, *unmeasured)


def _recipes_section(records: Sequence[RunRecord]) -> Html:
    """Keys whose values differ between any two runs, with the value in each recipe."""
    recipes = [record.recipe for record in records if record.recipe is not None]
    if len(recipes) < len(records):
        return section("recipes", "Recipes", note("Some recipes do not validate with this version."))
    paths = dict.fromkeys(path for recipe in recipes for path, _, _ in differences(recipes[0], recipe))
    trees = [recipe.model_dump(mode="json") for recipe in recipes]
    rows = [[path, *(_value(tree, path) for tree in trees)] for path in paths]
    columns = ["key", *(record.name for record in records)]
    empty = note("The recipes are the same.")
    return section("recipes", "Recipes", table(Table(columns, rows)) if rows else empty)


def _value(tree: Any, path: str) -> str | None:
    """The value as YAML; None where the recipe has no such key."""
    for name in path.split("."):
        if not isinstance(tree, dict):
            return None
        tree = tree[name]
    return json.dumps(tree, ensure_ascii=False)
