"""One page about several runs: scores side by side, curves in shared charts, differences of the recipes."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mlip_cli.evaluate.picture_results import GalleryResult
from mlip_cli.evaluate.results import DIRECTIONS, SweepResult, ZeroshotResult
from mlip_cli.recipe.load import differences
from mlip_cli.report.curves import curves_section
from mlip_cli.report.page import Html, command, element, figure, joined, note, page, section, table
from mlip_cli.report.record import RunRecord
from mlip_cli.report.run_page import known_chances, method
from mlip_cli.report.scores import compared_scores
from mlip_cli.report.sweeps import CUT, pareto_charts
from mlip_cli.report.tables import INTERVALS, Cell, Table, recall_cell
from mlip_cli.report.verdict import time_chart, verdicts
from mlip_cli.runs.result_files import Result
from mlip_cli.terminal.output import percent


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
            element("p", "Paired tests compare each run with the first one."),
            *(note(line) for record in records for line in record.damaged),
        ],
        sections=[
            _verdict_section(records),
            _runs_section(records, links),
            _scores_section(records),
            _sweeps_section(records),
            curves_section(records, chances=chances),
            _recipes_section(records),
        ],
        foot=joined(note(line) for line in [written, *attributions]),
    )


def _verdict_section(records: Sequence[RunRecord]) -> Html:
    sentences = verdicts(records) or ["The runs were not measured on the same data yet."]
    chart = time_chart(records)
    charts = [figure(chart.in_page(), "Bars are 95 % intervals.", kind="wide")] if chart is not None else []
    return section("verdict", "Verdict", *(element("p", sentence) for sentence in sentences), *charts)


def _runs_section(records: Sequence[RunRecord], links: Mapping[str, str]) -> Html:
    rows = []
    for record in records:
        batch_size = record.recipe.train.global_batch_size if record.recipe is not None else None
        rows.append(
            [
                element("a", record.name, href=links[record.name]),
                method(record),
                None if batch_size is None else f"{batch_size:,}",
                f"{record.last_step:,}",
                record.last_loss,
                *(_recall(record, way) for way in DIRECTIONS),
                record.stamp.end_reason or "not ended",
            ]
        )
    columns = ["run", "method", "batch", "steps", "loss", *(f"{words} R@5 %" for words in DIRECTIONS.values()), "ended"]
    return section(
        "runs",
        "Runs",
        table(Table(columns, rows)),
        note(
            "Compare losses only between recipes with the same batch size, terms and weights: the loss of guessing is "
            f"ln(batch). {INTERVALS.capitalize()}."
        ),
    )


def _recall(record: RunRecord, way: str) -> Cell:
    """R@5 on the validation set at the end of training, else the last value measured during training."""
    gallery = record.newest(GalleryResult)
    if gallery is not None:
        return recall_cell(gallery.scores[way], 5)
    measured = [line for line in record.evaluations if f"validation_{way}_r5" in line]
    if not measured:
        return None
    return f"{percent(measured[-1][f'validation_{way}_r5'])} at step {measured[-1]['step']:,}"


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
    return section("sweep", "Merge sweeps", *charts, *_unmeasured(records, SweepResult, "mlip merge-sweep"))


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
