"""How long a training will still take."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import fmean, median

FEWEST_STEPS = 10
"""In a stretch: shorter ones differ by the batches that they wait for."""
STRETCHES = 15
"""The newest ones, of which the median counts; an interruption or a slow beginning is one among them."""


class TimeLeft:
    """Seconds left by the speed of recent steps, the mean cost of an evaluation, and what saving costs beside them.

    The first step since now counts nowhere: processes start in it, and code is compiled.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        step: int,
        evaluate_every: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps, self._evaluate_every, self._clock = total_steps, evaluate_every, clock
        self._first_step = self._evaluated = step
        self._stretches: deque[float] = deque(maxlen=STRETCHES)
        self._evaluations: list[float] = []
        self._saving_s = 0.0
        self._elsewhere_s = 0.0
        self._from: tuple[int, float] | None = None
        """Where the stretch began that is under way: step, and the clock less what was spent elsewhere."""

    def logged(self, step: int) -> float | None:
        """Seconds left when `step` is done and its numbers have come from the device, so that the clock is right."""
        if self._from is not None and step - self._from[0] >= FEWEST_STEPS:
            self._stretches.append(self._per_step_s(step))
            self._from = step, self._working_s()
        return self.after(step)

    def after(self, step: int) -> float | None:
        """Seconds left when `step` is done; None until two steps tell how long one takes."""
        if self._from is None:
            self._from = step, self._working_s()
        if self._stretches:
            step_s = median(self._stretches)
        elif step > self._from[0]:
            step_s = self._per_step_s(step)
        else:
            return None
        step_s += self._saving_s / (step - self._first_step)
        evaluations_s = self._evaluations_left() * fmean(self._evaluations) if self._evaluations else 0.0
        return (self._total_steps - step) * step_s + evaluations_s

    @contextmanager
    def evaluating(self, step: int) -> Iterator[None]:
        """The evaluation after `step`."""
        started = self._clock()
        yield
        self._evaluations.append(self._clock() - started)
        self._elsewhere_s += self._evaluations[-1]
        self._evaluated = step

    @contextmanager
    def saving(self) -> Iterator[None]:
        """A checkpoint."""
        started = self._clock()
        yield
        seconds = self._clock() - started
        self._saving_s += seconds
        self._elsewhere_s += seconds

    def _working_s(self) -> float:
        return self._clock() - self._elsewhere_s

    def _per_step_s(self, step: int) -> float:
        assert self._from is not None
        return (self._working_s() - self._from[1]) / (step - self._from[0])

    def _evaluations_left(self) -> int:
        """Those between the last one and the end, and the one at the end."""
        if self._evaluated >= self._total_steps:
            return 0
        every = self._evaluate_every or self._total_steps
        return (self._total_steps - 1) // every - self._evaluated // every + 1
