"""What pass 2 of prepare-data holds of each row: memory and time of its plan, from drawn tables of parts of 500 rows.

    make bench                    or, alone:    python tests/benchmarks/bench_prepare_plan.py

A million rows, or those of MLIP_BENCH_PLAN_ROWS (12000000 takes 1.1 GB of files in the temporary folder). One row in
twenty has the bytes and pixels of an earlier one, and another one a hash that is near. Memory is what a process of its
own held at most (VmHWM) beyond what it held before.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

from mlip_cli.data.prepare.fates import decided
from mlip_cli.data.prepare.filters import Cleaning
from mlip_cli.data.prepare.plan import plan_of
from mlip_cli.data.prepare.shards import PART_ROW
from mlip_cli.data.prepare.workspace import PartResult
from mlip_cli.terminal.output import print_table

NUM_ROWS = int(os.environ.get("MLIP_BENCH_PLAN_ROWS", "1000000"))
PART, REPEATED = 500, 25


def write_tables(folder: Path) -> None:
    draw = np.random.default_rng(0)
    before = None
    for number, start in enumerate(range(0, NUM_ROWS, PART)):
        table = np.zeros(min(PART, NUM_ROWS - start), PART_ROW)
        table["row"], table["split"] = start + np.arange(len(table)), 255
        table["sha256"] = np.frombuffer(draw.bytes(16 * len(table)), "V16")
        for name in ("pixels", "perceptual"):
            table[name] = draw.integers(0, 2**64, len(table), np.uint64)
        table["record"]["image_size"] = draw.integers(5_000, 25_000, len(table))
        if before is not None:
            for name in ("sha256", "pixels", "perceptual"):
                table[name][:REPEATED] = before[name][:REPEATED]
            near = before["perceptual"][REPEATED : 2 * REPEATED] ^ np.uint64(1 << 7)
            table["perceptual"][REPEATED : 2 * REPEATED] = near
        before = table
        np.save(folder / f"part-{number:06d}.npy", table)


def peak_mib() -> float:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def plan(folder: Path, dedupe: str) -> dict[str, float]:
    """Make the plan in this process."""
    sizes = [min(PART, NUM_ROWS - start) for start in range(0, NUM_ROWS, PART)]
    results = [PartResult(number, size, f"part-{number:06d}.tar", {}) for number, size in enumerate(sizes)]
    before, started = peak_mib(), time.process_time()
    made = plan_of(folder, results, holdout=0.02, decide=partial(decided, cleaning=Cleaning(dedupe=dedupe), sets=()))
    made.last_uses(made.shards())
    dropped = float(sum(made.fates.by_reason().values()))
    return {"mib": peak_mib(), "before_mib": before, "cpu_s": time.process_time() - started, "dropped": dropped}


def test_memory_of_the_plan() -> None:
    from open_clip_peer import write_numbers  # here: it imports torch, and a measured process should not

    rows, numbers = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        write_tables(Path(temporary))
        for dedupe in ("none", "bytes", "near:2"):
            command = [sys.executable, __file__, temporary, dedupe]
            found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            a_row = (found["mib"] - found["before_mib"]) * 2**20 / NUM_ROWS
            numbers[f"{dedupe} {NUM_ROWS}"] = found | {"bytes_a_row": a_row}
            rows.append([dedupe, f"{found['mib']:.0f}", f"{a_row:.0f}", f"{found['cpu_s']:.1f}"])
    print_table(["--dedupe", "MiB", "bytes a row", "CPU s"], rows)
    write_numbers("memory_of_the_plan", numbers)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(plan(Path(sys.argv[1]), sys.argv[2])))
    else:
        test_memory_of_the_plan()
