"""A fraction of a factorial: 16 runs for seven factors of two levels, every main effect from all of them.

2^(7-3) of resolution IV (Box and Hunter, 1961): four factors have all combinations, three are products of them. Main
effects mix with no other main effect and with no interaction of two; those of two share the rest of the design, so
the noise that is read from it is rather too large than too small.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FACTORS = "ABCDEFG"
BASE = "ABCD"
GENERATORS = {"E": "ABC", "F": "BCD", "G": "ACD"}
NUM_RUNS = 2 ** len(BASE)
DEGREES_OF_FREEDOM = NUM_RUNS - 1 - len(FACTORS)
T_95 = 2.306
"""0.975 quantile of Student's t with `DEGREES_OF_FREEDOM` = 8."""


def design() -> NDArray[np.int64]:
    """Levels -1 and 1 of all factors: (16, 7). The first run has all of them low."""
    columns = {
        factor: np.array([1 if run >> place & 1 else -1 for run in range(NUM_RUNS)])
        for place, factor in enumerate(BASE)
    }
    for factor, product in GENERATORS.items():
        columns[factor] = np.prod([columns[name] for name in product], axis=0)
    return np.stack([columns[factor] for factor in FACTORS], axis=1)


def cells() -> list[str]:
    """The factors that are high in each run, such as "AEG"; the first run is ""."""
    return ["".join(name for name, level in zip(FACTORS, levels, strict=True) if level > 0) for levels in design()]


@dataclass(frozen=True)
class Effect:
    """What a factor gains."""

    factor: str
    gain: float
    """LR of its low level minus LR of its high level, each a mean of eight runs."""
    standard_error: float

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, by Student's t."""
        return self.gain - T_95 * self.standard_error, self.gain + T_95 * self.standard_error


def effects(lr: NDArray[np.float64]) -> dict[str, Effect]:
    """Main effects of the LR of the 16 runs, in the order of `design`: (16,).

    The noise of a run is what the main effects leave unexplained, with eight degrees of freedom.
    """
    levels = design()
    coefficients = levels.T @ lr / NUM_RUNS
    unexplained = lr - lr.mean() - levels @ coefficients
    noise = np.sqrt(unexplained @ unexplained / DEGREES_OF_FREEDOM)
    standard_error = float(2 * noise / np.sqrt(NUM_RUNS))
    return {
        factor: Effect(factor, float(-2 * coefficient), standard_error)
        for factor, coefficient in zip(FACTORS, coefficients, strict=True)
    }
