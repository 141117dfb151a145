"""What keeping freed memory saves in a training step on a CPU.

    make bench                    or, alone:    python tests/benchmarks/bench_heap.py

The same steps of a ViT-S/16 at 224 px with freed memory kept and given back, in turn in one process. Page faults are
those of one step: pages of 4 KiB that the system gives out and fills with zeros.
"""

import resource
from collections.abc import Callable

from bench_losses import BATCH_SIZE, CPU, ONE, noise_batch, vit_s_16, whole_step

from mlip_cli.devices import device_name, keep_freed_memory
from mlip_cli.profiling.timing import measure_interleaved
from mlip_cli.terminal.output import print_lines, print_table

ROUNDS = 7


def page_faults() -> int:
    """Of this process until now."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def test_keeping_freed_memory() -> None:
    step = whole_step(vit_s_16(ONE), ONE, noise_batch())
    faults: dict[str, list[int]] = {"given back": [], "kept": []}

    def with_heap(name: str) -> Callable[[], object]:
        def run() -> None:
            keep_freed_memory(name == "kept")
            before = page_faults()
            step()
            faults[name].append(page_faults() - before)

        return run

    timings = measure_interleaved({name: with_heap(name) for name in faults}, ROUNDS)
    rows = [
        [
            name,
            f"{timing.median_s:.3f}",
            f"{timing.speedup:.3f} ({timing.speedup_interval[0]:.3f}-{timing.speedup_interval[1]:.3f})",
            f"{sorted(faults[name])[len(faults[name]) // 2]:,}",
        ]
        for name, timing in timings.items()
    ]
    print_table(["freed memory", "s a step", "speed (95 %)", "page faults"], rows)
    print_lines(f"ViT-S/16 at 224 px, batch of {BATCH_SIZE}, fp32, {device_name(CPU)}; medians of {ROUNDS} rounds")


if __name__ == "__main__":
    test_keeping_freed_memory()
