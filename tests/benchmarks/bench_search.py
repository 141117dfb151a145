"""Exact search among 1 k, 100 k and 1 M vectors of 512 numbers: time, memory, and recall against brute force.

    make bench                    or, alone:    python tests/benchmarks/bench_search.py

Each size runs in a process of its own, so that its peak of memory is its own. The files lie in the page cache: after a
start of the machine the first search also reads them from the disk. One thread computes: reading memory is the limit.
Resident memory holds the pages of the files that are mapped, which the system may drop.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from mlip_cli.evaluate.vector_files import VectorFiles
from mlip_cli.terminal.output import plural, print_lines, print_table

SIZES = (1_000, 100_000, 1_000_000)
DIM = 512
FILE_ROWS = 8_192
ROUNDS = 7
QUERIES = (1, 8)
TOP = 10


def random_vectors(n: int, random: np.random.Generator) -> NDArray[np.float32]:
    own = random.standard_normal((n, DIM), dtype=np.float32)
    return own / np.linalg.norm(own, axis=1, keepdims=True)


def measure(n: int) -> dict[str, float]:
    """Times in seconds, memory in MiB, and recall."""
    random = np.random.default_rng(0)
    keys = random.integers(0, 2**63, n, dtype=np.uint64)
    queries = random_vectors(max(QUERIES), random)
    with tempfile.TemporaryDirectory() as name:
        files, written, best = VectorFiles(Path(name), DIM), 0.0, np.full((max(QUERIES), TOP), -1.0)
        for start in range(0, n, FILE_ROWS):
            own = random_vectors(min(FILE_ROWS, n - start), random)
            cosines = queries.astype(np.float64) @ own.astype(np.float64).T
            best = -np.sort(-np.concatenate([best, cosines], axis=1), axis=1)[:, :TOP]
            began = time.perf_counter()
            files.add(keys[start : start + FILE_ROWS], own)
            written += time.perf_counter() - began
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found: dict[str, float] = {"n": n, "write_s": written}
        opened = [_timed(lambda: (files.open(), files.missing(keys))) for _ in range(ROUNDS)]
        found["open_s"] = median(wall for wall, _ in opened)
        for number in QUERIES:
            times = [_timed(lambda q=queries[:number]: files.search(q, keys, k=TOP)) for _ in range(ROUNDS)]
            found[f"search_{number}_s"] = median(wall for wall, _ in times)
            found[f"search_{number}_cpu_s"] = median(cpu for _, cpu in times)
        nearest = files.search(queries, keys, k=TOP)
        hits = [np.isclose(own.cosines, row, rtol=0, atol=1e-12).sum() for own, row in zip(nearest, best, strict=True)]
        found["recall"] = float(sum(hits)) / best.size
        found["mib"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        found["disk_mib"] = sum(path.stat().st_size for path in Path(name).iterdir()) / 2**20
    return found


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock and of the CPU."""
    began, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - cpu


def test_search() -> None:
    rows = []
    for size in SIZES:
        command = [sys.executable, __file__, str(size)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
        own = json.loads(done.stdout)
        assert own["recall"] == 1
        times = [
            f"{own[name]:.3f}"
            for name in ("open_s", *(f"search_{n}_{what}" for n in QUERIES for what in ("s", "cpu_s")))
        ]
        rows.append([f"{size:,}", *times, f"{own['mib']:,.0f}", f"{own['disk_mib']:,.0f}", f"{own['recall']:.3f}"])
    titles = ("open s", *(f"{plural(n, 'query', 'queries')} {what}" for n in QUERIES for what in ("s", "CPU s")))
    print_table(["vectors", *titles, "resident MiB", "disk MiB", f"recall@{TOP}"], rows)
    print_lines(f"{DIM} numbers in fp32, files of {FILE_ROWS:,} vectors; medians of {ROUNDS} rounds")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(int(sys.argv[1]))))
    else:
        test_search()
