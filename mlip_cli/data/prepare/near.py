"""Equal numbers, and perceptual hashes that differ in a few bits, among millions of them.

Two hashes of B bits that differ in r bits at most, cut into r + 2 bands, agree in two bands at least. So the hashes are
sorted by each pair of bands, and only those that agree there are compared. Keys of two bands are so long that few
hashes share one by chance; a crowd that does, such as drawings with the same white border, is cut again by the bits in
which its members differ.
"""

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

FEWEST_BITS = 4
"""A hash with fewer bits set, or with fewer unset, says too little: those of a flat picture and of a plain gradient are
all 0 or all 1. Such pictures are compared by their pixels alone."""
CROWD = 2_048
"""More hashes with one key are cut again."""
MOST_PAIRS = 1 << 22
"""Pairs that are compared at once; a pair takes some 40 bytes."""
CHUNK = 1 << 20
"""Hashes whose bits are moved at once."""
ALL_BITS = np.arange(64)

Hashes = NDArray[np.uint64]
Places = NDArray[np.int64]
ShortPlaces = NDArray[np.int32]
"""Half as large, for the search among many."""
AnyPlaces = NDArray[np.signedinteger[Any]]


def says_something(hashes: Hashes) -> NDArray[np.bool_]:
    """Whether a perceptual hash can be compared with others: (n,) -> (n,)."""
    bits = np.bitwise_count(hashes)
    return (bits >= FEWEST_BITS) & (bits <= 64 - FEWEST_BITS)


def earlier_equal(keys: Hashes) -> ShortPlaces:
    """Place of the first number that equals each one, if that is an earlier one, else -1: (n,) -> (n,)."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    later, starts, _ = _behind_equal(ordered[1:] == ordered[:-1])
    del ordered
    earlier = np.full(len(keys), -1, np.int32)
    earlier[order[later]] = order[starts]
    return earlier


def _behind_equal(is_same: NDArray[np.bool_]) -> tuple[ShortPlaces, ShortPlaces, Places]:
    """The places of sorted numbers that stand behind an equal one, and the first place of the run of each.

    Args:
        is_same: (n - 1,): whether each number equals the one before it, from the second one on.

    Returns:
        (m,), (m,) and (runs,): the number of places in each run without its first one.
    """
    later = np.flatnonzero(is_same).astype(np.int32) + np.int32(1)
    new_run = np.flatnonzero(np.diff(later, prepend=np.int32(-1)) != 1)
    lengths = np.diff(np.append(new_run, len(later)))
    return later, np.repeat(later[new_run] - np.int32(1), lengths), lengths


def place_among(keys: Hashes, others: Hashes) -> Places:
    """Place in `others` of the first one that equals each key, or -1: (n,), (m,) -> (n,)."""
    order = np.argsort(others, kind="stable")
    ordered = others[order]
    at = np.searchsorted(ordered, keys)
    found = np.full(len(keys), -1, np.int64)
    inside = np.flatnonzero(at < len(others))
    hit = inside[ordered[at[inside]] == keys[inside]]
    found[hit] = order[at[hit]]
    return found


def near_earlier(hashes: Hashes, radius: int) -> ShortPlaces:
    """Place of an earlier hash that differs in `radius` bits at most, or -1: (n,) -> (n,).

    The first of equal ones, where there is an equal one; which one else is not promised, but always the same.
    """
    found = np.full(len(hashes), -1, np.int32)
    places = np.flatnonzero(says_something(hashes)).astype(np.int32)
    earlier = earlier_equal(hashes[places])
    has_one = np.flatnonzero(earlier >= 0)
    found[places[has_one]] = places[earlier[has_one]]
    if radius:
        distinct = places[earlier < 0]
        del places, earlier, has_one
        own = hashes[distinct]
        del hashes
        near = np.full(len(distinct), -1, np.int32)
        _search(own, np.arange(len(distinct), dtype=np.int32), radius, near)
        has_one = np.flatnonzero(near >= 0)
        found[distinct[has_one]] = distinct[near[has_one]]
    return found


def near_among(hashes: Hashes, others: Hashes, radius: int) -> Places:
    """Place in `others` of one that differs in `radius` bits at most, or -1: (n,), (m,) -> (n,)."""
    found = np.full(len(hashes), -1, np.int64)
    mine, theirs = np.flatnonzero(says_something(hashes)), np.flatnonzero(says_something(others))
    if not len(mine) or not len(theirs):
        return found
    equal = place_among(hashes[mine], others[theirs])
    found[mine[equal >= 0]] = theirs[equal[equal >= 0]]
    if radius:
        mine = mine[equal < 0]
        keys = (_keys(known, radius, ALL_BITS) for known in (hashes[mine], others[theirs]))
        for own, other in zip(*keys, strict=True):
            order = np.argsort(other, kind="stable")
            ordered = other[order]
            starts, ends = np.searchsorted(ordered, own), np.searchsorted(ordered, own, side="right")
            counts = np.where(found[mine] < 0, ends - starts, 0)
            for i, at in _pairs(starts, counts):
                hits = np.bitwise_count(hashes[mine[i]] ^ others[theirs[order[at]]]) <= radius
                row, first = np.unique(i[hits], return_index=True)
                found[mine[row]] = theirs[order[at[hits][first]]]
    return found


def _search(hashes: Hashes, members: ShortPlaces, radius: int, found: ShortPlaces) -> None:
    """Put into `found` an earlier member within `radius` for each of the members that has one and none yet.

    Args:
        members: places in `hashes`, ascending. No two members have equal hashes.
    """
    open_ones = np.flatnonzero(found[members] < 0)
    if len(open_ones) * len(members) <= MOST_PAIRS:
        _compare(hashes, members, radius, found, np.zeros(len(open_ones), np.int64), open_ones, open_ones)
        return
    own = hashes if len(members) == len(hashes) else hashes[members]
    for key in _keys(own, radius, _varying_bits(own)):
        ordered, is_same = _sorted(members, key)
        del key
        later, starts, lengths = _behind_equal(is_same)
        del is_same
        is_small = np.repeat(lengths < CROWD, lengths)
        firsts = np.cumsum(lengths) - lengths
        large = [(int(starts[firsts[run]]), int(lengths[run]) + 1) for run in np.flatnonzero(lengths >= CROWD)]
        later, starts = later[is_small], starts[is_small]
        _compare(hashes, ordered, radius, found, starts, later, later - starts)
        for start, size in large:
            _search(hashes, ordered[start : start + size], radius, found)
        del ordered, later, starts, is_small  # before the next key is made


def _sorted(members: ShortPlaces, key: NDArray[Any]) -> tuple[ShortPlaces, NDArray[np.bool_]]:
    """Members (n,), ascending, by their keys (n,), and whether each has the key of the one before it: (n - 1,)."""
    if key.itemsize > 4:
        order = np.argsort(key, kind="stable")
        ordered = key[order]
        return members[order], ordered[1:] == ordered[:-1]
    both = key.astype("<u8")  # in one number: sorted in place, several times as fast as by a list of places
    both <<= np.uint64(32)
    both |= members.view(np.uint32)
    both.sort()
    halves = both.view("<u4").reshape(-1, 2)
    return halves[:, 0].astype(np.int32), halves[1:, 1] == halves[:-1, 1]


def _compare(
    hashes: Hashes,
    members: ShortPlaces,
    radius: int,
    found: ShortPlaces,
    starts: AnyPlaces,
    later: AnyPlaces,
    counts: AnyPlaces,
) -> None:
    """Compare the member at each place of `later` with the `counts` members from `starts` on.

    What is found already is not looked for again.
    """
    counts = np.where(found[members[later]] < 0, counts, 0)
    for i, at in _pairs(starts, counts):
        mine, others = members[later[i]], members[at]
        hits = np.bitwise_count(hashes[mine] ^ hashes[others]) <= radius
        mine, first = np.unique(mine[hits], return_index=True)
        found[mine] = others[hits][first]


def _pairs(starts: AnyPlaces, counts: AnyPlaces) -> Iterator[tuple[Places, Places]]:
    """Each i with each of `starts[i]`, ..., `starts[i] + counts[i] - 1`, about MOST_PAIRS at once, in order."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.unique(np.searchsorted(ends, [*range(0, total, MOST_PAIRS), total], side="left"))
    cuts = np.append(cuts, len(counts))
    for start, end in zip(np.append(0, cuts[:-1]), cuts, strict=True):
        own = counts[start:end]
        num = int(own.sum())
        if num:
            i = np.repeat(np.arange(start, end), own)
            before = np.repeat(np.cumsum(own) - own, own)
            yield i, np.arange(num) - before + starts[i]


def _varying_bits(hashes: Hashes) -> NDArray[np.int64]:
    """The bits in which not all hashes are equal."""
    changed = int(np.bitwise_or.reduce(hashes ^ hashes[0]))
    return np.array([bit for bit in range(64) if changed >> bit & 1], np.int64)


def _keys(hashes: Hashes, radius: int, bits: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
    """The bits of two bands of each hash as a number, for each pair of bands: (n,) a pair.

    A band takes every (r + 2)-th bit: neighbours, which are often equal, lie in different ones.
    """
    num_bands = radius + 2
    width = -(-len(bits) // num_bands)
    bands = np.zeros((num_bands, len(hashes)), np.uint16 if width <= 16 else np.uint32)
    for start in range(0, len(hashes), CHUNK):
        some = hashes[start : start + CHUNK]
        for number, bit in enumerate(bits.tolist()):
            place, band = divmod(number, num_bands)
            value = ((some >> np.uint64(bit)) & np.uint64(1)) << np.uint64(place)
            bands[band, start : start + CHUNK] |= value.astype(bands.dtype)
    kind = np.uint32 if 2 * width <= 32 else np.uint64
    for one, other in combinations(bands, 2):
        key: NDArray[np.unsignedinteger[Any]] = one.astype(kind)
        key <<= width
        key |= other
        yield key
        del key
