"""The order is a bijection in every epoch, the same everywhere, and any part of it can be had alone."""

import numpy as np
import pytest

from mlip_cli.data.order import BLOCK_POSITIONS, Order, Position, hash_of, permute
from mlip_cli.errors import UsageError


def test_golden_values() -> None:
    """These numbers decide what every run reads: they must never change."""
    assert hash_of(0) == 6238072747940578789
    assert hash_of(1, 2) == 14485136212573827553
    assert permute(np.arange(10), 10, hash_of(0, 0, 0)).tolist() == [5, 7, 9, 8, 2, 3, 0, 1, 6, 4]
    assert permute(np.array([0, 1, 10**7]), 12_423_374, hash_of(7)).tolist() == [10399986, 5239015, 1703853]
    plain = Order([5, 8], None, seed=3, global_batch_size=4).positions(np.arange(10, 18))
    assert plain.source.tolist() == [1, 0, 1, 1, 1, 1, 1, 0]
    assert plain.index.tolist() == [5, 2, 6, 3, 7, 1, 2, 1]
    assert plain.epoch.tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    weighted = Order([5, 8], [1, 0.1], seed=3, global_batch_size=4).positions(
        np.arange(BLOCK_POSITIONS - 4, BLOCK_POSITIONS + 4)
    )
    assert weighted.source.tolist() == [0, 0, 0, 0, 0, 0, 0, 0]
    assert weighted.index.tolist() == [3, 3, 2, 2, 2, 0, 2, 0]
    assert weighted.epoch.tolist() == [4651, 8363, 1008, 4635, 19603, 17655, 16869, 16288]
    assert Order([5, 8], None, seed=3, global_batch_size=4).replacement(17, 2) == Position(source=0, index=2, epoch=1)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 255, 1000, 4097])
def test_permute_is_a_bijection(n: int) -> None:
    for seed in range(3):
        assert np.array_equal(np.sort(permute(np.arange(n), n, hash_of(seed))), np.arange(n))


def test_permute_looks_random() -> None:
    """Places and values fall evenly into a 50 x 50 table; two keys, and neighbours, are unrelated."""
    n = 100_000
    x, y = permute(np.arange(n), n, hash_of(1, 2)), permute(np.arange(n), n, hash_of(1, 3))
    table = np.histogram2d(x, np.arange(n), bins=50)[0]
    expected = n / 2500
    assert 0.9 < ((table - expected) ** 2 / expected).sum() / 49**2 < 1.1
    assert abs(np.corrcoef(x, y)[0, 1]) < 0.02
    assert abs(np.corrcoef(x[1:], x[:-1])[0, 1]) < 0.02


def test_every_epoch_leaves_out_another_tail_and_repeats_nothing() -> None:
    order = Order([30, 23], None, seed=0, global_batch_size=8)
    assert (order.num_samples, order.steps_per_epoch) == (53, 6)
    left_out = set()
    for epoch in range(5):
        found = order.positions(np.arange(epoch * 48, (epoch + 1) * 48))
        assert set(found.epoch.tolist()) == {epoch}
        ids = set(zip(found.source.tolist(), found.index.tolist(), strict=True))
        assert len(ids) == 48
        left_out.add(frozenset({(0, i) for i in range(30)} | {(1, i) for i in range(23)}) - ids)
    assert len(left_out) == 5


@pytest.mark.parametrize("weights", [None, (1.0, 2.0, 0.5)])
def test_random_access_equals_sequential(weights: tuple[float, ...] | None) -> None:
    order = Order([100, 500, 40], weights, seed=7, global_batch_size=16)
    t = np.arange(BLOCK_POSITIONS - 2000, BLOCK_POSITIONS + 2000)
    whole = order.positions(t)
    some = np.random.default_rng(0).permutation(len(t))[:300]
    part = order.positions(t[some])
    assert np.array_equal(part.source, whole.source[some])
    assert np.array_equal(part.index, whole.index[some])
    assert np.array_equal(part.epoch, whole.epoch[some])


def test_weighted_sources_have_their_shares_and_repeat_only_between_epochs() -> None:
    sizes, weights = (10_000, 30_000, 500), (1.0, 2.0, 0.1)
    order = Order(sizes, weights, seed=7, global_batch_size=128)
    assert order.steps_per_epoch is None
    blocks = 3
    found = order.positions(np.arange(blocks * BLOCK_POSITIONS))
    for source, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        mine = found.source == source
        for block in range(blocks):
            drawn = mine[block * BLOCK_POSITIONS : (block + 1) * BLOCK_POSITIONS].sum()
            assert abs(drawn - BLOCK_POSITIONS * weight / 3.1) <= 1
        for epoch in range(int(found.epoch[mine].max())):
            index = found.index[mine & (found.epoch == epoch)]
            assert np.array_equal(np.sort(index), np.arange(size))


def test_seeds_give_different_orders() -> None:
    a, b = (Order([1000], None, seed=seed, global_batch_size=10).positions(np.arange(1000)).index for seed in (0, 1))
    assert (a == b).sum() < 10


@pytest.mark.parametrize("weights", [None, (1.0, 1.0)])
def test_replacement_stays_in_the_source_and_differs_by_attempt(weights: tuple[float, ...] | None) -> None:
    order = Order([1000, 2000], weights, seed=1, global_batch_size=10)
    for t in (0, 17, 2999, 70_000):
        bad = order.positions(np.array([t]))
        found = [order.replacement(t, attempt) for attempt in range(1, 9)]
        assert {(p.source, p.epoch) for p in found} == {(int(bad.source[0]), int(bad.epoch[0]))}
        assert len({p.index for p in found} | {int(bad.index[0])}) >= 8
        assert all(0 <= p.index < order.sizes[p.source] for p in found)


def test_batch_larger_than_the_data() -> None:
    with pytest.raises(UsageError) as error:
        Order([30, 20], None, seed=0, global_batch_size=64)
    assert str(error.value) == ("train.global_batch_size: 64 is more than the 50 samples of data.train; use 50 or less")


def test_all_or_no_weights() -> None:
    assert Order([30, 20], [None, None], seed=0, global_batch_size=8).steps_per_epoch == 6
    with pytest.raises(UsageError) as error:
        Order([30, 20], [2.0, None], seed=0, global_batch_size=8)
    assert str(error.value) == "data.train: 1 of 2 folders have a weight; give all of them one, or none"
