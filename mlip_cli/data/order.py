"""The order of training samples as a function of (seed, sizes, weights, t): nothing is stored, nothing shuffled."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from mlip_cli.errors import UsageError

BLOCK_POSITIONS = 65_536
"""Every block of this many positions holds the exact share of each weighted source, to within one sample."""
ROUNDS = 6
MAX_ATTEMPTS = 8

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUND_STEP = 0xD1B54A32D192ED03
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_EPOCH, _BLOCK, _SOURCE, _REPLACEMENT = range(4)


def hash_of(*ints: int) -> int:
    """A 64-bit number for a tuple of integers, by splitmix64 (Steele, Lea and Flood 2014)."""
    state = 0
    for value in ints:
        x = (state * _GOLDEN + value + 1) & _MASK
        x = ((x ^ (x >> 30)) * _MIX_1) & _MASK
        x = ((x ^ (x >> 27)) * _MIX_2) & _MASK
        state = x ^ (x >> 31)
    return state


def permute(i: NDArray[np.int64], n: int, key: int) -> NDArray[np.int64]:
    """Where a permutation of range(n), chosen by `key`, sends each of `i`: (m,) -> (m,).

    A Feistel network on just enough bits; a number outside range(n) is sent on until it falls inside (cycle walking).
    The same on every platform and with every version of numpy.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    round_keys = [np.uint64((key + r * _ROUND_STEP) & _MASK) for r in range(ROUNDS)]

    def once(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x >> half, x & mask
        for round_key in round_keys:
            left, right = right, (left ^ _mix(right * np.uint64(_GOLDEN) + round_key)) & mask
        return (left << half) | right

    x = once(i.astype(np.uint64))
    outside = x >= np.uint64(n)
    while outside.any():
        x[outside] = once(x[outside])
        outside = x >= np.uint64(n)
    return x.astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX_2)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Positions:
    """Which samples stand at some positions of the run; three arrays of the same length."""

    source: NDArray[np.int64]
    """Number of the data set."""
    index: NDArray[np.int64]
    """Number of the sample in it."""
    epoch: NDArray[np.int64]
    """How many epochs of the data set (without weights: of all data sets together) were complete before."""

    def at(self, rows: slice) -> "Positions":
        """Some of them."""
        return Positions(self.source[rows], self.index[rows], self.epoch[rows])


@dataclass(frozen=True)
class Position:
    """One sample: the data set, the sample in it, its epoch."""

    source: int
    index: int
    epoch: int


class Order:
    """Which sample stands at position t of a run; batch b of G samples is the positions [b*G, (b+1)*G).

    Without weights, epoch e permutes all samples of all sources. Samples that do not fill a batch are left out, so no
    sample is twice in a batch. With weights there are no epochs of the whole. Each source has its share of every block
    of positions and has epochs of its own: within one of them no sample is repeated. A sample of a small source with a
    large weight can then be twice in a batch.

    Args:
        sizes: samples of each source.
        weights: share of each source, relative to the others; None, or all None: in proportion to the sizes.

    Raises:
        UsageError: the batch is larger than the data, or only some of the sources have a weight.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float | None] | None, *, seed: int, global_batch_size: int
    ) -> None:
        self.num_samples = sum(sizes)
        if self.num_samples < global_batch_size:
            raise UsageError(
                f"train.global_batch_size: {global_batch_size} is more than the {self.num_samples} samples of "
                f"data.train; use {self.num_samples} or less"
            )
        self.sizes = tuple(sizes)
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.shares = _shares(weights, len(sizes))
        self.steps_per_epoch = None if self.shares else self.num_samples // global_batch_size

    def positions(self, t: NDArray[np.int64]) -> Positions:
        """The samples at positions `t` (m,), in any order and from anywhere in the run."""
        return self._weighted(t) if self.shares else self._in_epochs(t)

    def replacement(self, t: int, attempt: int) -> Position:
        """The sample to read in place of a bad one at `t`; `attempt` counts from 1, as replacements can be bad too.

        It is another sample of the same source, with the epoch of the one that it replaces.
        """
        bad = self.positions(np.array([t]))
        source, epoch = int(bad.source[0]), int(bad.epoch[0])
        n = self.sizes[source]
        index = permute(np.array([t % n]), n, hash_of(self.seed, _REPLACEMENT, source, attempt, t // n))
        return Position(source, int(index[0]), epoch)

    def _in_epochs(self, t: NDArray[np.int64]) -> Positions:
        length = self.num_samples // self.global_batch_size * self.global_batch_size
        epoch, place = t // length, t % length
        index = np.empty_like(t)
        for e in np.unique(epoch).tolist():
            here = epoch == e
            index[here] = permute(place[here], self.num_samples, hash_of(self.seed, _EPOCH, e))
        ends = np.cumsum(self.sizes)
        source = np.searchsorted(ends, index, side="right")
        starts = ends - np.array(self.sizes, np.int64)
        return Positions(source=source, index=index - starts[source], epoch=epoch)

    def _weighted(self, t: NDArray[np.int64]) -> Positions:
        source, draw = np.empty_like(t), np.empty_like(t)
        for block in np.unique(t // BLOCK_POSITIONS).tolist():
            here = np.flatnonzero(t // BLOCK_POSITIONS == block)
            slot = permute(t[here] % BLOCK_POSITIONS, BLOCK_POSITIONS, hash_of(self.seed, _BLOCK, block))
            before = self._draws_before(block)
            ends = np.cumsum(self._draws_before(block + 1) - before)
            source[here] = s = np.searchsorted(ends, slot, side="right")
            starts = np.concatenate([[0], ends[:-1]])
            draw[here] = before[s] + slot - starts[s]
        sizes = np.array(self.sizes)[source]
        epoch, index = draw // sizes, np.empty_like(t)
        for s, e in np.unique(np.stack([source, epoch]), axis=1).T.tolist():
            here = (source == s) & (epoch == e)
            index[here] = permute(draw[here] % self.sizes[s], self.sizes[s], hash_of(self.seed, _SOURCE, s, e))
        return Positions(source=source, index=index, epoch=epoch)

    def _draws_before(self, block: int) -> NDArray[np.int64]:
        """How many samples each source has given before `block`; sums to BLOCK_POSITIONS * block exactly."""
        ends = [int(share * BLOCK_POSITIONS * block) for share in accumulate(self.shares, initial=Fraction(0))]
        return np.array([end - start for start, end in pairwise(ends)], np.int64)


def _shares(weights: Sequence[float | None] | None, n: int) -> tuple[Fraction, ...]:
    """Exact shares that sum to 1; empty without weights."""
    given = [weight for weight in weights or () if weight is not None]
    if not given:
        return ()
    if len(given) != n:
        raise UsageError(f"data.train: {len(given)} of {n} folders have a weight; give all of them one, or none")
    exact = [Fraction(str(weight)) for weight in given]  # str: 0.1 is a tenth
    return tuple(weight / sum(exact) for weight in exact)
