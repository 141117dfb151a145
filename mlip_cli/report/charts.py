"""Three kinds of charts: curves, points with intervals, bars."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from mlip_cli.report.canvas import DASHES, INK, MARKERS, MUTED, NUM_SERIES, SERIES, Chart, drawn, literal

MOST_POINTS = 600
"""Most points of a drawn curve. A longer one is drawn as means of equal stretches."""

FEW_POINTS = 12
"""A curve of at most so many points shows each of them."""


@dataclass(frozen=True)
class Curve:
    """One curve."""

    label: str
    """Empty: the legend leaves the curve out."""
    x: Sequence[float]
    y: Sequence[float | None]
    """None where the value is not finite: the curve has a gap."""
    series: int = 0
    """Number of its colour, dash and marker."""


@dataclass(frozen=True)
class Dot:
    """One measured point with its 95 % intervals."""

    label: str
    x: float
    x_interval: tuple[float, float]
    y: float
    y_interval: tuple[float, float]


@dataclass(frozen=True)
class ChartBar:
    """One horizontal bar."""

    name: str
    value: float
    words: str
    """Text at the end of the bar."""
    group: str = ""


def curves_chart(
    title: str,
    lines: Sequence[Curve],
    *,
    x_label: str,
    y_label: str = "",
    levels: Mapping[str, float] | None = None,
    from_zero: bool = False,
) -> Chart:
    """Curves over steps, with dotted horizontal `levels` such as chance: one for each curve, or some for all."""
    levels = levels or {}
    with drawn(title, x_label=x_label, y_label=y_label, layout=None) as chart:
        for line in lines:
            x, y = _thinned(line)
            chart.axes.plot(
                x,
                y,
                color=SERIES[line.series % NUM_SERIES],
                linestyle=DASHES[line.series % len(DASHES)],
                marker=MARKERS[line.series % len(MARKERS)] if len(x) <= FEW_POINTS else None,
                markersize=4,
                label=literal(line.label) or None,
            )
        for number, (name, level) in enumerate(levels.items()):
            colour = SERIES[number % NUM_SERIES] if len(levels) == len(lines) > 1 else MUTED
            chart.axes.axhline(level, color=colour, linestyle=":", linewidth=1.2, label=name)
        chart.axes.set_xlim(left=0)
        if from_zero:
            chart.axes.set_ylim(bottom=0)
        num_entries = sum(bool(line.label) for line in lines) + len(levels)
        chart.place(num_entries)
        chart.legend(num_entries)
    return chart


def dots_chart(title: str, series: Mapping[str, Sequence[Dot]], *, x_label: str, y_label: str, chance: float) -> Chart:
    """Accuracy against speed or another accuracy: points with both intervals, joined in the order given.

    The points fill the width; the frame cuts an interval that is wider.
    """
    across = [dot.x for dots in series.values() for dot in dots]
    margin = max(0.08, 0.2 * (max(across) - min(across)))
    named: set[tuple[float, float]] = set()
    with drawn(title, x_label=x_label, y_label=y_label, size=(6.4, 4.0)) as chart:
        for number, (name, dots) in enumerate(series.items()):
            colour = SERIES[number % NUM_SERIES]
            chart.axes.errorbar(
                [dot.x for dot in dots],
                [dot.y for dot in dots],
                xerr=_lengths([(dot.x, dot.x_interval) for dot in dots]),
                yerr=_lengths([(dot.y, dot.y_interval) for dot in dots]),
                color=colour,
                marker=MARKERS[number % len(MARKERS)],
                linewidth=1.2,
                capsize=3,
                label=literal(name),
            )
            for dot in dots:
                if (dot.x, dot.y) not in named:  # each series begins at the unmerged model
                    offset = (6, 7) if number % 2 == 0 else (6, -15)
                    chart.axes.annotate(
                        dot.label, (dot.x, dot.y), xytext=offset, textcoords="offset points", color=colour
                    )
                named.add((dot.x, dot.y))
        chart.axes.axhline(chance, color=MUTED, linestyle=":", linewidth=1.2, label="chance")
        chart.axes.set_xlim(max(0.0, min(across) - margin), max(across) + margin)
        chart.axes.set_ylim(0, 1.08 * chart.axes.get_ylim()[1])
        chart.legend(len(series) + 1)
    return chart


def bars_chart(title: str, bars: Sequence[ChartBar], *, x_label: str) -> Chart:
    """Horizontal bars, the first on top. Each has the colour of its group; among groups, one without is grey."""
    groups = list(dict.fromkeys(bar.group for bar in bars if bar.group))
    with drawn(title, x_label=x_label, size=(6.4, 1.1 + 0.3 * len(bars))) as chart:
        axes, places = chart.axes, range(len(bars))
        for number, group in enumerate([*groups, ""]):
            own = [place for place in places if bars[place].group == group]
            colour = SERIES[number % NUM_SERIES] if group or not groups else MUTED
            label = literal(group) or None
            axes.barh(own, [bars[place].value for place in own], color=colour, height=0.68, label=label)
        for place, bar in zip(places, bars, strict=True):
            end = (max(0.0, bar.value), place)
            axes.annotate(bar.words, end, xytext=(4, 0), textcoords="offset points", va="center", color=INK)
        axes.set_yticks(places, [literal(bar.name) for bar in bars])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.grid(visible=False, axis="y")
        axes.invert_yaxis()
        values = [0.0, *(bar.value for bar in bars)]
        axes.set_xlim(min(values), 1.2 * max(values) or 1)
        chart.legend(len(groups) if len(groups) > 1 else 0)
    return chart


@dataclass(frozen=True)
class Outline:
    """A histogram."""

    label: str
    edges: Sequence[float]
    """(n + 1,), rising."""
    counts: Sequence[int]
    """(n,)."""


def histogram_chart(
    title: str,
    outlines: Sequence[Outline],
    *,
    x_label: str,
    y_label: str,
    is_log: bool = False,
    mark: tuple[float, str] | None = None,
) -> Chart:
    """Histograms over each other; a single one is filled. `mark` is a place on the axis with its name."""
    with drawn(title, x_label=x_label, y_label=y_label, layout=None) as chart:
        axes = chart.axes
        if len(outlines) == 1:
            axes.stairs(outlines[0].counts, outlines[0].edges, fill=True, color=SERIES[0])
        for number, own in enumerate(outlines if len(outlines) > 1 else ()):
            colour, dash = SERIES[number % NUM_SERIES], DASHES[number % len(DASHES)]
            label = literal(own.label)
            axes.stairs(own.counts, own.edges, color=colour, linestyle=dash, linewidth=1.6, label=label)
        left, right = min(own.edges[0] for own in outlines), max(own.edges[-1] for own in outlines)
        if mark is not None:
            axes.axvline(mark[0], color=INK, linestyle=":", linewidth=1.2, label=literal(mark[1]))
            right = max(right, 1.05 * mark[0])
        if is_log:
            _by_doublings(chart, left, right)
        else:
            axes.set_xlim(left, right + 0.04 * (right - left))  # room for the last number
            axes.locator_params(axis="x", nbins=6, integer=True)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: _count_in_short(value))
        num_entries = (len(outlines) if len(outlines) > 1 else 0) + (mark is not None)
        chart.place(num_entries)
        chart.legend(num_entries)
    return chart


def _count_in_short(value: float) -> str:
    """800, 12.5k, 3M: the margin has a fixed width. Empty for what is not a count."""
    if value != int(value):
        return ""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _by_doublings(chart: Chart, left: float, right: float) -> None:
    """A logarithmic x axis of three doublings at least, with plain numbers at some of them."""
    first, last = math.floor(math.log2(left)), math.ceil(math.log2(right))
    missing = max(0, 3 - (last - first))
    first, last = first - (missing + 1) // 2, last + missing // 2
    chart.axes.set_xscale("log", base=2)
    step = math.ceil((last - first + 1) / 7)
    ticks = [2.0**power for power in range(first, last + 1, step)]
    chart.axes.set_xticks(ticks, [f"{tick:,.0f}" if tick >= 1 else f"{tick:g}" for tick in ticks])
    chart.axes.minorticks_off()
    chart.axes.set_xlim(2.0 ** (first - 0.1), 2.0 ** (last + 0.25))  # room for the last number


def _lengths(values: Sequence[tuple[float, tuple[float, float]]]) -> list[list[float]]:
    """Values and intervals -> lengths of the error bars below and above."""
    return [
        [max(0.0, value - low) for value, (low, _) in values],
        [max(0.0, high - value) for value, (_, high) in values],
    ]


def _thinned(line: Curve) -> tuple[list[float], list[float]]:
    """The points to draw: all of them, or means of equal stretches."""
    y = [math.nan if value is None else value for value in line.y]
    stretch = math.ceil(len(y) / MOST_POINTS)
    if stretch <= 1:
        return list(line.x), y
    starts = range(0, len(y), stretch)
    return (
        [fmean(line.x[start : start + stretch]) for start in starts],
        [fmean(y[start : start + stretch]) for start in starts],
    )
