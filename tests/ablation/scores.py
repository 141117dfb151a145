"""From places in rankings to scores, intervals and verdicts; numpy alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
WAYS = ("image_to_text", "text_to_image")


@dataclass(frozen=True)
class Rows:
    """Per picture values of several seeds, and what they are averaged over."""

    values: NDArray[np.float64]
    """(seeds, pictures)"""
    concepts: NDArray[np.int64]
    """(pictures,): number of each picture's concept, from 0."""
    sources: NDArray[np.int64]
    """(pictures,): number of each picture's source, from 0."""


def numbered(words: Sequence[str]) -> NDArray[np.int64]:
    """Equal words, equal numbers."""
    return np.unique(np.asarray(words), return_inverse=True)[1]


def places(result: dict[str, Any], way: str, at: str, feature: str) -> NDArray[np.int64]:
    """Where each picture's right answer stands, from 1: (pictures,)."""
    return np.array(result["at"][at][feature][way].split(), dtype=np.int64)


def reciprocal_ranks(result: dict[str, Any], at: str = "own", feature: str = "spatial") -> NDArray[np.float64]:
    """Mean of both ways' reciprocal ranks: (pictures,)."""
    return np.mean([1 / places(result, way, at, feature) for way in WAYS], axis=0)


def recall(result: dict[str, Any], way: str, k: int, at: str = "own", feature: str = "spatial") -> NDArray[np.float64]:
    """Whether the right one is among the first k: (pictures,) of 0 and 1."""
    return (places(result, way, at, feature) <= k).astype(float)


def macro(values: NDArray[np.float64], sources: NDArray[np.int64]) -> float:
    """Mean over sources of the mean over their pictures."""
    counts = np.bincount(sources)
    return float((np.bincount(sources, weights=values) / counts)[counts > 0].mean())


def group_recall(result: dict[str, Any], groups: Sequence[str], at: str = "own") -> float:
    """Mean over groups of the share of their pictures that are right, groups that training did not have left out."""
    known = [(group, hit) for group, hit in zip(groups, result["at"][at]["group_hits"], strict=True) if hit != "-"]
    return macro(np.array([hit == "1" for _, hit in known], float), numbered([group for group, _ in known]))


def bootstrap(rows: Rows, *, resamples: int = RESAMPLES, seed: int = 0) -> NDArray[np.float64]:
    """Macro means of `rows` over concepts and seeds drawn with replacement, both at once: (resamples,).

    A draw of concepts weighs every picture by how often its concept came.
    """
    draws = np.random.default_rng(seed)
    num_seeds, num_concepts = len(rows.values), int(rows.concepts.max()) + 1
    num_sources = int(rows.sources.max()) + 1
    # sums by (seed, concept, source), so that a resample is a small matrix product
    cell = rows.concepts * num_sources + rows.sources
    shape = (num_concepts, num_sources)
    sums = np.stack([np.bincount(cell, weights=v, minlength=np.prod(shape)).reshape(shape) for v in rows.values])
    counts = np.bincount(cell, minlength=np.prod(shape)).reshape(shape).astype(float)
    means = np.empty(resamples)
    for i in range(resamples):
        weights = np.bincount(draws.integers(num_concepts, size=num_concepts), minlength=num_concepts).astype(float)
        seeds = sums[draws.integers(num_seeds, size=num_seeds)].mean(0)
        size = weights @ counts
        means[i] = ((weights @ seeds)[size > 0] / size[size > 0]).mean()
    return means


@dataclass(frozen=True)
class Contrast:
    """A difference of two runs' macro means, first minus second."""

    name: str
    difference: float
    low: float
    high: float
    p: float
    seeds_agree: int
    num_seeds: int

    def verdict(self, adjusted_p: float) -> str:
        """The rule fixed beforehand: interval without 0, also after Holm's correction, and 4 of 5 seeds agree."""
        agree = self.seeds_agree >= 0.8 * self.num_seeds and self.num_seeds >= 5
        if adjusted_p >= 0.05 or not agree or self.low <= 0 <= self.high:
            return "not shown"
        return "better" if self.low > 0 else "worse"


def contrast(name: str, first: Rows, second: Rows) -> Contrast:
    """Paired by seed and picture, 95 % interval and two-sided p by `bootstrap`."""
    rows = Rows(first.values - second.values, first.concepts, first.sources)
    means = bootstrap(rows)
    each = [macro(values, rows.sources) for values in rows.values]
    difference = float(np.mean(each))
    tail = min((np.sum(means <= 0) + 1) / (len(means) + 1), (np.sum(means >= 0) + 1) / (len(means) + 1))
    low, high = np.quantile(means, [0.025, 0.975])
    agree = sum(value * difference > 0 for value in each)
    return Contrast(name, difference, float(low), float(high), min(1.0, 2 * float(tail)), agree, len(each))


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
