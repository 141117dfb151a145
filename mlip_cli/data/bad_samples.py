"""Counts samples that cannot be used or are slow to decode, warns about them, and ends the run at too many."""

import math
from collections import deque
from collections.abc import Sequence
from typing import Self

from mlip_cli.data.dataset import BadSampleError
from mlip_cli.errors import RunError
from mlip_cli.terminal.output import warn
from mlip_cli.types import BadSample

BAD_WINDOW = 10_000
MAX_BAD_IN_A_ROW = 100
CHANCE = 10
"""So many bad samples may come early by chance, if `data.max_bad_share` allows as many in a whole window."""
DEVIATIONS = 3


class BadSampleLimit:
    """Counts bad samples and ends the run when there are too many."""

    def __init__(self, max_bad_share: float) -> None:
        self.max_bad_share = max_bad_share
        self.recent: deque[bool] = deque(maxlen=BAD_WINDOW)
        self.in_a_row = 0

    def check(self, replaced: Sequence[bool], bad_samples: Sequence[BadSample]) -> None:
        """Count the samples of a step.

        Args:
            replaced: for each position of the step, whether its own sample was bad.
            bad_samples: all bad samples that were tried, replacements too.

        Raises:
            RunError: there are too many bad samples.
        """
        for was_bad in replaced:
            self.recent.append(was_bad)
            self.in_a_row = self.in_a_row + 1 if was_bad else 0
            if self.in_a_row >= MAX_BAD_IN_A_ROW:
                last = place_and_reason(bad_samples[-1])
                raise RunError(f"{last}; the last {self.in_a_row} samples were all bad; prepare the data again")
        num_bad, allowed = sum(self.recent) if bad_samples else 0, self.allowed
        if num_bad > allowed:
            raise RunError(
                f"{place_and_reason(bad_samples[-1])}; {num_bad} of the last {len(self.recent):,} samples were bad, "
                f"data.max_bad_share {self.max_bad_share:g} allows {allowed} of so many"
            )

    @property
    def allowed(self) -> int:
        """How many of the recent samples may be bad: the share, and before the window is full three deviations more."""
        expected = self.max_bad_share * len(self.recent)
        by_chance = max(CHANCE, math.floor(expected + DEVIATIONS * math.sqrt(expected)))
        return min(round(self.max_bad_share * BAD_WINDOW), by_chance)


class SlowPictures:
    """Names the first picture that only Pillow could decode, counts all, and reports their number at the end."""

    def __init__(self) -> None:
        self.num_pictures = 0

    def count(self, pictures: Sequence[BadSample]) -> None:
        """Count the pictures of a step; their `reason` is the error of the fast decoder."""
        if pictures and not self.num_pictures:
            first = pictures[0]
            warn(
                f"{first.shard}: sample {first.key}: only Pillow, which is slower, can decode this picture "
                f"({first.reason}); later ones are only counted"
            )
        self.num_pictures += len(pictures)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.num_pictures > 1:
            warn(f"only Pillow could decode {self.num_pictures:,} pictures of this rank's share, the first named above")


def place_and_reason(bad: BadSample) -> str:
    """`SHARD: sample KEY: why it cannot be used`."""
    return str(BadSampleError(bad.shard, bad.key, bad.reason))
