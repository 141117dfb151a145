"""Intervals, chance and the paired test against scipy, by hand and by simulation."""

from itertools import product

import numpy as np
import pytest
from scipy.stats import binomtest

from mlip_cli.evaluate.statistics import (
    by_cluster,
    chance_at,
    cluster_interval,
    mcnemar,
    mean_recall_interval,
    metric_prefix,
    paired,
    sign_flips,
    wilson,
)


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (0, 374), (37, 374), (25_000, 50_000), (9, 9)])
def test_wilson_equals_scipy(hits: int, n: int) -> None:
    expected = binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_wilson_refuses_impossible_counts() -> None:
    with pytest.raises(ValueError, match="5 hits among 4"):
        wilson(5, 4)
    with pytest.raises(ValueError, match="0 hits among 0"):
        wilson(0, 0)


@pytest.mark.parametrize("recalls", [[0.3] * 9, [0.9, 0.02, 0.5, 0.1, 0.6, 0.0, 0.2, 0.4, 0.05], [0.0] * 9])
def test_mean_recall_interval_covers_the_truth_in_95_percent(recalls: list[float]) -> None:
    counts = np.array([30, 75, 30, 26, 43, 17, 53, 45, 55])  # about the groups of the OpenMoji test set
    random = np.random.default_rng(0)
    truth, covered, rounds = np.mean(recalls), 0, 1000
    for hits in random.binomial(counts, recalls, size=(rounds, 9)):
        low, high = mean_recall_interval(hits.tolist(), counts.tolist())
        covered += low <= truth <= high
    assert 0.93 * rounds <= covered


def test_mean_recall_interval_is_no_wider_than_it_must_be() -> None:
    counts = [40] * 9
    low, high = mean_recall_interval([12] * 9, counts)
    normal = 2 * 1.96 * np.sqrt(9 * 0.3 * 0.7 / 40) / 9
    assert high - low == pytest.approx(normal, rel=0.03)


def test_mean_recall_interval_leaves_out_classes_without_samples() -> None:
    assert mean_recall_interval([3, 0, 5], [10, 0, 10]) == mean_recall_interval([3, 5], [10, 10])
    with pytest.raises(ValueError, match="no class has a sample"):
        mean_recall_interval([0], [0])


def test_chance_is_the_share_of_random_orders() -> None:
    random = np.random.default_rng(0)
    orders = random.permuted(np.tile(np.arange(12), (20_000, 1)), axis=1)
    hit = np.isin(orders[:, :5], [0, 1]).any(axis=1).mean()
    assert chance_at(5, accepted=2, candidates=12) == pytest.approx(hit, abs=0.01)
    assert chance_at(1, accepted=1, candidates=9) == pytest.approx(1 / 9)
    assert chance_at(10, accepted=1, candidates=9) == 1.0


@pytest.mark.parametrize(("a", "b"), [(0, 0), (0, 5), (5, 0), (10, 10), (30, 12), (4000, 4200)])
def test_mcnemar_equals_the_exact_binomial_test(a: int, b: int) -> None:
    expected = binomtest(a, a + b, 0.5).pvalue if a + b else 1.0
    assert mcnemar(a, b) == pytest.approx(expected, rel=1e-6)


def test_mean_recall_interval_of_one_class_is_agresti_and_coulls() -> None:
    share = 10 / 44  # 8 of 40, with two hits and two misses more
    half = 1.96 * np.sqrt(share * (1 - share) / 44)
    assert mean_recall_interval([8], [40]) == pytest.approx((share - half, share + half), abs=1e-5)


@pytest.mark.parametrize("gains", [[1] * 7 + [-1] * 2, [3, 2, -1, 1, 1, -2, 4], [0, 0], [5], [2, -2]])
def test_signs_are_flipped_in_every_way(gains: list[int]) -> None:
    sums = [abs(sum(s * g for s, g in zip(signs, gains, strict=True))) for signs in product((1, -1), repeat=len(gains))]
    expected = sum(found >= abs(sum(gains)) for found in sums) / len(sums)
    assert sign_flips(gains) == pytest.approx(expected, rel=1e-12)


def test_captions_of_one_picture_count_as_one() -> None:
    assert sign_flips([1] * 30 + [-1] * 12) == pytest.approx(mcnemar(30, 12), rel=1e-9)
    alone, five_each = paired("0" * 12, "1" * 12), paired("0" * 60, "1" * 60, [i // 5 for i in range(60)])
    assert five_each["p"] == pytest.approx(alone["p"], rel=1e-9)
    assert (five_each["won"], five_each["lost"], five_each["difference"]) == (60, 0, 1.0)


def test_paired_differences() -> None:
    assert paired("11100", "10011") == {"difference": 0.0, "won": 2, "lost": 2, "p": 1.0}
    assert paired("11110", "00000") == {"difference": -0.8, "won": 0, "lost": 4, "p": mcnemar(4, 0)}


@pytest.mark.parametrize(
    ("name", "prefix"), [("openmoji", "openmoji"), ("shards:data/x", "shards_data_x"), ("wds/cars", "wds_cars")]
)
def test_measures_are_named_after_their_data_set(name: str, prefix: str) -> None:
    assert metric_prefix(name) == prefix


def test_bootstrap_draws_whole_clusters() -> None:
    assert by_cluster([1.0, 0.5, 0.0, 1.0], [2, 0, 2, 2]) == ([0.5, 2.0], [1, 3])
    assert cluster_interval([3.0], [4]) == (0.0, 1.0)
    assert cluster_interval([1.0] * 50, [4] * 50) == (0.25, 0.25)
    one = np.random.default_rng(0).integers(0, 2, 400).astype(float)
    low, high = cluster_interval(one.tolist(), [1] * 400)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)
    low, high = cluster_interval((4 * one).tolist(), [4] * 400)  # four equal answers tell no more than one
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)
