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


def first_of_equal(keys: Hashes) -> Places:
    """Place of the first number that equals each one: (n,) -> (n,)."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1]))[: len(keys)])
    del ordered
    first = np.empty(len(keys), np.int64)
    first[order] = np.repeat(order[starts], np.diff(starts, append=len(keys)))
    return first


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


def near_earlier(hashes: Hashes, radius: int) -> Places:
    """Place of an earlier hash that differs in `radius` bits at most, or -1: (n,) -> (n,).

    The first of equal ones, where there is an equal one; which one else is not promised, but always the same.
    """
    found = np.full(len(hashes), -1, np.int64)
    places = np.flatnonzero(says_something(hashes))
    first = first_of_equal(hashes[places])
    is_first = first == np.arange(len(places))
    found[places[~is_first]] = places[first[~is_first]]
    if radius:
        distinct = places[is_first]
        del places, first, is_first
        near = np.full(len(distinct), -1, np.int32)
        _search(hashes[distinct], np.arange(len(distinct), dtype=np.int32), radius, near)
        has_one = near >= 0
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
        order = np.argsort(key, kind="stable")
        ordered, same = members[order], key[order]
        del order
        later = np.flatnonzero(same[1:] == same[:-1]).astype(np.int32) + 1  # behind another one of the same key
        del same
        new_run = np.flatnonzero(np.diff(later, prepend=-1) != 1)
        lengths = np.diff(np.append(new_run, len(later)))
        starts = np.repeat(later[new_run] - 1, lengths)
        is_small = np.repeat(lengths < CROWD, lengths)
        large = [(int(later[new_run[run]]) - 1, int(lengths[run]) + 1) for run in np.flatnonzero(lengths >= CROWD)]
        later, starts = later[is_small], starts[is_small]
        _compare(hashes, ordered, radius, found, starts, later, later - starts)
        for start, size in large:
            _search(hashes, ordered[start : start + size], radius, found)


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
        yield np.left_shift(one.astype(kind), width) | other
