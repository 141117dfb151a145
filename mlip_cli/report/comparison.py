"""One page about several runs: what differs in their recipes, their scores side by side, their curves overlaid."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mlip_cli.evaluate.statistics import paired
from mlip_cli.recipe.load import differences
from mlip_cli.report.page import Html, command, element, figure, joined, note, page, section, table
from mlip_cli.report.record import Result, RunRecord
from mlip_cli.report.results import by_data, curves_section, merge_rate, with_interval
from mlip_cli.report.run_page import known_chances, method
from mlip_cli.report.speed import CUT, pareto_pictures
from mlip_cli.terminal.output import percent, plural


def comparison_page(records: Sequence[RunRecord], *, links: Mapping[str, str], written: str) -> str:
    """The whole page.

    Args:
        links: address of each run's own page, by the run's name.
        written: time and version that made the page.
    """
    chances = {name: chance for record in records for name, chance in known_chances(record).items()}
    attributions = dict.fromkeys(text for record in records for text in record.attributions)
    return page(
        f"{len(records)} runs · mlip",
        heading=f"{len(records)} runs compared",
        lead=[
            element("p", "Side by side, from the files of the runs; paired tests are those against the first run."),
            *(note(line) for record in records for line in record.damaged),
        ],
        sections=[
            _runs_section(records, links),
            _scores_section(records),
            _sweeps_section(records),
            curves_section(records, chances=chances),
            _recipes_section(records),
        ],
        foot=joined(note(line) for line in [written, *attributions]),
    )


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
                *(_recall(record, way) for way in ("image_to_text", "text_to_image")),
                record.stamp.get("end_reason") or "not ended",
            ]
        )
    columns = ["run", "method", "batch", "steps", "loss", "i→t R@5 %", "t→i R@5 %", "ended"]
    return section(
        "runs",
        "Runs",
        table(columns, rows, text_columns=2),
        note(
            "Losses of recipes with other batch sizes, terms or weights do not compare: guessing costs ln(batch). In "
            "brackets: 95 % intervals."
        ),
    )


def _recall(record: RunRecord, way: str) -> Html | str | None:
    """R@5 on the validation set at the end of training, else the last one measured during it."""
    gallery = record.newest("gallery")
    if gallery is not None:
        return with_interval(gallery["scores"][way], "r5")
    measured = [line for line in record.evaluations if f"validation_{way}_r5" in line]
    if not measured:
        return None
    return f"{percent(measured[-1][f'validation_{way}_r5'])} at step {measured[-1]['step']:,}"


def _unmeasured(records: Sequence[RunRecord], kind: str, measured_by: str) -> list[Html]:
    """A line for each run that has no such result, and how to get it."""
    lacking = [record for record in records if not record.results.get(kind)]
    return [note(f"{record.name}: not measured yet: ", command(f"{measured_by} {record.place}")) for record in lacking]


def _scores_section(records: Sequence[RunRecord]) -> Html:
    """Zero-shot scores of each run's newest checkpoint, and how each differs from the first run's at the same rate."""
    newest = [
        {**result, "run": record.name}
        for record in records
        for result in {
            (result["dataset"], result["data_fingerprint"], result["true_merge_rate"]): result
            for result in record.results.get("zeroshot", [])  # in the order of their steps
        }.values()
    ]
    parts = [part for name, own in by_data(newest, "data_fingerprint").items() for part in _dataset(name, own)]
    return section("scores", "Zero-shot", *parts, *_unmeasured(records, "zeroshot", "mlip eval-zeroshot"))


def _dataset(name: str, results: Sequence[Result]) -> list[Html]:
    """Rows by run and rate; the first run's stand first."""
    first_run = results[0]["run"]
    reference = {result["true_merge_rate"]: result for result in results if result["run"] == first_run}
    runs = list(dict.fromkeys(result["run"] for result in results))
    rows = [
        [
            result["run"],
            f"{result['step']:,}",
            merge_rate(result),
            *_scores(result),
            *_versus(reference.get(result["true_merge_rate"]), result),
        ]
        for result in sorted(results, key=lambda result: (runs.index(result["run"]), result["true_merge_rate"]))
    ]
    shown = results[0]
    columns = ["run", "step", "merge rate", "mean recall %", "top-1 %", *(["name R@5 %"] if "names" in shown else [])]
    return [
        element("h3", name),
        table([*columns, "won / lost", "p"], rows, text_columns=1),
        note(
            f"{plural(shown['n'], 'picture')}; chance {percent(shown['chance'])} %. Won / lost: pictures that only "
            f"this run, or only {first_run}, gets right at the same rate; p: McNemar's exact test. In brackets: 95 % "
            "intervals."
        ),
    ]


def _scores(result: Result) -> list[Html | None]:
    scores = [with_interval(result, "mean_per_class_recall"), with_interval(result, "acc1")]
    return [*scores, with_interval(result["names"], "r5")] if "names" in result else scores


def _versus(first: Result | None, result: Result) -> list[str | None]:
    """Against the first run at the same rate, on the same pictures."""
    if first is None or first is result:
        return [None, None]
    test = paired(first["right"]["acc1"], result["right"]["acc1"])
    return [f"{test['won']} / {test['lost']}", f"{test['p']:.2g}"]


def _sweeps_section(records: Sequence[RunRecord]) -> Html:
    sweeps = [(record.name, sweep) for record in records if (sweep := record.newest("merge_sweep")) is not None]
    charts = [figure(picture.in_page(), CUT, kind="wide") for picture in pareto_pictures(sweeps).values()]
    return section("sweep", "Merge sweeps", *charts, *_unmeasured(records, "merge_sweep", "mlip merge-sweep"))


def _recipes_section(records: Sequence[RunRecord]) -> Html:
    """Keys whose values differ between any two runs, as each recipe has them."""
    recipes = [record.recipe for record in records if record.recipe is not None]
    if len(recipes) < len(records):
        return section("recipes", "Recipes", note("Some recipes do not validate with this version."))
    paths = dict.fromkeys(path for recipe in recipes for path, _, _ in differences(recipes[0], recipe))
    trees = [recipe.model_dump(mode="json") for recipe in recipes]
    rows = [[path, *(_value(tree, path) for tree in trees)] for path in paths]
    columns = ["key", *(record.name for record in records)]
    empty = note("The recipes are the same.")
    return section("recipes", "Recipes", table(columns, rows, text_columns=len(columns)) if rows else empty)


def _value(tree: Any, path: str) -> str | None:
    """As recipes write it; None where the recipe has no such key."""
    for name in path.split("."):
        if not isinstance(tree, dict):
            return None
        tree = tree[name]
    return json.dumps(tree, ensure_ascii=False)
