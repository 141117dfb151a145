"""Merge sweeps: as tables, and with charts of accuracy against speed on the pages."""

from collections.abc import Mapping, Sequence

from mlip_cli.evaluate.results import DIRECTIONS, RetrievalSweep, SweepResult, ZeroshotScores, ZeroshotSweep
from mlip_cli.evaluate.statistics import Interval
from mlip_cli.report.canvas import Chart
from mlip_cli.report.charts import Curve, Dot, curves_chart, dots_chart
from mlip_cli.report.page import Html, command, figure, note, section, tables
from mlip_cli.report.record import RunRecord
from mlip_cli.report.retrieval import TESTED, RecallRow, recall_tables
from mlip_cli.report.scores import by_data
from mlip_cli.report.tables import (
    PAIRED_TEST,
    VERSUS,
    Cell,
    Table,
    data_words,
    doubts,
    machine_words,
    main_score,
    names_words,
    percent_cell,
    print_tables,
    recall_cell,
    speedup_cell,
    tokens_words,
    versus_cells,
)
from mlip_cli.terminal.output import percent, plural

PARETO, DISTORTION = "pareto", "distortion"
"""Beginnings of the names of chart files."""

CUT = "Whiskers are 95 % intervals. The table has those that leave the chart."
"""Below a chart of accuracy against speed."""

MOVED = "Distortion says how far merging moves the features of pictures. It needs no labels, and lower is better."
"""Below a chart of distortion against speed."""


def print_sweep(sweep: SweepResult) -> None:
    """Print all tables."""
    print_tables(sweep_tables(sweep), notes=failures_words(sweep))


def sweep_tables(sweep: SweepResult) -> list[Table]:
    """Speed and tokens of every setting, then the scores on each data set."""
    speeds: list[list[Cell]] = [
        [
            *point.words,
            f"{point.true_rate:.3f}",
            f"{point.gflops:.3g}",
            f"{point.images_per_s:,.1f}",
            speedup_cell(point.speedup, point.speedup_interval),
            f"{point.expected_speedup:.2f}",
            f"{point.peak_memory.gib:.2f}",
        ]
        for point in sweep.points
    ]
    columns = ("method", "rate", "true rate", "GFLOPs", "images/s", "x rate 0 (95 %)", "by FLOPs", "peak GiB")
    notes = [
        f"batch of {sweep.batch_size}, {sweep.precision}, on {machine_words(sweep)}; "
        f"median of {sweep.rounds} rounds with all settings in turn"
    ]
    scattered = [" ".join(point.words) for point in sweep.points if scatters(point.speedup_interval)]
    if scattered:
        notes.append(
            f"the rounds of {', '.join(scattered)} differ much: the machine had other work; repeat, or raise --rounds"
        )
    tokens = [[*point.words, tokens_words(point.tokens_per_block)] for point in sweep.points]
    shown = [Table(columns, speeds, notes=notes), Table(("method", "rate", "tokens in each block"), tokens)]
    if any(dataset.distortion for dataset in sweep.datasets):
        shown.append(_distortions(sweep))
    for dataset in sweep.datasets:
        shown += _swept_zeroshot(dataset) if isinstance(dataset, ZeroshotSweep) else _swept_retrieval(dataset)
    return shown


def _distortions(sweep: SweepResult) -> Table:
    """How far features move at each setting, on each data set."""
    measured = [dataset for dataset in sweep.datasets if dataset.distortion]
    rows: list[list[Cell]] = [
        [*points[0].words, *(f"{1000 * value:.3g}" for point in points for value in (point.mean, point.p95))]
        for points in zip(*(dataset.distortion for dataset in measured), strict=True)
    ]
    titles = [f"{dataset.dataset}: {what}" for dataset in measured for what in ("mean", "95th percentile")]
    n = max(dataset.distortion[0].n for dataset in measured)
    note = (
        f"1000 x (1 - cosine to the unmerged feature), of up to {plural(n, 'picture')} a data set; no labels are needed"
    )
    return Table(("method", "rate", *titles), rows, "distortion", [note])


def failures_words(sweep: SweepResult) -> list[str]:
    """A line for each data set that could not be measured."""
    return [f"{own.dataset}: not evaluated: {own.error.removeprefix(f'{own.dataset}: ')}" for own in sweep.failed]


def scatters(interval: Interval) -> bool:
    """True for an interval so wide that the speed-up says little."""
    return interval.high > 1.5 * interval.low


def _swept_zeroshot(dataset: ZeroshotSweep) -> list[Table]:
    first, asks_names_alone = dataset.points[0], dataset.points[0].asks_names_alone
    rows: list[list[Cell]] = [
        [
            *point.words,
            *(recall_cell(point.pictures if asks_names_alone else None, k) for k in (1, 5)),
            *_class_cells(None if asks_names_alone else point),
            recall_cell(point.names, 5),
        ]
        for point in dataset.points
    ]
    names = [names_words(first.names)] if first.names and not asks_names_alone else []
    notes = [data_words(dataset, first), *doubts(dataset, dataset.points), *names]
    titles = ("method", "rate", "picture R@1 %", "picture R@5 %", "mean recall %", "top-1 %", "name R@5 %")
    scores = Table(titles, rows, dataset.dataset, notes).without_empty_columns()
    shown = main_score(first, chance=dataset.chance)
    beside: list[list[Cell]] = [
        [*point.words, percent(point.agreement), *versus_cells(point.paired[shown.measure])]
        for point in dataset.points
        if point.method
    ]
    won = f"won / lost: {shown.won} this setting alone / by rate 0 alone; {PAIRED_TEST}"
    columns = ("method", "rate", "same class %", *VERSUS)
    return [scores, *_beside(dataset.dataset, columns, beside, note=won)]


def _class_cells(scores: ZeroshotScores | None) -> list[Cell]:
    """Mean recall and top-1."""
    if scores is None:
        return [None, None]
    recall = percent_cell(scores.mean_per_class_recall, scores.mean_per_class_recall_interval)
    return [recall, percent_cell(scores.acc1, scores.acc1_interval)]


def _swept_retrieval(dataset: RetrievalSweep) -> list[Table]:
    rows = [
        RecallRow(
            point.words,
            point.recalls,
            tests={way: point.paired[f"{way}_r{TESTED}"] for way in DIRECTIONS} if point.method else None,
        )
        for point in dataset.points
    ]
    return recall_tables(
        dataset.dataset,
        ("method", "rate"),
        rows,
        n=dataset.n,
        num_texts=dataset.num_texts,
        beside="rate 0",
        won="only this setting / only rate 0",
    )


def _beside(dataset: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, note: str) -> list[Table]:
    """A table of the differences from rate 0; none where there is no other setting."""
    return [Table(columns, rows, f"{dataset}: beside rate 0", [note])] if rows else []


def sweep_section(record: RunRecord, charts: Mapping[str, Chart]) -> Html:
    """Accuracy against measured speed, and the tables; `charts` are those that `write_run_page` draws."""
    sweep = record.newest(SweepResult)
    if sweep is None:
        return section("sweep", "Merge sweep", note("Not swept yet: ", command(f"mlip merge-sweep {record.place}")))
    return section(
        "sweep",
        "Merge sweep",
        *(figure(chart.in_page(), CUT, kind="wide") for name, chart in charts.items() if name.startswith(PARETO)),
        *(figure(chart.in_page(), MOVED, kind="wide") for name, chart in charts.items() if name.startswith(DISTORTION)),
        note(f"Step {sweep.step:,}."),
        *tables(sweep_tables(sweep)),
        *map(note, failures_words(sweep)),
    )


def sweep_charts(record: RunRecord) -> dict[str, Chart]:
    """Charts that are written as files too, by name: accuracy against speed on each data set."""
    sweep = record.newest(SweepResult)
    if sweep is None:
        return {}
    named = {PARETO: pareto_charts([(record.name, sweep)]), DISTORTION: _distortion_charts(sweep)}
    return {
        name if number == 1 else f"{name}_{number}": chart
        for name, charts in named.items()
        for number, chart in enumerate(charts, start=1)
    }


def _distortion_charts(sweep: SweepResult) -> list[Chart]:
    """Distortion against measured speed on each data set, one curve a method."""
    speeds = {point.key: point.speedup for point in sweep.points}
    charts = []
    for dataset in sweep.datasets:
        by_method: dict[str, list[tuple[float, float]]] = {}
        for point in dataset.distortion:
            by_method.setdefault(str(point.method), [(1.0, 0.0)]).append((speeds[point.key], 1000 * point.mean))
        if by_method:
            curves = [
                Curve(name, [x for x, _ in dots], [y for _, y in dots], series)
                for series, (name, dots) in enumerate(by_method.items())
            ]
            charts.append(
                curves_chart(
                    f"{dataset.dataset}: distortion against speed",
                    curves,
                    x_label="measured speed, × rate 0 of the same run",
                    y_label="1000 × (1 − cosine to the unmerged feature)",
                )
            )
    return charts


def pareto_charts(sweeps: Sequence[tuple[str, SweepResult]]) -> list[Chart]:
    """Accuracy against measured speed on each data set, of one sweep or of several runs': (run, sweep)."""
    found = [(scores.data, (run, sweep, scores)) for run, sweep in sweeps for scores in sweep.datasets]
    charts = []
    for name, own in by_data(found).items():
        series = {
            method if len(sweeps) == 1 else f"{run}, {method}": dots
            for run, sweep, scores in own
            for method, dots in _dots(sweep, scores).items()
        }
        _, _, first = own[0]
        if isinstance(first, RetrievalSweep):
            label, chance = "image to text R@1", first.points[0].image_to_text.r1_chance
        else:
            shown = main_score(first.points[0], chance=first.chance)
            label, chance = shown.words, shown.chance
        chart = dots_chart(
            f"{name}: {label} against speed",
            series,
            x_label="measured speed, × rate 0 of the same run",
            y_label=f"{label} %",
            chance=100 * chance,
        )
        charts.append(chart)
    return charts


def _accuracies(scores: ZeroshotSweep | RetrievalSweep) -> list[tuple[float, Interval]]:
    """The score to show and its interval, at each setting."""
    if isinstance(scores, RetrievalSweep):
        return [(point.image_to_text.r1, point.image_to_text.r1_interval) for point in scores.points]
    shown = [main_score(point, chance=scores.chance) for point in scores.points]
    return [(own.value, own.interval) for own in shown]


def _dots(sweep: SweepResult, scores: ZeroshotSweep | RetrievalSweep) -> dict[str, list[Dot]]:
    """The settings of each method; the unmerged model comes first in each."""
    speeds = {point.key: point for point in sweep.points}
    dots: dict[str | None, list[Dot]] = {}
    for point, (score, (low, high)) in zip(scores.points, _accuracies(scores), strict=True):
        speed = speeds[point.key]
        interval = (100 * low, 100 * high)
        dot = Dot(f"{point.true_rate:.2f}", speed.speedup, speed.speedup_interval, 100 * score, interval)
        dots.setdefault(point.method, []).append(dot)
    unmerged = dots.pop(None)
    return {str(method): [*unmerged, *own] for method, own in dots.items()} or {"unmerged": unmerged}
