"""What a model costs: operations by formula, time measured side by side, memory at its peak.

Operations are those of matrix products, one multiply-add counted as 2 FLOPs; norms, softmax, sums and sorting are left
out (counters that add layer norms report 17.58 instead of 17.56 GMACs for ViT-B/16). With N patches of p x p pixels, P
prefix tokens, width D and MLP width M, an image tower takes, in multiply-adds an image:

    patch embedding       N * 3p^2 * D
    attention of a block  t * 4D^2 + 2 * t^2 * D      t = P + tokens in the block; a merge stands before its block,
    MLP of a block        t * 2 * D * M               so the block before the merge still runs on all of them
    a merge of n tokens   ceil(n/2) * floor(n/2) * d  matching on keys of width d; the means are sums, not products
    guidance              N * 2p^3                    DCT of the grey picture, once, for the frequency domain
    head                  D * E
    a block of a stem     a global filter, and N * 2 * D * M for its MLP, on patches alone

ViT-B/16 at 224 px (N = 196, P = 1, D = 768, M = 3072, E = 512): 17.56 G multiply-adds, 35.1 GFLOPs.
"""

import platform
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mlip_cli.devices import synchronize
from mlip_cli.profiling.result import PeakMemory

GIBIBYTE = 2**30

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

    Every second round runs backwards, which cancels a steady drift; ratios are taken inside rounds. One call of each
    comes first, untimed. `after_call` is told of each timed call, for a progress bar.
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

    CUDA: bytes of tensors at most, by PyTorch's allocator. Linux CPU: the resident set of the whole process at most
    while the function ran (the kernel's high-water mark is reset before), so the libraries and what the allocator kept
    from earlier work are in it. Elsewhere that mark cannot be reset, and the peak of the process since its start is
    reported, which may be another function's.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        function()
        synchronize(device)
        return PeakMemory(gib=torch.cuda.max_memory_allocated(device) / GIBIBYTE, measured="tensors on the GPU")
    was_reset = _reset_high_water()
    function()
    synchronize(device)
    if was_reset:
        return PeakMemory(gib=_high_water_kib() / 2**20, measured="resident memory of the process, libraries included")
    unit = 1 if platform.system() == "Darwin" else 1024  # macOS counts bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return PeakMemory(gib=peak / GIBIBYTE, measured="resident memory of the process since its start")


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
