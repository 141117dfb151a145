"""Charts of the numbers of prepared data, from the histograms that dataset.json holds."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import frexp
from typing import Any

from mlip_cli.data.prepare.histograms import bins_in
from mlip_cli.report.canvas import Chart
from mlip_cli.report.charts import Outline, histogram_chart

Bins = Sequence[tuple[float, float, int]]
"""Least value, end and count of each bin, in order."""
BARS = (1, 35 / 32, 38 / 32, 42 / 32, 45 / 32, 49 / 32, 54 / 32, 59 / 32)
"""Where the eight bars of a doubling begin: the nearest 32nds to equal steps of the logarithm."""
MOST_BARS = 64
SHOWN_SHARE = 0.99
"""An axis that is not logarithmic ends behind this share of all: a single huge caption would leave no room."""


def bins_of_all(cards: Iterable[Mapping[str, Any]], name: str) -> Bins:
    """The bins of a number over all splits; none where a dataset.json has no histograms, as earlier versions wrote it.

    Raises:
        KeyError, ValueError, TypeError, AttributeError: a histogram is damaged.
    """
    counts: Counter[tuple[float, float]] = Counter()
    for card in cards:
        stored = card.get("statistics", {}).get("histograms", {}).get(name)
        for low, end, n in bins_in(stored) if stored is not None else ():
            counts[low, end] += n
    return [(low, end, n) for (low, end), n in sorted(counts.items())]


def log_chart(title: str, named: Mapping[str, Bins], *, x_label: str) -> Chart:
    """Histograms over doublings, eight bars for each."""
    outlines = [_by_log(name, bins) for name, bins in named.items() if bins]
    return histogram_chart(title, outlines, x_label=x_label, y_label="pictures", is_log=True)


def cut_off(bins: Bins) -> tuple[Bins, Bins]:
    """The bins of the smallest SHOWN_SHARE of all numbers, and the others."""
    remaining = SHOWN_SHARE * sum(n for _, _, n in bins)
    for place, (_, _, n) in enumerate(bins, start=1):
        remaining -= n
        if remaining <= 0:
            return bins[:place], bins[place:]
    return bins, ()


def plain_chart(title: str, bins: Bins, *, x_label: str, y_label: str, mark: tuple[float, str] | None = None) -> Chart:
    """A histogram of whole numbers in bars of equal width."""
    first, end = int(bins[0][0]), int(bins[-1][1])
    width = 1
    while width * MOST_BARS < end - first:
        width *= 2
    counts: Counter[int] = Counter()
    for low, _, n in bins:
        counts[int(low) // width] += n
    bars = range(min(counts), max(counts) + 1)
    edges = [bar * width - 0.5 for bar in (*bars, bars[-1] + 1)]
    outline = Outline("", edges, [counts[bar] for bar in bars])
    return histogram_chart(title, [outline], x_label=x_label, y_label=y_label, mark=mark)


def _by_log(label: str, bins: Bins) -> Outline:
    counts: Counter[int] = Counter()
    for low, end, n in bins:
        counts[_bar(low or end / 2)] += n
    bars = range(min(counts), max(counts) + 1)
    return Outline(label, [_start(bar) for bar in (*bars, bars[-1] + 1)], [counts[bar] for bar in bars])


def _bar(value: float) -> int:
    half, octave = frexp(value)
    return len(BARS) * (octave - 1) + sum(2 * half >= start for start in BARS[1:])


def _start(bar: int) -> float:
    return float(BARS[bar % len(BARS)] * 2.0 ** (bar // len(BARS)))
