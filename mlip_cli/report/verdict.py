"""What a comparison of runs says: one sentence for each pair, and one picture of accuracy against training time.

Both come from the files of the runs. A difference counts as shown where its 95 % interval leaves out 0.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlip_cli.evaluate.results import ZeroshotResult
from mlip_cli.evaluate.statistics import Interval, metric_prefix, paired, paired_interval
from mlip_cli.report.canvas import DASHES, MARKERS, MUTED, NUM_SERIES, SERIES, Chart, drawn, literal
from mlip_cli.report.record import RunRecord
from mlip_cli.report.tables import MainScore, main_score
from mlip_cli.terminal.output import percent, plural

MEASURES = {"picture_r1": "picture_r1", "acc1": "mean_recall"}
"""Answers to single pictures -> the measure in metrics.jsonl that they belong to."""


@dataclass(frozen=True)
class Compared:
    """Two results on the same data."""

    first: ZeroshotResult
    other: ZeroshotResult

    @property
    def score(self) -> MainScore:
        """The score that is compared; of the other one."""
        return main_score(self.other, chance=self.other.chance)

    @property
    def num_answers(self) -> int:
        """Answers that both gave."""
        return len(self.other.right[self.score.measure])

    @property
    def shares(self) -> tuple[float, float]:
        """Right answers of the first one and of the other."""
        first, other = (result.right[self.score.measure] for result in (self.first, self.other))
        return first.count("1") / len(first), other.count("1") / len(other)

    @property
    def interval(self) -> Interval:
        """Of the difference of the shares."""
        measure = self.score.measure
        test = paired(self.first.right[measure], self.other.right[measure])
        return paired_interval(test["won"], test["lost"], self.num_answers)

    @property
    def is_shown(self) -> bool:
        """Whether the interval of the difference leaves out 0."""
        return self.interval.low > 0 or self.interval.high < 0


def verdicts(records: Sequence[RunRecord]) -> list[str]:
    """A sentence about each run beside the first one, and one about what merging changes in each; from files alone."""
    sentences = [_beside_first(records[0], record) for record in records[1:]]
    merged = [_merged(record) for record in records]
    return [sentence for sentence in (*sentences, *merged) if sentence]


def _beside_first(first: RunRecord, other: RunRecord) -> str | None:
    """Both runs without merging on the first data set that both were measured on."""
    for result in _unmerged(other):
        reference = next((own for own in _unmerged(first) if own.data == result.data), None)
        if reference is None:
            continue
        found = Compared(reference, result)
        a, b = found.shares
        score = found.score
        asked = f"{result.dataset}, {plural(found.num_answers, _asked(score))} (chance {percent(score.chance)} %)"
        ratio = _time_ratio(first, other)
        longer = f", and training took {ratio:.2f} times as long" if ratio else ""
        return (
            f"{asked}: {first.name} {_does(score)} {percent(a)} %, {other.name} for {percent(b)} %; "
            f"{_difference(found)} between these two runs{longer}."
        )
    return None


def _merged(record: RunRecord) -> str | None:
    """The highest merge rate that was measured beside the unmerged model."""
    for result in _unmerged(record):
        own = [
            other
            for other in record.all_of(ZeroshotResult)
            if other.true_merge_rate > 0 and (other.data, other.step) == (result.data, result.step)
        ]
        if not own:
            continue
        found = Compared(result, max(own, key=lambda other: other.true_merge_rate))
        a, b = found.shares
        merged = f"{record.name} at merge rate {found.other.true_merge_rate:.2f}"
        return f"{merged} {_does(found.score)} {percent(b)} % instead of {percent(a)} %; {_difference(found)}."
    return None


def _unmerged(record: RunRecord) -> list[ZeroshotResult]:
    """The newest result without merging on each data set, in the order of the recipe; data sets it lacks come last."""
    found = {own.dataset: own for own in record.all_of(ZeroshotResult) if own.true_merge_rate == 0}
    names = list(record.recipe.evaluate.zeroshot) if record.recipe is not None else []
    order = {name: number for number, name in enumerate(names)}
    return sorted(found.values(), key=lambda own: order.get(own.dataset, len(order)))


def _asked(score: MainScore) -> str:
    return "name" if score.measure == "picture_r1" else "picture"


def _does(score: MainScore) -> str:
    return "puts the right picture first for" if score.measure == "picture_r1" else "finds the right class for"


def _difference(found: Compared) -> str:
    """+3.1 points (95 % interval -1.2 to +7.4): no difference is shown"""
    a, b = found.shares
    low, high = (f"{100 * end:+.1f}" for end in found.interval)
    seen = f"{'a gain' if b > a else 'a loss'} is shown" if found.is_shown else "no difference is shown"
    return f"{100 * (b - a):+.1f} points (95 % interval {low} to {high}): {seen}"


def _time_ratio(first: RunRecord, other: RunRecord) -> float | None:
    """Training time of the other run over that of the first."""
    times = [list(training_seconds(record)) for record in (first, other)]
    if not all(times):
        return None
    (_, a), (_, b) = (own[-1] for own in times)
    return b / a


def training_seconds(record: RunRecord) -> Iterator[tuple[int, float]]:
    """(step, seconds of training until then) of each logged line; evaluations do not count.

    The speed of a line is that of the stretch since the line before.
    """
    seconds, before = 0.0, 0
    for line in record.steps:
        samples, speed = line.get("samples_seen"), line.get("images_per_s")
        if not samples or not speed:
            continue
        seconds += (samples - before) / speed
        before = samples
        yield int(line["step"]), seconds


def time_chart(records: Sequence[RunRecord]) -> Chart | None:
    """The main score of the first shared data set against seconds of training; None where nothing was measured."""
    for result in _unmerged(records[0]):
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
                own = next((own for own in _unmerged(record) if own.data == result.data), None)
                _draw(chart, number, record.name, seconds, values, own)
            chart.axes.axhline(100 * score.chance, color=MUTED, linestyle=":", linewidth=1.2, label="chance")
            chart.axes.set_xlim(left=0)
            chart.axes.set_ylim(bottom=0)
            chart.legend(len(records) + 1)
        return chart
    return None


def _curve(record: RunRecord, key: str) -> list[tuple[float, float]]:
    """(seconds, score in per cent) of each evaluation."""
    seconds = dict(training_seconds(record))
    return [
        (seconds[line["step"]], 100 * line[key])
        for line in record.evaluations
        if line.get(key) is not None and line["step"] in seconds
    ]


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
