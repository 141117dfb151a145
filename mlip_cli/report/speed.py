"""Speed on the pages: accuracy against speed at each merge rate, and the time of each part of a step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlip_cli.evaluate.results import RetrievalSweep, SpeedAtSetting, SweepResult, ZeroshotSweep
from mlip_cli.evaluate.statistics import Interval
from mlip_cli.profiling.result import ProfileResult
from mlip_cli.report.canvas import Chart
from mlip_cli.report.charts import ChartBar, Dot, bars_chart, dots_chart
from mlip_cli.report.page import Html, command, figure, note, section, tables
from mlip_cli.report.profile_tables import model_tables, profile_notes
from mlip_cli.report.record import RunRecord
from mlip_cli.report.scores import by_data
from mlip_cli.report.sweep_tables import failures_words, sweep_tables
from mlip_cli.terminal.output import percent

PARETO, BREAKDOWN = "pareto", "profile"
"""Names of chart files."""

CUT = "Whiskers are 95 % intervals. The table has those that leave the chart."
"""Below a chart of accuracy against speed."""


def sweep_section(record: RunRecord, charts: Mapping[str, Chart]) -> Html:
    """Accuracy against measured speed, and the tables; `charts` are those of `standalone_charts`."""
    sweep = record.newest(SweepResult)
    if sweep is None:
        return section("sweep", "Merge sweep", note("Not swept yet: ", command(f"mlip merge-sweep {record.place}")))
    pareto = [chart for name, chart in charts.items() if name.startswith(PARETO)]
    return section(
        "sweep",
        "Merge sweep",
        *(figure(chart.in_page(), CUT, kind="wide") for chart in pareto),
        note(f"Step {sweep.step:,}."),
        *tables(sweep_tables(sweep)),
        *map(note, failures_words(sweep)),
    )


def standalone_charts(record: RunRecord) -> dict[str, Chart]:
    """Charts that are written as files too, by name: accuracy against speed on each data set, parts of a step."""
    sweep, profile = record.newest(SweepResult), record.newest(ProfileResult)
    charts = {}
    if sweep is not None:
        for number, chart in enumerate(pareto_charts([(record.name, sweep)]).values(), start=1):
            charts[PARETO if number == 1 else f"{PARETO}_{number}"] = chart
    if profile is not None:
        charts[BREAKDOWN] = breakdown_chart(record.name, profile)
    return charts


@dataclass(frozen=True)
class _Swept:
    """A data set of one run's sweep."""

    run: str
    speeds: Sequence[SpeedAtSetting]
    scores: ZeroshotSweep | RetrievalSweep

    @property
    def data(self) -> tuple[str, str]:
        return self.scores.data


def pareto_charts(sweeps: Sequence[tuple[str, SweepResult]]) -> dict[str, Chart]:
    """Accuracy against measured speed by data set, of one sweep or of several runs': (run, sweep)."""
    found = [_Swept(run, sweep.points, dataset) for run, sweep in sweeps for dataset in sweep.datasets]
    charts = {}
    for name, own in by_data(found).items():
        series = {
            method if len(sweeps) == 1 else f"{swept.run}, {method}": dots
            for swept in own
            for method, dots in _dots(swept).items()
        }
        scores = own[0].scores
        if isinstance(scores, RetrievalSweep):
            label, chance = "image to text R@1", scores.points[0].image_to_text.r1_chance
        else:
            label, chance = "mean recall", scores.chance
        charts[name] = dots_chart(
            f"{name}: {label} against speed",
            series,
            x_label="measured speed, × rate 0 of the same run",
            y_label=f"{label} %",
            chance=100 * chance,
        )
    return charts


def _accuracies(scores: ZeroshotSweep | RetrievalSweep) -> list[tuple[float, Interval]]:
    """The score to show and its interval, at each setting."""
    if isinstance(scores, RetrievalSweep):
        return [(point.image_to_text.r1, point.image_to_text.r1_interval) for point in scores.points]
    return [(point.mean_per_class_recall, point.mean_per_class_recall_interval) for point in scores.points]


def _dots(swept: _Swept) -> dict[str, list[Dot]]:
    """The settings of each method; the unmerged model comes first in each."""
    speeds = {point.key: point for point in swept.speeds}
    dots: dict[str | None, list[Dot]] = {}
    for point, (score, (low, high)) in zip(swept.scores.points, _accuracies(swept.scores), strict=True):
        speed = speeds[point.key]
        interval = (100 * low, 100 * high)
        dot = Dot(f"{point.true_rate:.2f}", speed.speedup, speed.speedup_interval, 100 * score, interval)
        dots.setdefault(point.method, []).append(dot)
    unmerged = dots.pop(None)
    return {str(method): [*unmerged, *own] for method, own in dots.items()} or {"unmerged": unmerged}


def profile_section(record: RunRecord, charts: Mapping[str, Chart]) -> Html:
    """The time of each part of a training step, and the cost of the model."""
    profile = record.newest(ProfileResult)
    if profile is None:
        return section("profile", "Profile", note("Not measured yet: ", command(f"mlip profile {record.place}")))
    return section(
        "profile",
        "Profile",
        figure(charts[BREAKDOWN].in_page(), kind="wide"),
        *map(note, profile_notes(profile)),
        *tables(model_tables(profile)),
    )


def breakdown_chart(name: str, profile: ProfileResult) -> Chart:
    """Milliseconds of each part of a training step, and of each part of the loader processes' work."""
    bars = [
        ChartBar(
            part.part,
            1000 * part.seconds,
            f"{percent(part.share)} %",
            part.group if part.in_step else "data, in loader processes",
        )
        for part in profile.breakdown
    ]
    rest = profile.unaccounted
    bars.append(ChartBar("unaccounted", 1000 * rest.seconds, f"{percent(rest.share)} %"))
    return bars_chart(
        f"{name}: a training step of {profile.batch_size} pairs, part by part",
        bars,
        x_label="ms (and % of the step)",
    )
