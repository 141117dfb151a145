"""Rows about what the GPU does in a step: where it waits for Python, which kernels take the time, hidden copies."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from gpu.rows import Found, Scale, milliseconds
from gpu.trainings import EAGER, recipe_of, stepper_of, steps_of, web_batch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from mlip_cli.devices import pick_device, synchronize
from mlip_cli.losses.objective import Objective
from mlip_cli.profiling.subject import pinned
from mlip_cli.profiling.timing import measure_interleaved
from mlip_cli.train.ahead import Copier
from mlip_cli.types import Batch

STEPS, TOP = 2, 10
MOST_IDLE = 0.05
"""Of a step at the full batch size."""
MOST_SHOWN = 0.25
"""Share of a copy's time that may be added to the work beside it."""


def busy_us(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def traced(scale: Scale, batch_size: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Idle share and launches of steps of MLIP, and the kernels that take the most time. The profiler makes Python
    slower, so that the share is the most there may be."""
    device = pick_device(scale.device_type)
    recipe = recipe_of("cc12m", scale, EAGER)
    stepper = stepper_of(recipe, device)
    run = steps_of(stepper, web_batch(recipe, device, batch_size=batch_size), steps=STEPS)
    run()
    synchronize(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as seen:
        run()
        synchronize(device)
    own_type = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    kernels = [event for event in seen.events() if event.device_type == own_type and not event.is_user_annotation]
    spans = [(event.time_range.start, event.time_range.end) for event in kernels]
    whole = max(end for _, end in spans) - min(start for start, _ in spans)
    by_name: Counter[str] = Counter()
    for event in kernels:
        by_name[event.name] += event.time_range.end - event.time_range.start
    copies = sum(time for name, time in by_name.items() if "Memcpy HtoD" in name)
    figures = {
        "batch_size": batch_size,
        "idle_share": 1 - busy_us(spans) / whole,
        "launches_a_step": round(len(kernels) / STEPS),
        "step_ms": whole / 1000 / STEPS,
        "copies_ms": copies / 1000 / STEPS,
    }
    lines = [
        {
            "batch": batch_size,
            "kernel": name[:90],
            "ms a step": milliseconds(time / 1e6 / STEPS),
            "%": round(100 * time / whole, 1),
        }
        for name, time in by_name.most_common(TOP)
    ]
    return figures, lines


def idle_gpu(scale: Scale) -> Found:
    """The GPU in steps of MLIP as written, at a small batch and at the full one."""
    found = [traced(scale, size) for size in (scale.small_batch_size, scale.batch_size)]
    figures = [own for own, _ in found]
    words = [
        f"batch {own['batch_size']}: {own['idle_share']:.0%} idle, {own['launches_a_step']:,} launches"
        for own in figures
    ]
    return Found(
        "; ".join(words),
        speeds={
            f"at the full batch size the GPU is idle for {MOST_IDLE:.0%} or less": figures[-1]["idle_share"]
            <= MOST_IDLE
        },
        figures={f"batch_{own['batch_size']}": own for own in figures},
        lines=[line for _, lines in found for line in lines],
    )


def hidden_copy(scale: Scale) -> Found:
    """A batch of pictures copied alone, and on the side stream of training while products of matrices run."""
    device = pick_device(scale.device_type)
    images = torch.zeros(scale.copied, 3, 224, 224, dtype=torch.uint8)
    batch = pinned(Batch(images, torch.ones(scale.copied, 77, dtype=torch.int64), ("",) * scale.copied), device)
    copier = Copier(Objective(recipe_of("baselines/clip", scale).losses), device)
    matrix = torch.randn(scale.load, scale.load, device=device, dtype=torch.bfloat16)

    def load() -> None:
        for _ in range(3):
            torch.mm(matrix, matrix)

    def both() -> None:
        load()
        copier(batch)

    ways = {"copy alone": lambda: copier(batch), "load alone": load, "both": both}
    timings = measure_interleaved(ways, scale.rounds, device=device)
    copy_s, load_s, both_s = (timings[name].median_s for name in ways)
    shown = (both_s - load_s) / copy_s
    megabytes = images.nbytes / 1e6
    return Found(
        f"{megabytes:.0f} MB: {milliseconds(copy_s):g} ms alone, {megabytes / 1000 / copy_s:.1f} GB/s; beside work "
        f"{shown:.0%} of it show",
        speeds={f"{MOST_SHOWN:.0%} of the copy or less adds to the work beside it": shown <= MOST_SHOWN},
        figures={"copy_s": copy_s, "load_s": load_s, "both_s": both_s, "shown_share": shown, "megabytes": megabytes},
    )
