"""Charts as SVG whose colours belong to the page that shows them: lines, points with intervals, bars."""

import html
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from mlip_cli.evaluate.report.page import Html

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUM_SERIES = 6

INK, MUTED, LINE, PAPER = "#010101", "#020202", "#030303", "#040404"
SERIES = tuple(f"#0{number}0a0b" for number in range(1, NUM_SERIES + 1))
"""Stand-ins, drawn by matplotlib and then replaced by the page's colours or by those of a light page."""

VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    PAPER: "var(--paper)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, start=1)},
}
LIGHT = {
    INK: "#1b1f24",
    MUTED: "#59636e",
    LINE: "#d5dae1",
    PAPER: "#ffffff",
    **dict(zip(SERIES, ("#0b6bb3", "#c84f00", "#00805e", "#9a4d92", "#8a6a00", "#4c5fb8"), strict=True)),
}
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
"""Series differ by more than colour."""
MARKERS = ("o", "s", "^", "D", "v", "P")

STYLE = {
    "svg.fonttype": "none",  # text stays text
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "lines.linewidth": 1.6,
    "legend.fontsize": 9.5,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.2,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}

MOST_POINTS = 600
"""Points of a line; longer ones are drawn as means of equal stretches."""

COLUMNS = 3
"""Of a legend."""

FEW_POINTS = 12
"""Lines of no more points show each of them."""


@dataclass(frozen=True)
class Line:
    """One curve."""

    label: str
    """Empty for a curve that needs none."""
    x: Sequence[float]
    y: Sequence[float | None]
    """None where there was no finite number: a gap."""
    series: int = 0
    """Number of its colour, dash and marker."""


@dataclass(frozen=True)
class Dot:
    """One measured point with its 95 % intervals."""

    label: str
    x: float
    x_interval: tuple[float, float] | None
    y: float
    y_interval: tuple[float, float] | None


@dataclass(frozen=True)
class Bar:
    """One horizontal bar."""

    name: str
    value: float
    words: str
    """At its end."""
    group: str = ""


@dataclass(frozen=True)
class Picture:
    """A finished chart."""

    svg: str

    def in_page(self) -> Html:
        """With the page's colours, light and dark."""
        return Html(_recoloured(self.svg, VARIABLES))

    def as_file(self) -> str:
        """A file of its own, on white."""
        return _recoloured(self.svg, LIGHT)


def lines_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str = "",
    levels: Mapping[str, float] | None = None,
    from_zero: bool = False,
) -> Picture:
    """Curves over steps, with dotted horizontal `levels` such as chance, one a line or for all."""
    levels = levels or {}
    with _canvas(title, x_label=x_label, y_label=y_label, layout=None) as canvas:
        for line in lines:
            x, y = _thinned(line)
            canvas.axes.plot(
                x,
                y,
                color=SERIES[line.series % NUM_SERIES],
                linestyle=DASHES[line.series % len(DASHES)],
                marker=MARKERS[line.series % len(MARKERS)] if len(x) <= FEW_POINTS else None,
                markersize=4,
                label=_literal(line.label) or None,
            )
        for number, (name, level) in enumerate(levels.items()):
            colour = SERIES[number % NUM_SERIES] if len(levels) == len(lines) > 1 else MUTED
            canvas.axes.axhline(level, color=colour, linestyle=":", linewidth=1.2, label=name)
        canvas.axes.set_xlim(left=0)
        if from_zero:
            canvas.axes.set_ylim(bottom=0)
        num_entries = sum(bool(line.label) for line in lines) + len(levels)
        canvas.place(num_entries)
        canvas.legend(num_entries)
    return Picture(canvas.svg)


def dots_chart(
    title: str, series: Mapping[str, Sequence[Dot]], *, x_label: str, y_label: str, chance: float
) -> Picture:
    """Accuracy against speed: points with both intervals, joined in the order given."""
    with _canvas(title, x_label=x_label, y_label=y_label, size=(6.4, 4.0)) as canvas:
        for number, (name, dots) in enumerate(series.items()):
            colour = SERIES[number % NUM_SERIES]
            canvas.axes.errorbar(
                [dot.x for dot in dots],
                [dot.y for dot in dots],
                xerr=_lengths([(dot.x, dot.x_interval) for dot in dots]),
                yerr=_lengths([(dot.y, dot.y_interval) for dot in dots]),
                color=colour,
                marker=MARKERS[number % len(MARKERS)],
                linewidth=1.2,
                capsize=3,
                label=_literal(name),
            )
            for dot in dots:
                canvas.axes.annotate(dot.label, (dot.x, dot.y), xytext=(6, 7), textcoords="offset points", color=colour)
        canvas.axes.axhline(chance, color=MUTED, linestyle=":", linewidth=1.2, label="chance")
        canvas.axes.margins(x=0.12)
        canvas.axes.set_ylim(0, 1.08 * canvas.axes.get_ylim()[1])
        canvas.legend(len(series) + 1)
    return Picture(canvas.svg)


def bars_chart(title: str, bars: Sequence[Bar], *, x_label: str) -> Picture:
    """Horizontal bars, the first one on top, in the colours of their groups; grey beside groups if in none."""
    groups = list(dict.fromkeys(bar.group for bar in bars if bar.group))
    with _canvas(title, x_label=x_label, size=(6.4, 1.1 + 0.3 * len(bars))) as canvas:
        axes, places = canvas.axes, range(len(bars))
        for number, group in enumerate([*groups, ""]):
            own = [place for place in places if bars[place].group == group]
            colour = SERIES[number % NUM_SERIES] if group or not groups else MUTED
            label = _literal(group) or None
            axes.barh(own, [bars[place].value for place in own], color=colour, height=0.68, label=label)
        for place, bar in zip(places, bars, strict=True):
            axes.annotate(
                bar.words, (bar.value, place), xytext=(4, 0), textcoords="offset points", va="center", color=INK
            )
        axes.set_yticks(places, [_literal(bar.name) for bar in bars])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.grid(visible=False, axis="y")
        axes.invert_yaxis()
        axes.set_xlim(0, 1.2 * max((bar.value for bar in bars), default=1) or 1)
        canvas.legend(len(groups) if len(groups) > 1 else 0)
    return Picture(canvas.svg)


@dataclass
class _Canvas:
    """A chart in the making, and its SVG once it is made."""

    figure: "Figure"
    axes: "Axes"
    svg: str = ""

    def legend(self, num_entries: int) -> None:
        """Below the axes, where it covers nothing."""
        if num_entries:
            where = "outside lower left" if self.figure.get_layout_engine() is not None else "lower left"
            self.figure.legend(loc=where, ncols=min(COLUMNS, num_entries), frameon=False)

    def place(self, num_entries: int) -> None:
        """Fixed margins in inches with room for a legend: measuring every text takes longer than drawing."""
        width, height = self.figure.get_size_inches()
        rows = math.ceil(num_entries / COLUMNS)
        self.figure.subplots_adjust(
            left=0.62 / width,
            right=1 - 0.1 / width,
            top=1 - 0.3 / height,
            bottom=(0.5 + 0.07 * bool(rows) + 0.19 * rows) / height,
        )


@contextmanager
def _canvas(
    title: str,
    *,
    x_label: str,
    y_label: str = "",
    size: tuple[float, float] = (4.6, 3.0),
    layout: Literal["constrained"] | None = "constrained",
) -> Iterator[_Canvas]:
    """An empty chart in our style, for the block to fill; without a layout the block sets the margins."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context({**STYLE, "svg.hashsalt": title}):  # the same chart gives the same bytes
        figure = Figure(figsize=size, layout=layout)
        axes = figure.add_subplot()
        axes.set_title(_literal(title))
        axes.set_xlabel(_literal(x_label))
        axes.set_ylabel(_literal(y_label))
        axes.locator_params(axis="x", nbins=6)
        canvas = _Canvas(figure, axes)
        yield canvas
        file = io.StringIO()
        FigureCanvasSVG(figure).print_svg(
            file, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )  # savefig would draw twice
        canvas.svg = _svg(file.getvalue(), title)


def _svg(written: str, title: str) -> str:
    """Only the <svg> element of a file of matplotlib's, with a name for those who cannot see it."""
    start = written.index("<svg")
    body = re.sub(r"<metadata>.*?</metadata>", "", written[start:], flags=re.DOTALL)
    label = html.escape(title)
    return re.sub(r"^<svg ", f'<svg role="img" aria-label="{label}" ', body).strip()


def _recoloured(svg: str, colours: Mapping[str, str]) -> str:
    return re.sub("#0[0-9a-f]{5}", lambda found: colours.get(found.group(), found.group()), svg)


def _literal(text: str) -> str:
    """Text that matplotlib must not read as a formula."""
    return text.replace("$", r"\$")


def _lengths(values: Sequence[tuple[float, tuple[float, float] | None]]) -> list[list[float]]:
    """Values and intervals -> lengths below and above, as error bars want them."""
    ends = [interval or (value, value) for value, interval in values]
    below = [max(0.0, value - low) for (value, _), (low, _) in zip(values, ends, strict=True)]
    above = [max(0.0, high - value) for (value, _), (_, high) in zip(values, ends, strict=True)]
    return [below, above]


def _thinned(line: Line) -> tuple[list[float], list[float]]:
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
