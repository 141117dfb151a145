"""Counts of texts in memory that does not grow with their number. They add up to the same whatever the order of work.

Both count exactly until a limit is reached, and say by how much they may be wrong from there on.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOST_HASHES = 1 << 16
"""More distinct texts are estimated; the standard error is then 0.4 %."""
MOST_NAMES = 1 << 16
NAME_LENGTH = 200
"""Longer names are counted by their first characters."""


@dataclass(frozen=True)
class Distinct:
    """How many texts differ.

    The k smallest hashes are kept, which spread evenly over all 64-bit numbers: Bar-Yossef et al. 2002, "Counting
    distinct elements in a data stream"; the estimate is that of Beyer et al. 2007, "On synopses for distinct-value
    estimation under multiset operations".
    """

    hashes: NDArray[np.uint64]
    """(k,): the smallest hashes of the texts, in order, at most MOST_HASHES."""

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Distinct":
        """The count of these texts."""
        digests = (hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts)
        return cls(np.unique(np.frombuffer(b"".join(digests), "<u8"))[:MOST_HASHES].astype(np.uint64))

    @property
    def is_exact(self) -> bool:
        """Whether all hashes are kept."""
        return len(self.hashes) < MOST_HASHES

    @property
    def number(self) -> int:
        """The number of distinct texts, or an estimate."""
        if self.is_exact:
            return len(self.hashes)
        return round((len(self.hashes) - 1) * 2.0**64 / (float(self.hashes[-1]) + 1))

    @property
    def standard_error(self) -> float:
        """Of the number, as a share of it."""
        return 0.0 if self.is_exact else round((len(self.hashes) - 2) ** -0.5, 4)


def added_distinct(parts: Iterable[Distinct]) -> Distinct:
    """The count of the texts of all parts."""
    return Distinct(np.unique(np.concatenate([part.hashes for part in parts]))[:MOST_HASHES])


@dataclass(frozen=True)
class Names:
    """How often each name occurs. The frequent ones are kept.

    Misra and Gries 1982, "Finding repeated elements"; adding up by Agarwal et al. 2013, "Mergeable summaries".
    """

    counts: Mapping[str, int]
    """At most MOST_NAMES names."""
    undercount: int
    """Each count is at most this much too low; a name that is missing occurs at most so often."""
    distinct: Distinct
    """Of all names."""

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        """The counts of these names."""
        counts = Counter(names)
        return _cut(Counter(_shortened(counts)), 0, Distinct.of(counts))

    def most_common(self, most: int) -> dict[str, int]:
        """The most frequent names; among equals, those that come first in the alphabet."""
        return dict(sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))[:most])


def added_names(parts: Iterable[Names]) -> Names:
    """The counts of the names of all parts."""
    own = list(parts)
    counts: Counter[str] = Counter()
    for part in own:
        counts.update(part.counts)
    return _cut(counts, sum(part.undercount for part in own), added_distinct(part.distinct for part in own))


def _shortened(counts: Mapping[str, int]) -> Counter[str]:
    short: Counter[str] = Counter()
    for name, n in counts.items():
        short[name[:NAME_LENGTH]] += n
    return short


def _cut(counts: Counter[str], undercount: int, distinct: Distinct) -> Names:
    """The names that stay when each count falls by that of the first name for which there is no room."""
    if len(counts) <= MOST_NAMES:
        return Names(counts, undercount, distinct)
    less = sorted(counts.values(), reverse=True)[MOST_NAMES]
    return Names({name: n - less for name, n in counts.items() if n > less}, undercount + less, distinct)
