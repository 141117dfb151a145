"""One page about several runs: what differs in their recipes, their scores side by side, their curves overlaid."""

from collections.abc import Mapping, Sequence

from mlip_cli.evaluate.report.costs import pareto_pictures
from mlip_cli.evaluate.report.page import Html, element, figure, joined, note, page, section, table
from mlip_cli.evaluate.report.record import Result, RunRecord
from mlip_cli.evaluate.report.results import curves_section, merge_rate, percent, with_interval
from mlip_cli.evaluate.report.run_page import known_chances, method
from mlip_cli.evaluate.statistics import paired
from mlip_cli.recipe import differences


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
            element("p", f"Differences are those to {records[0].name}, the first one named."),
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
        gallery = record.newest("gallery")
        scores = gallery["scores"] if gallery is not None else {}
        rows.append(
            [
                element("a", record.name, href=links[record.name]),
                method(record),
                f"{record.last_step:,}",
                record.last_loss,
                *(with_interval(scores.get(way, {}), "r5") for way in ("image_to_text", "text_to_image")),
                record.stamp.get("end_reason") or "not ended",
            ]
        )
    columns = ["run", "method", "steps", "loss", "i→t R@5 %", "t→i R@5 %", "ended"]
    return section(
        "runs",
        "Runs",
        table(columns, rows, text_columns=2),
        note("Losses of recipes with other terms or weights do not compare. In brackets: 95 % intervals."),
    )


def _scores_section(records: Sequence[RunRecord]) -> Html:
    """Zero-shot scores of each run's newest checkpoint, and how each differs from the first run's at the same rate."""
    newest = {record.name: _newest(record.results.get("zeroshot", [])) for record in records}
    datasets = list(dict.fromkeys(name for found in newest.values() for name, _ in found))
    parts = [part for dataset in datasets for part in _dataset(dataset, newest)]
    return section("scores", "Zero-shot", *(parts or [note("No run has zero-shot results yet.")]))


Newest = dict[tuple[str, float], Result]


def _newest(results: Sequence[Result]) -> Newest:
    """By data set and true rate, the result of the latest step."""
    return {(result["dataset"], result["true_merge_rate"]): result for result in results}


def _dataset(dataset: str, newest: Mapping[str, Newest]) -> list[Html]:
    reference = next(iter(newest.values()))
    rows = []
    shown: Result = {}
    for run, found in newest.items():
        for (name, rate), result in sorted(found.items()):
            if name == dataset:
                shown = result
                first = reference.get((dataset, rate))
                rows.append([run, f"{result['step']:,}", merge_rate(result), *_scores(result), *_versus(first, result)])
    has_names = "names" in shown
    columns = ["run", "step", "merge rate", "mean recall %", "top-1 %", *(["name R@5 %"] if has_names else [])]
    return [
        element("h3", dataset),
        table([*columns, "won / lost", "p"], rows, text_columns=1),
        note(
            f"{shown['n']:,} pictures; chance {percent(shown['chance'])} %. Won / lost: pictures that only this run, "
            "or only the first one, gets right at the same rate; p: McNemar's exact test. In brackets: 95 % intervals."
        ),
    ]


def _scores(result: Result) -> list[Html | None]:
    scores = [with_interval(result, "mean_per_class_recall"), with_interval(result, "acc1")]
    return [*scores, with_interval(result["names"], "r5")] if "names" in result else scores


def _versus(first: Result | None, result: Result) -> list[str | None]:
    """Only results on the same pictures compare."""
    if first is None or first is result or first["data_fingerprint"] != result["data_fingerprint"]:
        return [None, None]
    test = paired(first["right"]["acc1"], result["right"]["acc1"])
    return [f"{test['won']} / {test['lost']}", f"{test['p']:.2g}"]


def _sweeps_section(records: Sequence[RunRecord]) -> Html:
    sweeps = [(record.name, sweep) for record in records if (sweep := record.newest("merge_sweep")) is not None]
    charts = [figure(picture.in_page(), kind="wide") for picture in pareto_pictures(sweeps).values()]
    return section("sweep", "Merge sweeps", *(charts or [note("No run has been swept yet.")]))


def _recipes_section(records: Sequence[RunRecord]) -> Html:
    """Keys whose values differ; those of the data's place and of the run itself included."""
    readable = [record for record in records if record.recipe is not None]
    if len(readable) < len(records) or records[0].recipe is None:
        return section("recipes", "Recipes", note("Some recipes do not validate with this version."))
    first = records[0].recipe
    changes = [
        {path: (old, new) for path, old, new in differences(first, record.recipe)}
        for record in readable
        if record.recipe is not None
    ]
    paths = list(dict.fromkeys(path for own in changes for path in own))
    olds = {path: old for own in changes for path, (old, _) in own.items()}
    rows = [[path, *(_shown(own[path][1] if path in own else olds[path]) for own in changes)] for path in paths]
    columns = ["key", *(record.name for record in records)]
    empty = note("The recipes are the same.")
    return section("recipes", "Recipes", table(columns, rows, text_columns=len(columns)) if rows else empty)


def _shown(value: object) -> str:
    return "null" if value is None else str(value)
