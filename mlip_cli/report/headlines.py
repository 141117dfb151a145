"""What the pages open with: the question of each score, and what the stored results say, in plain words."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from mlip_cli.evaluate.picture_results import GalleryResult
from mlip_cli.evaluate.results import (
    DIRECTIONS,
    ClassRecall,
    PairedTest,
    SpeedAtSetting,
    SweepResult,
    ZeroshotResult,
    ZeroshotScores,
)
from mlip_cli.evaluate.statistics import SIGNIFICANT, Interval, paired, wilson
from mlip_cli.recipe.merge_plan import merge_method
from mlip_cli.report.record import RunRecord
from mlip_cli.report.tables import main_score, speedup_cell
from mlip_cli.terminal.output import percent, plural

WIDE = 0.25
"""Recalls of two classes that are at least so far apart differ widely, if their intervals do not overlap."""

NOT_SHOWN = "not shown"

MERGED_MEASURES = {"picture_r1": "text to image R@1", "acc1": "top-1", "text_to_image_r5": "text to image R@5"}
"""Paired measures of a sweep by which a page says what merging costs -> in words."""

ASKS = {"text_to_image": ("text", "picture"), "image_to_text": ("picture", "text")}
"""What a query is, and what it looks for."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """A score of a run with its question. Shares are fractions."""

    name: str
    data: tuple[str, ...]
    """Fingerprints: scores of two runs are compared on the same data only."""
    question: str
    answer: str
    """A sentence with the share and its interval, up to where chance follows."""
    value: float
    interval: Interval
    chance: float
    right: str = ""
    """For a paired test: a character (0 or 1) a sample; empty where they are not stored."""
    per_class: Sequence[ClassRecall] = field(default=())

    @property
    def sentence(self) -> str:
        """The answer beside chance."""
        return f"{self.answer}; guessing gives {percent(self.chance)} %, so it is {self.against_chance}."

    @property
    def against_chance(self) -> str:
        """Where the interval lies."""
        low, high = self.interval
        if low > self.chance:
            return "above chance"
        return "below chance" if high < self.chance else "not shown to be above chance"


def scores_of(record: RunRecord) -> list[Score]:
    """The recipe's data sets at its merge rate, then retrieval on the validation pairs, then other data sets."""
    gallery = record.newest(GalleryResult)
    pairs = [] if gallery is None else [_retrieval(gallery, way) for way in ASKS]
    asked = list(record.recipe.evaluate.zeroshot) if record.recipe is not None else []
    results = {result.dataset: result for result in newest_zeroshot(record)}
    own = [results.pop(name) for name in asked if name in results]
    return [*map(_zeroshot, own), *pairs, *map(_zeroshot, results.values())]


def _retrieval(gallery: GalleryResult, way: str) -> Score:
    recalls = gallery.scores[way]
    query, wanted = ASKS[way]
    return Score(
        name=f"{DIRECTIONS[way]} R@5",
        data=tuple(gallery.fingerprints),
        question=f"Does it find the right {wanted} for a {query} among {recalls.num_candidates:,} held-out ones?",
        answer=f"The right {wanted} is among the first 5 for {_share(recalls.r5, recalls.r5_interval)} of "
        f"{plural(recalls.n, query)}",
        value=recalls.r5,
        interval=recalls.r5_interval,
        chance=recalls.r5_chance,
    )


def _zeroshot(result: ZeroshotResult) -> Score:
    score = main_score(result, chance=result.chance)
    share = _share(score.value, score.interval)
    if result.asks_names_alone and result.pictures is not None:
        of = result.pictures
        per_class: Sequence[ClassRecall] = ()
        question = f"Does it find the right picture of {result.dataset} for a name, among {of.num_candidates:,}?"
        answer = f"The right picture comes first for {share} of {plural(of.n, 'name')}"
    else:
        per_class = result.per_class
        question = f"Does it name the class of a picture of {result.dataset}, one of {result.num_classes:,}?"
        answer = f"It puts {share} of the pictures of a class into the right one, on average"
    return Score(
        name=f"{result.dataset}: {score.words}",
        data=(result.data_fingerprint,),
        question=question,
        answer=answer,
        value=score.value,
        interval=score.interval,
        chance=score.chance,
        right=result.right.get(score.measure, ""),
        per_class=per_class,
    )


def _share(value: float, interval: Interval) -> str:
    return f"{percent(value)} % (95 %: {percent(interval.low)}–{percent(interval.high)})"


def newest_zeroshot(record: RunRecord) -> list[ZeroshotResult]:
    """The newest checkpoint's result on each data set, at the recipe's merge rate where it was measured."""
    merging = record.recipe.model.merging if record.recipe is not None else None
    rate = 0.0 if merging is None or merge_method(merging.method).drops else merging.rate
    results = record.all_of(ZeroshotResult)
    results.sort(key=lambda result: (result.step, result.merge_rate is None or result.merge_rate == rate))
    return list({result.dataset: result for result in results}.values())


def by_recall(classes: Sequence[ClassRecall]) -> list[ClassRecall]:
    """Classes with pictures, the best first."""
    seen = [own for own in classes if own.recall is not None]
    return sorted(seen, key=lambda own: (-(own.recall or 0.0), own.class_))


def far_apart(classes: Sequence[ClassRecall]) -> tuple[ClassRecall, ClassRecall] | None:
    """The best and the worst class if their recalls differ widely: the mean then hides both."""
    ordered = by_recall(classes)
    if len(ordered) < 2:
        return None
    best, worst = ordered[0], ordered[-1]
    gap = (best.recall or 0.0) - (worst.recall or 0.0)
    return (best, worst) if gap >= WIDE and class_interval(worst).high < class_interval(best).low else None


def class_interval(own: ClassRecall) -> Interval:
    """Wilson's interval of the recall of a class with pictures."""
    assert own.recall is not None, own
    return wilson(round(own.recall * own.n), own.n)


@dataclass(frozen=True)
class Difference:
    """A score of a run beside the same score of the first run."""

    points: float
    """In per cent."""
    is_shown: bool
    why: str

    @property
    def words(self) -> str:
        """+2.1 points: not shown, the intervals overlap"""
        verdict = ("better" if self.points > 0 else "worse") if self.is_shown else NOT_SHOWN
        return f"{self.points:+.1f} points: {verdict}, {self.why}"


def difference(first: Score, other: Score) -> Difference:
    """Shown where the 95 % intervals do not overlap, or where McNemar's test on the same pictures has p < 0.05."""
    points = 100 * (other.value - first.value)
    if other.interval.low > first.interval.high or other.interval.high < first.interval.low:
        return Difference(points, True, "the intervals do not overlap")
    if first.right and len(first.right) == len(other.right):
        test = PairedTest(**paired(first.right, other.right))
        is_shown = test.p < SIGNIFICANT and test.difference * points > 0
        return Difference(points, is_shown, f"the intervals overlap, p {test.p:.2g} by the paired test")
    return Difference(points, False, "the intervals overlap")


@dataclass(frozen=True)
class Comparison:
    """One question, and the scores of the runs that it was asked."""

    name: str
    scores: dict[str, Score]
    """By run; the first of them is what the others are compared with."""

    @property
    def differences(self) -> dict[str, Difference]:
        """By run, without the first."""
        first, *others = self.scores.items()
        return {run: difference(first[1], own) for run, own in others}


def compared(records: Sequence[RunRecord]) -> list[Comparison]:
    """Every question that the first run and another one were asked on the same data."""
    first, *others = [(record.name, scores_of(record)) for record in records]
    found = []
    for score in first[1]:
        scores = {first[0]: score}
        for run, own in others:
            same = [other for other in own if (other.name, other.data) == (score.name, score.data)]
            scores |= {run: same[0]} if same else {}
        if len(scores) > 1:
            found.append(Comparison(score.name, scores))
    return found


def verdict(first: str, run: str, comparisons: Sequence[Comparison]) -> str:
    """What the differences between two runs show, in one sentence."""
    differences = {own.name: own.differences[run] for own in comparisons if run in own.differences}
    if not differences:
        return f"{run} and {first} were not measured on the same data."
    if not any(own.is_shown for own in differences.values()):
        return f"It is {NOT_SHOWN} that {run} is better or worse than {first}: {_all(differences)} points."
    ways = {
        "better at": [name for name, own in differences.items() if own.is_shown and own.points > 0],
        "worse at": [name for name, own in differences.items() if own.is_shown and own.points < 0],
    }
    said = [f"{how} {_all({name: differences[name] for name in names})} points" for how, names in ways.items() if names]
    open_ones = [name for name, own in differences.items() if not own.is_shown]
    rest = f"; a difference at {', '.join(open_ones)} is {NOT_SHOWN}" if open_ones else ""
    return f"As trained here, {run} is {' and '.join(said)}, beside {first}{rest}. Other seeds may differ."


def _all(differences: dict[str, Difference]) -> str:
    """text to image R@5 +2.1, image to text R@5 -0.5"""
    return ", ".join(f"{name} {own.points:+.1f}" for name, own in differences.items())


def shown_setting(record: RunRecord, sweep: SweepResult) -> SpeedAtSetting | None:
    """The setting of a sweep that a page speaks of: the recipe's merging, else the highest rate of the first method."""
    merged = [point for point in sweep.points if point.method]
    if not merged:
        return None
    merging = record.recipe.model.merging if record.recipe is not None else None
    if merging is None:
        return max(merged, key=lambda point: point.rate)
    return min(merged, key=lambda point: (point.method != merging.method, abs(point.rate - merging.rate)))


def speed_words(point: SpeedAtSetting) -> str:
    """The speed-up that a page speaks of: one number for a model."""
    low, high = point.speedup_interval
    speed = speedup_cell(point.speedup, point.speedup_interval)
    assert speed is not None
    words = "faster" if low > 1 else "slower" if high < 1 else f"a gain in speed is {NOT_SHOWN}"
    return f"{speed.value} × as fast as without (95 %: {speed.low}–{speed.high}: {words})"


def merging_sentence(record: RunRecord) -> str | None:
    """What merging gains and costs, measured by the merge sweep; None where there is none."""
    sweep = record.newest(SweepResult)
    point = shown_setting(record, sweep) if sweep is not None else None
    if sweep is None or point is None:
        return None
    text = f"Merging ({point.method}, rate {point.true_rate:.2f}) makes the image tower {speed_words(point)}"
    for dataset in sweep.datasets[:1]:
        own = next(own for own in dataset.points if own.key == point.key)
        key = "text_to_image_r5"
        if isinstance(own, ZeroshotScores):
            key = main_score(own, chance=0.0).measure
        test = own.paired[key]
        words = "shown" if test.p < SIGNIFICANT else NOT_SHOWN
        name, points = MERGED_MEASURES[key], 100 * test.difference
        text += f"; {dataset.dataset} {name} {points:+.1f} points, a change is {words} (p {test.p:.2g})"
    return f"{text}."
