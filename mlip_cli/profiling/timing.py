"""Time functions side by side, and measure memory at its peak."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mlip_cli.devices import peak_gib, synchronize
from mlip_cli.profiling.result import PeakMemory

LARGEST_MATMUL = 16_384
"""Rows of the largest product that is tried for the peak: three such matrices take 3 GiB in fp32."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one function, and how often it is as fast as the first one."""

    seconds: tuple[float, ...]
    """One measurement a round."""
    median_s: float
    speedup: float
    """Median over rounds of (seconds of the first function / seconds of this one) in the same round."""
    speedup_interval: tuple[float, float]
    """95 % of bootstrap medians over rounds."""


def measure_interleaved(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    device: torch.device | str = "cpu",
    after_call: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time all functions in turn inside every round, so that a noisy machine favours none.

    Every second round runs backwards, which cancels a steady drift; ratios are taken inside rounds. Each function runs
    once before the first round, untimed. `after_call` is called after every timed call, for a progress bar.
    """
    device = torch.device(device)
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds):
        names = list(functions)
        for name in names if number % 2 == 0 else reversed(names):
            seconds[name].append(_seconds(functions[name], device))
            if after_call is not None:
                after_call()
    first = np.array(next(iter(seconds.values())))
    return {name: _timing(first, np.array(values)) for name, values in seconds.items()}


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def _timing(first: NDArray[np.float64], seconds: NDArray[np.float64], *, resamples: int = 2000) -> Timing:
    ratios = first / seconds
    drawn = np.random.default_rng(0).integers(len(ratios), size=(resamples, len(ratios)))
    low, high = np.quantile(np.median(ratios[drawn], axis=1), [0.025, 0.975])
    return Timing(
        seconds=tuple(seconds.tolist()),
        median_s=float(np.median(seconds)),
        speedup=float(np.median(ratios)),
        speedup_interval=(float(low), float(high)),
    )


@dataclass(frozen=True)
class SquareMatmul:
    """A product of two square matrices, to be timed."""

    n: int
    """Rows and columns of both."""
    run: Callable[[], object]

    @property
    def flops(self) -> int:
        """n^3 multiply-adds."""
        return 2 * self.n**3


def square_matmul(dtype: torch.dtype, *, device: torch.device, least_s: float = 0.02) -> SquareMatmul:
    """The smallest product of 256, 512, 1024, ... rows that takes `least_s`, of normal random numbers."""
    generator = torch.Generator(device).manual_seed(0)
    n = 256
    while True:
        a, b = (torch.randn(n, n, device=device, generator=generator).to(dtype) for _ in range(2))
        run = partial(torch.mm, a, b, out=torch.empty_like(a))
        run()
        if n >= LARGEST_MATMUL or min(_seconds(run, device) for _ in range(3)) >= least_s:
            return SquareMatmul(n, run)
        n *= 2


def peak_memory(function: Callable[[], object], *, device: torch.device | str) -> PeakMemory:
    """Run `function` once and report the peak.

    On CUDA it is the most bytes of tensors, by PyTorch's allocator. On a CPU under Linux it is the largest resident set
    of the whole process while the function ran, because we reset the kernel's high-water mark before; it includes the
    libraries and what the allocator kept from earlier work. Elsewhere nobody can reset that mark, so it is the peak of
    the process since its start, which may be another function's.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        function()
        synchronize(device)
        return PeakMemory(gib=peak_gib(device), measured="tensors on the GPU")
    was_reset = _reset_high_water()
    function()
    synchronize(device)
    if was_reset:
        return PeakMemory(gib=_high_water_kib() / 2**20, measured="resident memory of the process, libraries included")
    return PeakMemory(gib=peak_gib(device), measured="resident memory of the process since its start")


def _reset_high_water() -> bool:
    """Reset the kernel's high-water mark of this process; False where that is not possible or not allowed."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _high_water_kib() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0])
