"""Images/s of our training against OpenCLIP's own trainer: same architecture, tars, precision, threads, global batch.

    make bench                    or, alone:    python tests/benchmarks/bench_training.py

Every run is a process of its own, as a user starts it, of a few steps; the clock is that of the lines they write, one a
step, so that all that happens between steps counts for both. Rounds take all contestants in turn, every second round
backwards; ratios are taken inside rounds, printed are their medians with 95 % of bootstrap medians.

What differs, and why it may: OpenCLIP pads every caption to 77 tokens, we to a length near its own; its attention in
bf16 on a CPU is PyTorch's fused kernel, whose backward pass is slow there; its AdamW goes through the parameters one by
one; it decodes with Pillow. `OpenCLIP, 24 tokens` is what its user gets who knows --force-context-length, with longer
captions cut. Aims: plain CLIP 1.15 times OpenCLIP's images/s or more, MLIP at rate 0.5 1.5 times or more; data wait 2 %
or less.

CPU time is that of the training process, which a busy machine changes less than the clock. Start-up is the time to the
first step less that of a step.

MLIP_BENCH_THREADS: threads of the training process (all cores but one). MLIP_BENCH_OUT: folder for raw numbers.
MLIP_BENCH_OVERLAY: folder with what OpenCLIP's trainer needs; otherwise pip installs it, for which it needs a network.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from open_clip_peer import (
    THREADS,
    Settings,
    Trained,
    Trainer,
    in_words,
    median_interval,
    open_clip,
    ours,
    overlay,
    timed_run,
    write_numbers,
    write_tars,
)

from mlip_cli.terminal.output import print_lines, print_table

NUM_PICTURES = 2048
ROUNDS, WARMUP_STEPS, STEPS = 5, 2, 5


@dataclass(frozen=True)
class Architecture:
    """One architecture, as both call it."""

    name: str
    vision: dict[str, Any]
    text: dict[str, Any]
    batch_size: int


VIT_B_32 = Architecture(
    "ViT-B-32", {"timm": "vit_base_patch32_clip_224"}, {"width": 512, "depth": 12, "num_heads": 8}, batch_size=32
)
VIT_S_16 = Architecture(
    "ViT-S-16",
    {"patch_size": 16, "width": 384, "depth": 12, "num_heads": 6},
    {"width": 384, "depth": 12, "num_heads": 6},
    batch_size=32,
)
CASES = ((VIT_B_32, "bf16"), (VIT_S_16, "bf16"), (VIT_B_32, "fp32"))
AIMS = {"CLIP": 1.15, "MLIP, rate 0.5": 1.5}


def contestants(architecture: Architecture, settings: Settings, folder: Path, *, overlay: Path) -> list[Trainer]:
    """The first one is what the others are compared with."""
    cut = open_clip(architecture.name, settings, folder / "oc", overlay=overlay, extra=["--force-context-length", "24"])
    return [
        open_clip(architecture.name, settings, folder / "oc", overlay=overlay),
        Trainer("OpenCLIP, 24 tokens", cut.command, cut.step_line, cut.environment, cut.wait_share),
        ours("CLIP", architecture.vision, architecture.text, settings, folder / "ours", is_mlip=False),
        ours("MLIP, rate 0.5", architecture.vision, architecture.text, settings, folder / "ours", is_mlip=True),
    ]


def in_rounds(make: Callable[[], Sequence[Trainer]], *, rounds: int, steps: int) -> dict[str, list[Trained]]:
    """Every contestant once a round, in turn."""
    found: dict[str, list[Trained]] = {}
    for number in range(rounds):
        trainers = make()  # a run folder is used once
        for trainer in trainers if number % 2 == 0 else reversed(trainers):
            run = timed_run(trainer, warmup_steps=WARMUP_STEPS, steps=steps)
            found.setdefault(trainer.name, []).append(run)
    return {trainer.name: found[trainer.name] for trainer in trainers}


def speedup(reference: Sequence[Trained], runs: Sequence[Trained], seconds: str) -> tuple[float, float, float]:
    """How often `runs` are as fast as the reference: median over rounds of the ratio inside a round."""
    ratios = [
        median(getattr(other, seconds)) / median(getattr(own, seconds))
        for other, own in zip(reference, runs, strict=True)
    ]
    return median_interval(ratios)


def compare(architecture: Architecture, precision: str, data: Path, folder: Path, *, overlay: Path) -> dict[str, Any]:
    """Print the table of one architecture; return its numbers."""
    settings = Settings(data, architecture.batch_size, precision, steps=WARMUP_STEPS + STEPS + 1)
    found = in_rounds(lambda: contestants(architecture, settings, folder, overlay=overlay), rounds=ROUNDS, steps=STEPS)
    reference = next(iter(found.values()))
    rows = []
    for name, runs in found.items():
        rows.append(
            [
                name,
                f"{architecture.batch_size / median(median(run.step_s) for run in runs):.2f}",
                in_words(speedup(reference, runs, "step_s")),
                f"{AIMS[name]:g}" if name in AIMS else "",
                in_words(speedup(reference, runs, "step_cpu_s")),
                f"{median(run.wait_share for run in runs):.1%}",
                f"{median(run.first_step_s for run in runs):.1f}",
                f"{median(run.first_step_cpu_s for run in runs):.1f}",
                f"{median(run.peak_gib for run in runs):.2f}",
            ]
        )
    print_lines(
        f"{architecture.name}, {precision}, batch {architecture.batch_size}, {THREADS} threads and 1 loader process, "
        f"{ROUNDS} rounds of {STEPS} steps"
    )
    columns = ["trainer", "images/s", "x OpenCLIP (95 %)", "aim", "x in CPU time", "data wait"]
    print_table([*columns, "start-up s", "start-up CPU s", "GiB"], rows)
    return {name: [asdict(run) for run in runs] for name, runs in found.items()}


def test_training_against_open_clip() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data, peer = write_tars(folder / "data", NUM_PICTURES), overlay(folder / "overlay")
        numbers = {
            f"{architecture.name} {precision}": compare(architecture, precision, data, folder, overlay=peer)
            for architecture, precision in CASES
        }
    write_numbers("training_against_open_clip", {"threads": THREADS, "cases": numbers})


def test_memory_against_batch_size() -> None:
    """Resident memory of the training process at most, ViT-B/32 in bf16; the optimiser's moments are in it."""
    rows, numbers = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data, peer = write_tars(folder / "data", NUM_PICTURES), overlay(folder / "overlay")
        for batch_size in (8, 32, 64):
            settings = Settings(data, batch_size, "bf16", steps=4)
            runs = {
                trainer.name: timed_run(trainer, warmup_steps=1, steps=1)
                for trainer in contestants(VIT_B_32, settings, folder, overlay=peer)
            }
            numbers[batch_size] = {name: asdict(run) for name, run in runs.items()}
            rows.append([str(batch_size), *(f"{run.peak_gib:.2f}" for run in runs.values())])
    print_table(["batch", *(f"{name}, GiB" for name in runs)], rows)
    write_numbers("memory_against_batch_size", numbers)


if __name__ == "__main__":
    test_training_against_open_clip()
    test_memory_against_batch_size()
