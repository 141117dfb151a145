"""Histograms of whole numbers in memory that does not grow with their number. Adding them up loses nothing.

Small numbers have bins of their own. Above those, each doubling has `2**bits` bins of equal width, so a bin is at most
`2**-bits` of its numbers wide. The bins of fewer bits are whole bins of more bits.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BITS = 10
"""Numbers below 2,048 are counted exactly; a median above is at most 0.05 % wrong."""


@dataclass(frozen=True)
class Histogram:
    """The counts of some whole numbers that are not negative."""

    bins: NDArray[np.int64]
    """(k,): the bins that are not empty, by `bins_of`, in order."""
    counts: NDArray[np.int64]
    """(k,)."""
    total: int
    """The sum of all numbers, exact; so are the next two."""
    min: int
    max: int

    @classmethod
    def of(cls, values: NDArray[np.int64]) -> "Histogram":
        """The histogram of at least one number, each below 2**53."""
        bins, counts = np.unique(bins_of(values, BITS), return_counts=True)
        return cls(bins, counts.astype(np.int64), int(values.sum()), int(values.min()), int(values.max()))

    @property
    def n(self) -> int:
        """How many numbers were counted."""
        return int(self.counts.sum())

    def spread(self, *, scale: int = 1) -> dict[str, float]:
        """Minimum, median, mean and maximum of the numbers, each divided by `scale`."""
        own = {
            "min": self.min,
            "median": (self._at((self.n - 1) // 2) + self._at(self.n // 2)) / 2,
            "mean": self.total / self.n if scale > 1 else round(self.total / self.n, 3),
            "max": self.max,
        }
        return own if scale == 1 else {name: round(value / scale, 3) for name, value in own.items()}

    def above(self, limit: int) -> int:
        """How many numbers are larger than `limit`, which must have a bin of its own."""
        assert limit < 2 << BITS
        return int(self.counts[self.bins > limit].sum())

    def coarse(self, bits: int, *, scale: int = 1) -> dict[str, Any]:
        """The counts in wider bins, as dataset.json holds them (see `bins_in`)."""
        bins, place = np.unique(bins_of(lowest(self.bins, BITS), bits), return_inverse=True)
        counts = np.zeros(len(bins), np.int64)
        np.add.at(counts, place, self.counts)
        pairs = zip(lowest(bins, bits).tolist(), counts.tolist(), strict=True)
        return {"bins_an_octave": 1 << bits, "scale": scale, "counts": {str(low): n for low, n in pairs}}

    def _at(self, rank: int) -> float:
        """The number at this place of all numbers in order; of a wide bin its middle."""
        found = self.bins[[np.searchsorted(np.cumsum(self.counts), rank, side="right")]]
        low, high = int(lowest(found, BITS)[0]), int(lowest(found + 1, BITS)[0])
        return float(min(max((low + high - 1) / 2, self.min), self.max))


def bins_of(values: NDArray[np.int64], bits: int) -> NDArray[np.int64]:
    """The number of the bin of each value: (n,) -> (n,). Bins are in the order of their values."""
    _, bit_lengths = np.frexp(values.astype(np.float64))
    shift = np.maximum(0, bit_lengths.astype(np.int64) - (bits + 1))
    return (shift << bits) + (values >> shift)


def lowest(bins: NDArray[np.int64], bits: int) -> NDArray[np.int64]:
    """The least value of each bin: (n,) -> (n,)."""
    shift = np.maximum(0, (bins >> bits) - 1)
    return (bins - (shift << bits)) << shift


def added(histograms: Iterable[Histogram]) -> Histogram:
    """One histogram of all numbers."""
    parts = list(histograms)
    bins, place = np.unique(np.concatenate([part.bins for part in parts]), return_inverse=True)
    counts = np.zeros(len(bins), np.int64)
    np.add.at(counts, place, np.concatenate([part.counts for part in parts]))
    return Histogram(
        bins,
        counts,
        sum(part.total for part in parts),
        min(part.min for part in parts),
        max(part.max for part in parts),
    )


def bins_in(stored: Mapping[str, Any]) -> Iterator[tuple[float, float, int]]:
    """Least value, end and count of each bin of a histogram in dataset.json.

    Raises:
        KeyError, ValueError, TypeError: it is not one.
    """
    an_octave, scale = int(stored["bins_an_octave"]), int(stored["scale"])
    for text, n in stored["counts"].items():
        low = int(text)
        width = 1 << max(0, (low // an_octave).bit_length() - 1)
        yield low / scale, (low + width) / scale, int(n)
