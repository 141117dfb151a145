"""What the training panel remembers: losses as short curves of block characters, and the scores of evaluations."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean

from rich.table import Table
from rich.text import Text

BLOCKS = "▁▂▃▄▅▆▇█"
MOST_POINTS = 512
"""At so many points a history is halved: each two become their mean."""


@dataclass
class History:
    """Values over the steps."""

    points: list[tuple[float, float]] = field(default_factory=list)
    """(step, value), in the order of the steps; each is the mean of `stride` values and has the step of the last."""
    stride: int = 1
    newest: list[tuple[float, float]] = field(default_factory=list)
    """Values that do not fill a point yet."""

    def add(self, step: float, value: float) -> None:
        """Add the newest value."""
        self.newest.append((step, value))
        if len(self.newest) < self.stride:
            return
        self.points.append((step, fmean(own for _, own in self.newest)))
        self.newest = []
        if len(self.points) == MOST_POINTS:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [(late, (first + second) / 2) for (_, first), (late, second) in pairs]
            self.stride *= 2

    def spark(self, width: int) -> str:
        """The values from the first step to the newest in `width` blocks, each the mean of its part of the steps.

        The lowest value is the lowest block. A part without a value repeats the block before it.
        """
        points = [*self.points, *self.newest]
        if len(points) < 2 or points[0][0] == points[-1][0] or width < 2:
            return ""
        (start, _), (end, _) = points[0], points[-1]
        parts: dict[int, list[float]] = {}
        width = min(width, len(points))
        for step, value in points:
            parts.setdefault(min(int((step - start) / (end - start) * width), width - 1), []).append(value)
        means = {part: fmean(values) for part, values in parts.items()}
        low, high = min(means.values()), max(means.values())
        drawn = ""
        for part in range(width):
            if part in means:
                drawn += BLOCKS[round((means[part] - low) / (high - low) * (len(BLOCKS) - 1)) if high > low else 0]
            else:
                drawn += drawn[-1]
        return drawn


@dataclass(frozen=True)
class Headline:
    """The score of an evaluator that the panel follows."""

    metric: str
    """Its name in metrics.jsonl."""
    words: str
    value: float
    """A fraction; higher is better."""
    chance: float | None = None


@dataclass
class Scores:
    """The scores of all evaluations, by their names in metrics.jsonl."""

    by_step: dict[str, dict[int, float]] = field(default_factory=dict)
    headlines: dict[str, Headline] = field(default_factory=dict)
    """Those that are shown."""

    def remember(self, line: Mapping[str, float | None]) -> None:
        """Take over a line of metrics.jsonl, of an earlier session."""
        for metric, value in line.items():
            if value is not None:
                self.by_step.setdefault(metric, {})[int(line["step"] or 0)] = value

    def add(self, step: int, headline: Headline) -> None:
        """Add what an evaluator found."""
        self.headlines[headline.metric] = headline
        self.by_step.setdefault(headline.metric, {})[step] = headline.value

    def table(self, width: int) -> Table | None:
        """The last evaluations, as many as fit `width` characters, with the best one; None before the first."""
        if not self.headlines:
            return None
        bests = {metric: _best(self.by_step[metric]) for metric in self.headlines}
        taken = [max(map(len, own)) + 2 for own in ([line.words for line in self.headlines.values()], bests.values())]
        steps = sorted({step for metric in self.headlines for step in self.by_step[metric]})
        column = max(len("100.0"), len(str(steps[-1]))) + 2
        steps = steps[-max(1, (width - sum(taken) - len("chance  step ")) // column) :]
        shown = Table.grid(padding=(0, 2))
        shown.add_column()
        for _ in range(len(steps) + 2):
            shown.add_column(justify="right", no_wrap=True)
        heads = ["evaluation, %", "chance", f"step {steps[0]}", *map(str, steps[1:]), "best"]
        shown.add_row(*(Text(head, style="dim") for head in heads))
        for metric, headline in self.headlines.items():
            scores = [_percent(self.by_step[metric].get(step)) for step in steps]
            best = Text(bests[metric], style="bold")
            shown.add_row(Text(headline.words), _percent(headline.chance), *scores, best)
        return shown


def _best(values: Mapping[int, float]) -> str:
    """26.0 at 160; of equal scores the first."""
    step = max(sorted(values), key=lambda own: values[own])
    return f"{_percent(values[step])} at {step}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"
