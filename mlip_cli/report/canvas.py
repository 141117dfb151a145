"""Charts as SVG in the colours of a page. Matplotlib draws them in placeholder colours, which are then replaced."""

import html
import io
import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mlip_cli.paths import escaped
from mlip_cli.report.page import Html

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


NUM_SERIES = 6

INK, MUTED, LINE = "#010101", "#020202", "#030303"
SERIES = tuple(f"#0{number}0a0b" for number in range(1, NUM_SERIES + 1))
"""Placeholders: replaced by the variables of the page, or by the colours of a light page."""

VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, start=1)},
}
LIGHT = {
    INK: "#1b1f24",
    MUTED: "#59636e",
    LINE: "#d5dae1",
    **dict(zip(SERIES, ("#0b6bb3", "#c84f00", "#00805e", "#9a4d92", "#8a6a00", "#4c5fb8"), strict=True)),
}
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
"""Series differ in dashes and markers too, not only in colour."""
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

LEGEND_COLUMNS = 3


@dataclass
class Chart:
    """A chart in the making, and its SVG once it is made."""

    figure: "Figure"
    axes: "Axes"
    svg: str = ""

    def in_page(self) -> Html:
        """With the page's colours, light and dark."""
        return Html(_recoloured(self.svg, VARIABLES))

    def as_file(self) -> str:
        """A file of its own, on white."""
        return _recoloured(self.svg, LIGHT)

    def legend(self, num_entries: int) -> None:
        """Draw the legend below the axes, where it covers nothing."""
        if num_entries:
            where = "outside lower left" if self.figure.get_layout_engine() is not None else "lower left"
            self.figure.legend(loc=where, ncols=min(LEGEND_COLUMNS, num_entries), frameon=False)

    def place(self, num_entries: int) -> None:
        """Set fixed margins in inches with room for a legend. Measuring every text would take longer than drawing."""
        width, height = self.figure.get_size_inches()
        rows = math.ceil(num_entries / LEGEND_COLUMNS)
        self.figure.subplots_adjust(
            left=0.72 / width,
            right=1 - 0.1 / width,
            top=1 - 0.3 / height,
            bottom=(0.5 + 0.07 * bool(rows) + 0.19 * rows) / height,
        )


@contextmanager
def drawn(
    title: str,
    *,
    x_label: str,
    y_label: str = "",
    size: tuple[float, float] = (4.6, 3.0),
    layout: Literal["constrained"] | None = "constrained",
) -> Iterator[Chart]:
    """Yield an empty chart for the block to fill. Without a layout the block sets the margins."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # without a home folder it warns of its cache
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context({**STYLE, "svg.hashsalt": escaped(title)}):  # the same chart gives the same bytes
        figure = Figure(figsize=size, layout=layout)
        axes = figure.add_subplot()
        axes.set_title(literal(title))
        axes.set_xlabel(literal(x_label))
        axes.set_ylabel(literal(y_label))
        axes.locator_params(axis="x", nbins=6)
        chart = Chart(figure, axes)
        yield chart
        file = io.StringIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # text stays text: the browser's
            # savefig would draw twice
            FigureCanvasSVG(figure).print_svg(file, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    # the <svg> element alone, with the title as its name for screen readers
    _, _, body = re.sub(r"<metadata>.*?</metadata>", "", file.getvalue(), flags=re.DOTALL).partition("<svg ")
    chart.svg = f'<svg role="img" aria-label="{html.escape(title)}" {body}'.strip()


def _recoloured(svg: str, colours: Mapping[str, str]) -> str:
    return re.sub("#0[0-9a-f]{5}", lambda found: colours.get(found.group(), found.group()), svg)


def literal(text: str) -> str:
    """Text that matplotlib does not read as a formula; its fonts take no control characters."""
    return escaped(text, keep="\n").replace("$", r"\$")
