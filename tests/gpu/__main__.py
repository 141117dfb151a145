"""The check of mlip on one GPU: python -m gpu [--out FILE], or `make gpu`.

At most eight minutes; it needs an installation and nothing else. It prints what every row expects and what it found,
and writes the same as JSON. Without CUDA it says so and ends well. A rehearsal runs all rows on the CPU at tiny sizes:
it shows mistakes in the rows, and its speeds mean nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gpu.rows import GPU, REHEARSAL, Row, Scale
from gpu.runner import Outcome, run_rows

from mlip_cli import __version__
from mlip_cli.terminal.output import plural, print_lines, print_table, say, start_logging

BUDGET_S = {"cuda": 480, "cpu": 1_800}
"""A rehearsal may meet a busy machine."""
NOTHING_RUN = "gpu: PyTorch sees no CUDA device here, so nothing was run"
NOT_AS_EXPECTED = "no"
NO_SYNC = "PyTorch's look-out for waits, NCCL"
NO_POLICY = "NCCL, the mixed-precision policy"
NO_STREAM = "pinned memory, a stream beside"
VERDICTS = {True: "yes", False: NOT_AS_EXPECTED, None: "measured"}


def all_rows() -> tuple[Row, ...]:
    """In the order of their worth: the later ones are left out where time is short."""
    from gpu import commands, exact, kernels, parallel, speed, trace, waits

    at_once = "features, gradients within 1e-5 of fp64 on the CPU; micro-batches within 1e-10"
    written = "plain CLIP 1.1 to 1.25 times OpenCLIP, MLIP at 0.5 faster than plain CLIP"
    return (
        Row("numbers", at_once, exact.against_fp64, 20),
        Row("fp16", "a step with an infinite gradient is skipped and counted", exact.skipped_step, 10),
        Row("fp32 of evaluations", "convolutions and products within 1e-5 of fp64", exact.evaluation_in_fp32, 10),
        Row("waiting", "no step of MLIP makes the host wait", waits.steps_without_waiting, 20, only_on_cuda=NO_SYNC),
        Row(
            "DDP",
            "step, save, restore, evaluate, end without a warning",
            parallel.ddp_training,
            30,
            is_quiet=True,
            only_on_cuda="NCCL",
        ),
        Row("FSDP", "as DDP", parallel.fsdp_training, 30, is_quiet=True, only_on_cuda=NO_POLICY),
        Row("speed as written", written, speed.as_written, 60),
        Row(
            "speed compiled",
            "MLIP at 0.5 at 1.5 times plain CLIP as written",
            speed.compiled,
            100,
            only_on_cuda="inductor",
        ),
        Row("commands", "pretrain, kill -9, --resume, profile, merge-sweep", commands.commands, 60),
        Row(
            "idle GPU",
            "5 % or less at the full batch size",
            trace.idle_gpu,
            25,
            only_on_cuda="kernels of a GPU",
        ),
        Row(
            "micro-batches",
            "auto finds the size that fits in 8 GiB",
            exact.micro_batches,
            15,
            only_on_cuda="a limit of memory",
        ),
        Row("copy", "hidden behind the work of a step", trace.hidden_copy, 10, only_on_cuda=NO_STREAM),
        Row("packed texts", "1.6 times padded ones, same features", kernels.packed_texts, 10),
        Row("FILIP", "bf16 faster than fp32", kernels.filip, 15),
        Row("patch filter", "products faster than the FFT", kernels.patch_filter, 15),
        Row("attention", "which backend is fastest", kernels.attention, 20, only_on_cuda="cuDNN, memory-efficient"),
    )


def versions(scale: Scale) -> dict[str, str | None]:
    """What the figures depend on."""
    import torch

    is_cuda = scale.device_type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(0) if is_cuda else None,
        "driver": driver() if is_cuda else None,
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "mlip": __version__,
    }


def driver() -> str | None:
    """The version of NVIDIA's driver; None where nvidia-smi does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def cells(outcome: Outcome) -> list[Any]:
    """A line of the table."""
    if outcome.not_run is not None:
        found, verdict = f"not run: {outcome.not_run}", None
    elif outcome.error is not None:
        found, verdict = f"failed: {outcome.error}", NOT_AS_EXPECTED
    else:
        assert outcome.found is not None
        found = "; not so: ".join([outcome.found["words"], *outcome.not_so])
        verdict = VERDICTS[outcome.as_expected]
        if outcome.not_rehearsed is not None:
            found = f"{found}; not rehearsed: {outcome.not_rehearsed}"
    return [outcome.name, outcome.expected, found, verdict, f"{outcome.seconds:.1f}"]


def check(rows: Iterable[Row], scale: Scale, *, budget_s: float) -> list[Outcome]:
    """Run the rows within the budget; a line when one has ended. After Ctrl-C, those that ended."""
    outcomes = []
    try:
        for outcome in run_rows(tuple(rows), replace(scale, deadline=time.time() + budget_s)):
            outcomes.append(outcome)
            name, _, found, verdict, seconds = cells(outcome)
            say(f"{name}: {found} ({verdict or 'nothing to judge'}, {seconds} s)")
    except KeyboardInterrupt:
        say(f"gpu: interrupted; {plural(len(outcomes), 'row')} ended before")
    return outcomes


def report(outcomes: Sequence[Outcome], scale: Scale, out: Path, *, seconds: float) -> None:
    """Print the tables and write the JSON."""
    told = versions(scale)
    value = {
        **told,
        "is_rehearsal": scale.device_type != "cuda",
        "seconds": round(seconds, 1),
        "rows": [asdict(own) for own in outcomes],
    }
    out.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for outcome in outcomes:
        lines = (outcome.found or {}).get("lines", ())
        if lines:
            print_table(list(lines[0]), [list(line.values()) for line in lines], title=outcome.name)
            print_lines("")
    print_table(["row", "expected", "found", "as expected", "s"], [cells(own) for own in outcomes])
    where = ", ".join(f"{name} {version}" for name, version in told.items() if version is not None)
    print_lines(f"{where}; {seconds:.0f} s; {out}")


def main(words: Sequence[str] | None = None) -> int:
    """The exit code: 1 if a row failed, is not as expected, or did not run because of Ctrl-C."""
    parser = argparse.ArgumentParser(prog="gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), metavar="FILE", help="JSON to write (gpu.json)")
    parser.add_argument("--rehearse", action="store_true", help="run all rows on the CPU at tiny sizes")
    given = parser.parse_args(words)
    start_logging()
    # the process that forks the rows must not touch CUDA itself: what it forks could not use it
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    if given.rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    if not given.rehearse and not torch.cuda.is_available():
        say(NOTHING_RUN)
        return 0
    scale, start = REHEARSAL if given.rehearse else GPU, time.monotonic()
    rows = all_rows()
    outcomes = check(rows, scale, budget_s=BUDGET_S[scale.device_type])
    report(outcomes, scale, given.out, seconds=time.monotonic() - start)
    return 0 if len(outcomes) == len(rows) and all(own.is_well for own in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
