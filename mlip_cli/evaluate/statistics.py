"""Intervals, chance levels and paired tests of scores: from counts to fractions in [0, 1]. No torch."""

import re
from collections.abc import Sequence
from math import comb, exp, lgamma, log, sqrt
from typing import Any, NamedTuple

MANY_CLASSES = 20
"""With fewer classes top-5 says little: chance alone reaches 25 % or more."""

BELOW_CHANCE = "below chance: are the class names right?"

Z95 = 1.959963984540054

SIGNIFICANT = 0.05
"""A paired test with a smaller p shows a difference."""

RESAMPLES = 2000
"""Draws of a bootstrap. The ends of a 95 % interval then vary by about 1/30 of its width."""


def metric_prefix(name: str) -> str:
    """The start of a data set's metric names in metrics.jsonl: shards:data/x -> shards_data_x."""
    return re.sub(r"\W+", "_", name)


class Interval(NamedTuple):
    """A 95 % interval of a fraction."""

    low: float
    high: float


def wilson(hits: int, n: int) -> Interval:
    """Score interval of a binomial share (Wilson 1927). It holds near 0 and 1, where the normal interval is empty."""
    if not 0 <= hits <= n or n == 0:
        raise ValueError(f"{hits} hits among {n}")
    share, z2 = hits / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    low = 0.0 if hits == 0 else centre - half
    high = 1.0 if hits == n else centre + half
    return Interval(low, high)


def is_below_chance(interval: Interval, chance: float) -> bool:
    """Whether a score is worse than guessing, beyond its 95 % interval."""
    return interval.high < chance


def mean_recall_interval(hits: Sequence[int], counts: Sequence[int]) -> Interval:
    """Interval of the mean of per-class recalls. Classes without samples are left out.

    The mean is a linear function of independent binomial shares, all with the coefficient 1/m. Closed form of Price and
    Bonett (2004, "An improved confidence interval for a linear function of binomial proportions"): 2/m hits and 2/m
    misses are added to each class, then the variances are summed. Unlike a bootstrap it needs no random numbers and is
    not empty where a class is all right or all wrong; for m = 1 it is the interval of Agresti and Coull.
    """
    classes = [(k, n) for k, n in zip(hits, counts, strict=True) if n > 0]
    if not classes:
        raise ValueError("no class has a sample")
    m = len(classes)
    shares = [((k + 2 / m) / (n + 4 / m), n + 4 / m) for k, n in classes]
    centre = sum(p for p, _ in shares) / m
    half = Z95 * sqrt(sum(p * (1 - p) / n for p, n in shares)) / m
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def chance_at(k: int, *, accepted: int, candidates: int) -> float:
    """Probability that a random order of `candidates` has one of the `accepted` right ones among its first k."""
    if not 0 < accepted <= candidates:
        raise ValueError(f"{accepted} right ones among {candidates} candidates")
    misses = candidates - accepted
    return 1.0 - comb(misses, k) / comb(candidates, k) if k < candidates else 1.0


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p of McNemar's test, from the numbers of samples that only one of the two gets right."""
    n, fewer = only_first + only_second, min(only_first, only_second)
    if n == 0:
        return 1.0
    tail = sum(exp(lgamma(n + 1) - lgamma(i + 1) - lgamma(n - i + 1) - n * log(2)) for i in range(fewer + 1))
    return min(1.0, 2 * tail)


def sign_flips(gains: Sequence[int]) -> float:
    """Exact two-sided p of the randomisation test that gives each gain a random sign (Fisher 1935, section 21).

    With gains of 1 and -1 this is McNemar's test. The distribution of the sum is built up gain by gain.
    """
    import numpy as np

    sizes = [abs(gain) for gain in gains if gain]
    reach = sum(sizes)
    chances = np.zeros(2 * reach + 1)
    chances[reach] = 1.0
    for size in sizes:
        chances = (np.roll(chances, size) + np.roll(chances, -size)) / 2  # np.roll wraps zeros only
    sums = np.arange(-reach, reach + 1)
    return min(1.0, float(chances[np.abs(sums) >= abs(sum(gains))].sum()))


def paired(first: str, other: str, cluster_of: Sequence[int] | None = None) -> dict[str, Any]:
    """Difference of two strings of hits (`1`) and misses (`0`) on the same samples, with McNemar's exact test.

    `won` counts the samples that only `other` got right, `lost` those that only `first` did. Samples of one cluster
    depend on each other: with clusters the test is `sign_flips` of the gain of each cluster.
    """
    pairs = list(zip(first, other, strict=True))
    won, lost = pairs.count(("0", "1")), pairs.count(("1", "0"))
    if cluster_of is None:
        p = mcnemar(lost, won)
    else:
        gains, _ = by_cluster([int(b) - int(a) for a, b in pairs], cluster_of)
        p = sign_flips([round(gain) for gain in gains])
    return {"difference": (won - lost) / len(pairs), "won": won, "lost": lost, "p": p}


def by_cluster(values: Sequence[float], cluster_of: Sequence[int]) -> tuple[list[float], list[int]]:
    """Sum and number of the values of each cluster, in the order of the clusters' numbers."""
    sums: dict[int, float] = {}
    counts: dict[int, int] = {}
    for value, cluster in zip(values, cluster_of, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value
        counts[cluster] = counts.get(cluster, 0) + 1
    order = sorted(sums)
    return [sums[cluster] for cluster in order], [counts[cluster] for cluster in order]


def cluster_interval(sums: Sequence[float], counts: Sequence[int]) -> Interval:
    """Interval of a mean whose values come in clusters: sum(sums) / sum(counts), by the percentile bootstrap.

    Whole clusters are drawn again (Davison and Hinkley 1997, section 3.8), since values of one cluster depend on each
    other. The draws are always the same. A single cluster shows no spread: its interval is 0 to 1. If all values are 0
    or all are 1, every draw is equal: then it is Wilson's interval with one sample for each cluster.
    """
    if len(sums) < 2:
        return Interval(0.0, 1.0)
    if sum(sums) in (0, sum(counts)):
        return wilson(len(sums) if sum(sums) else 0, len(sums))
    return _bootstrap(sums, counts)


def paired_interval(first: str, other: str, cluster_of: Sequence[int] | None = None) -> Interval:
    """Interval of the difference that `paired` finds, in [-1, 1].

    Closed form of Bonett and Price (2012, "Adjusted Wald confidence interval for a difference of binomial proportions
    based on paired data"): one is added to each kind of pairs that differ. With clusters it is the percentile bootstrap
    of `cluster_interval`; if no cluster gains or loses, the closed form with one sample for each cluster.
    """
    gains = [int(b) - int(a) for a, b in zip(first, other, strict=True)]
    won, lost, n = gains.count(1), gains.count(-1), len(gains)
    if cluster_of is not None:
        sums, counts = by_cluster(gains, cluster_of)
        if len(sums) > 1 and any(sums):
            return _bootstrap(sums, counts)
        won = lost = 0
        n = len(sums)
    up, down = (won + 1) / (n + 2), (lost + 1) / (n + 2)
    half = Z95 * sqrt((up + down - (up - down) ** 2) / (n + 2))
    return Interval(max(-1.0, up - down - half), min(1.0, up - down + half))


def _bootstrap(sums: Sequence[float], counts: Sequence[int]) -> Interval:
    """Percentiles of sum(sums) / sum(counts) when clusters are drawn again; the draws are always the same."""
    import numpy as np

    totals, numbers = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    random = np.random.default_rng(0)
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        drawn = random.integers(0, len(totals), len(totals))
        means[i] = totals[drawn].sum() / numbers[drawn].sum()
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(low), float(high))
