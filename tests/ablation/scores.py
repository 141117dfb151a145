"""From places in rankings to scores, intervals and verdicts; numpy alone.

LR is the mean log2 rank of the right answer: one less halves the ranks. A gain is how much smaller LR becomes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ablation.questions import QUESTIONS
from numpy.typing import NDArray

RESAMPLES = 10_000
WAYS = ("image_to_text", "text_to_image")

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def numbered(words: Sequence[str]) -> Ints:
    """Equal words, equal numbers."""
    return np.unique(np.asarray(words), return_inverse=True)[1]


def places(ranks: dict[str, str], way: str) -> list[Floats]:
    """The places, from 1, of each picture's right texts, or of the picture for each of them."""
    return [np.array(word.split(","), dtype=np.float64) for word in ranks[way].split()]


def log2_ranks(ranks: dict[str, str]) -> Floats:
    """Mean of both ways' log2 ranks, over a picture's texts: (pictures,)."""
    return np.mean([[np.log2(own).mean() for own in places(ranks, way)] for way in WAYS], axis=0)


def reciprocal_ranks(ranks: dict[str, str]) -> Floats:
    """Mean of both ways' reciprocal ranks, over a picture's texts: (pictures,)."""
    return np.mean([[(1 / own).mean() for own in places(ranks, way)] for way in WAYS], axis=0)


def recall(ranks: dict[str, str], way: str, k: int) -> Floats:
    """Share of a picture's texts that are among the first k: (pictures,)."""
    return np.array([(own <= k).mean() for own in places(ranks, way)])


def macro(values: Floats, sources: Ints) -> float:
    """Mean over sources of the mean over their pictures."""
    counts = np.bincount(sources)
    return float((np.bincount(sources, weights=values)[counts > 0] / counts[counts > 0]).mean())


def lr_by_question(result: dict[str, Any], at: str = "own", feature: str = "spatial") -> dict[str, float]:
    """Question -> LR."""
    return {
        name: macro(log2_ranks(result["at"][at][feature][name]), numbered(result["questions"][name]["sources"]))
        for name in QUESTIONS
    }


def score(result: dict[str, Any], at: str = "own", feature: str = "spatial") -> float:
    """The mean LR of the three questions."""
    return float(np.mean(list(lr_by_question(result, at, feature).values())))


@dataclass(frozen=True)
class Rows:
    """Log2 ranks of several seeds, a column for each picture of each question."""

    values: Floats
    """(seeds, columns)"""
    concepts: Ints
    """(columns,): number of the picture's concept, from 0."""
    cells: Ints
    """(columns,): number of its question and source together, from 0."""
    members: Floats
    """(questions, cells) of 0 and 1: which cells a question has."""

    @classmethod
    def of(cls, results: Sequence[dict[str, Any]], at: str = "own", feature: str = "spatial") -> "Rows":
        """Of the results of some seeds, which all have the same pictures."""
        asked = results[0]["questions"]
        values = [
            np.concatenate([log2_ranks(result["at"][at][feature][name]) for name in QUESTIONS]) for result in results
        ]
        cells, members, first = [], [], 0
        for name in QUESTIONS:
            own = numbered(asked[name]["sources"])
            cells.append(own + first)
            members.append((first, first + int(own.max()) + 1))
            first = members[-1][1]
        numbers = np.arange(first)
        return cls(
            np.stack(values),
            numbered([concept for name in QUESTIONS for concept in asked[name]["concepts"]]),
            np.concatenate(cells),
            np.array([(numbers >= low) & (numbers < high) for low, high in members], float),
        )

    def mean(self, sums: Floats, counts: Floats) -> float:
        """Mean over questions of the mean over their cells of the mean in a cell: (cells,), (cells,); empty cells are
        left out."""
        present = counts > 0
        means = np.where(present, sums / np.maximum(counts, 1), 0.0)
        return float(((self.members @ means) / (self.members @ present)).mean())

    def score(self, values: Floats) -> float:
        """The mean of one seed: (columns,)."""
        return self.mean(np.bincount(self.cells, weights=values), np.bincount(self.cells).astype(float))


def bootstrap(rows: Rows, *, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Scores of `rows` over concepts and seeds drawn with replacement, both at once: (resamples,).

    A draw of concepts weighs every picture by how often its concept came.
    """
    draws = np.random.default_rng(seed)
    num_seeds, num_concepts = len(rows.values), int(rows.concepts.max()) + 1
    shape = (num_concepts, rows.members.shape[1])
    # sums by (seed, concept, cell), so that a resample is a small matrix product
    place = rows.concepts * shape[1] + rows.cells
    sums = np.stack([np.bincount(place, weights=v, minlength=np.prod(shape)).reshape(shape) for v in rows.values])
    counts = np.bincount(place, minlength=np.prod(shape)).reshape(shape).astype(float)
    found = np.empty(resamples)
    for i in range(resamples):
        weights = np.bincount(draws.integers(num_concepts, size=num_concepts), minlength=num_concepts).astype(float)
        seeds = sums[draws.integers(num_seeds, size=num_seeds)].mean(0)
        found[i] = rows.mean(weights @ seeds, weights @ counts)
    return found


@dataclass(frozen=True)
class Contrast:
    """How much smaller the score of a first arm is than that of a second."""

    name: str
    gain: float
    low: float
    high: float
    p: float
    """Two-sided, for a gain of `-margin`."""
    seeds_agree: int
    """Seeds whose own gain is above `-margin`."""
    num_seeds: int
    margin: float = 0.0
    """0: better is asked for. Above 0: not worse than this."""

    def verdict(self, adjusted_p: float) -> str:
        """The rule fixed beforehand: 0 (or the margin) outside the interval, also after Holm's correction, and at least
        four of five seeds on the same side."""
        above = self.low > -self.margin
        agree = self.seeds_agree if above else self.num_seeds - self.seeds_agree
        is_shown = adjusted_p < 0.05 and self.num_seeds >= 5 and agree >= 0.8 * self.num_seeds
        if not is_shown or self.low <= -self.margin <= self.high:
            return "not shown"
        return ("not worse" if self.margin else "better") if above else "worse"


def contrast(name: str, first: Rows, second: Rows, *, margin: float = 0.0) -> Contrast:
    """Paired by seed and picture, 95 % interval and two-sided p by `bootstrap`."""
    rows = Rows(second.values - first.values, first.concepts, first.cells, first.members)
    means = bootstrap(rows)
    each = [rows.score(values) for values in rows.values]
    above = means + margin
    tail = min((np.sum(above <= 0) + 1) / (len(means) + 1), (np.sum(above >= 0) + 1) / (len(means) + 1))
    low, high = np.quantile(means, [0.025, 0.975])
    agree = sum(value > -margin for value in each)
    return Contrast(
        name, float(np.mean(each)), float(low), float(high), min(1.0, 2 * float(tail)), agree, len(each), margin
    )


def holm(p_values: Sequence[float], *, among: int | None = None) -> list[float]:
    """p values adjusted for their number (Holm 1979), in the given order.

    Args:
        among: how many tests there are; those without a value yet count as the least likely ones.
    """
    adjusted, most, number = [0.0] * len(p_values), 0.0, len(p_values) if among is None else among
    for place, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        most = max(most, min(1.0, (number - place) * p_values[i]))
        adjusted[i] = most
    return adjusted
