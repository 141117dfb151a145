"""The opening of a page: what was asked, what came out, and a picture of the scores, before anything else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlip_cli.evaluate.before_after import BeforeAfter
from mlip_cli.evaluate.results import ClassRecall
from mlip_cli.evaluate.statistics import Interval
from mlip_cli.report.before_after import changes_sentence
from mlip_cli.report.canvas import NUM_SERIES
from mlip_cli.report.costs import equal_terms
from mlip_cli.report.headlines import (
    Comparison,
    Score,
    class_interval,
    compared,
    far_apart,
    merging_sentence,
    scores_of,
    verdict,
)
from mlip_cli.report.page import Html, command, element, note
from mlip_cli.report.record import RunRecord
from mlip_cli.terminal.output import percent

MOST_QUESTIONS = 4
"""So many scores stand in the picture; the sections below have all."""

FULL_WIDTHS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
"""Shares that the whole width of the picture may stand for."""


RECALL_SO_FAR = "validation_text_to_image_r5"
"""A measure of metrics.jsonl, taken during training."""


@dataclass(frozen=True)
class Bar:
    """One line of the picture. Shares are fractions."""

    name: str
    value: float
    interval: Interval
    chance: float | None = None
    series: int = 0
    """Number of its colour."""
    is_part: bool = False
    """A class of the score above."""


def run_opening(record: RunRecord) -> Html:
    """The opening of the page of one run."""
    scores = scores_of(record)[:MOST_QUESTIONS]
    kept = record.newest(BeforeAfter)
    changed = changes_sentence(kept) if kept is not None else None
    if not scores:
        return _opening("What has it learned?", [_so_far(record), changed], note(*_measured_by(record)))
    bars = []
    for score in scores:
        bars.append(Bar(score.name, score.value, score.interval, score.chance))
        for own in far_apart(score.per_class) or ():
            assert own.recall is not None
            bars.append(Bar(own.class_, own.recall, class_interval(own), is_part=True))
    hidden = [_hidden_by_the_mean(score, apart) for score in scores if (apart := far_apart(score.per_class))]
    said = [scores[0].sentence, _origin(record), *hidden, changed, merging_sentence(record)]
    return _opening(scores[0].question, said, picture([bars]))


def comparison_opening(records: Sequence[RunRecord], *, methods: Mapping[str, str]) -> Html:
    """The opening of a page about several runs. The verdict of each run beside the first is its answer.

    Args:
        methods: the method of each run in words.
    """
    first, *others = records
    comparisons = compared(records)
    names = [f"{record.name} ({methods[record.name]})" for record in records]
    which = "better" if len(records) == 2 else "best"
    question = f"Which is {which}: {', '.join(names[:-1])} or {names[-1]}? {equal_terms(records)}"
    said = [verdict(first.name, other.name, comparisons) for other in others]
    groups = [_compared_bars(own, [record.name for record in records]) for own in comparisons[:MOST_QUESTIONS]]
    shown = [picture(groups, titles=[own.name for own in comparisons])] if groups else []
    seeds = "Intervals come from the test samples alone: a training with another seed moves a score too."
    return _opening(question, said, *shown, note(seeds))


def _origin(record: RunRecord) -> str | None:
    """Where weights come from that were not trained here."""
    return None if record.origin is None else f"Its weights are {record.origin.words}."


def _so_far(record: RunRecord) -> str:
    """What metrics.jsonl says where no result is stored."""
    if (origin := _origin(record)) is not None:
        return origin
    if record.last_loss is None:
        return "Nothing is logged yet."
    text = f"The loss is {record.last_loss} at step {record.last_step:,}"
    recalls = [line for line in record.evaluations if line.get(RECALL_SO_FAR) is not None]
    if recalls:
        text += f", and text to image R@5 {percent(recalls[-1][RECALL_SO_FAR])} % at step {recalls[-1]['step']:,}"
    return f"{text}. No result is stored yet, so nothing is shown."


def _measured_by(record: RunRecord) -> list[Html | str]:
    """How a run without results gets one."""
    names = record.recipe.evaluate.zeroshot if record.recipe is not None else ()
    dataset = "" if names else " --dataset NAME"
    return ["A result comes from ", command(f"mlip eval-zeroshot {record.place}{dataset}"), "."]


def _opening(asked: str, said: Sequence[str | None], *beside: Html) -> Html:
    """What was asked and what came out; the picture stands beside it, or below where there is no room.

    The first sentence of `said` is the verdict of the page, in large type.
    """
    outcome, *more = [sentence for sentence in said if sentence]
    return element(
        "div",
        element(
            "div",
            element("p", element("b", "Asked: "), asked),
            element("p", outcome, class_="outcome"),
            *(element("p", sentence) for sentence in more),
        ),
        element("div", *beside),
        class_="opening",
    )


def _hidden_by_the_mean(score: Score, apart: tuple[ClassRecall, ClassRecall]) -> str:
    best, worst = apart
    return (
        f"{score.name} of {percent(score.value)} % hides its classes: {best.class_} {percent(best.recall)} %, "
        f"{worst.class_} {percent(worst.recall)} %."
    )


def _compared_bars(comparison: Comparison, runs: Sequence[str]) -> list[Bar]:
    """A bar for each run, with its colour in the curves; beside it, whether its difference from the first is shown."""
    words = {run: f"{run} ({own.words})" for run, own in comparison.differences.items()}
    return [
        Bar(words.get(run, run), score.value, score.interval, score.chance, runs.index(run))
        for run, score in comparison.scores.items()
    ]


def picture(groups: Sequence[Sequence[Bar]], *, titles: Sequence[str] = ()) -> Html:
    """Bars with their 95 % intervals and chance; it needs no more width than a telephone has."""
    bars = [bar for group in groups for bar in group]
    highest = max(max(bar.interval.high, bar.chance or 0.0) for bar in bars)
    full = next(width for width in FULL_WIDTHS if width >= min(highest, 1.0))
    rows = []
    for number, group in enumerate(groups):
        if titles:
            rows.append(element("div", titles[number], class_="bars-title"))
        rows += [_bar(bar, full) for bar in group]
    return element(
        "figure",
        *rows,
        element("figcaption", f"Line: 95 % interval. Dotted: chance. The whole width is {100 * full:g} %."),
        class_="bars",
    )


def _bar(bar: Bar, full: float) -> Html:
    low, high = bar.interval

    def at(share: float) -> str:
        return f"{100 * min(share / full, 1.0):.2f}%"

    colour = f"var(--series-{bar.series % NUM_SERIES + 1})"
    track = [
        element("i", class_="fill", style=f"width: {at(bar.value)}; background: {colour}"),
        element("i", class_="whisker", style=f"left: {at(low)}; width: {at(high - low)}"),
    ]
    if bar.chance is not None:
        track.append(element("i", class_="chance", style=f"left: {at(bar.chance)}"))
    return element(
        "div",
        element("span", bar.name, class_="bar-name"),
        element("span", *track, class_="track"),
        element("span", f"{percent(bar.value)} %", class_="bar-value"),
        class_="bar-row is-part" if bar.is_part else "bar-row",
    )
