"""metrics.jsonl: one complete object a line, and the clock behind its speeds."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from mlip_cli.distributed import all_max
from mlip_cli.files import write_text
from mlip_cli.runs.contents import metrics_line
from mlip_cli.train.ahead import ReadyBatch
from mlip_cli.types import BadSample


class MetricsFile:
    """Appends lines. A line stays in the file even if the process dies. Without a path (other ranks) it writes
    nothing."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def append(self, line: Mapping[str, float]) -> dict[str, float | None]:
        """Write one line and return it; a value that is not finite is written as null.

        Raises:
            OSError: the disk is full, for example; with the name of the file.
        """
        finite = {key: value if math.isfinite(value) else None for key, value in line.items()}
        if self.path is not None:
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(finite, allow_nan=False) + "\n")
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from error
        return finite

    def cut_back(self, step: int, *, measured_step: int) -> None:
        """Drop lines of steps after `step`, lines of evaluations after `measured_step`, and damaged lines.

        A run that goes on writes them again, and no step stands twice.
        """
        if self.path is None or not self.path.exists():
            return
        lines = self.path.read_text("utf-8", errors="replace").splitlines(keepends=True)
        write_text(self.path, "".join(line for line in lines if _is_kept(line, step, measured_step)))


def _is_kept(line: str, step: int, measured_step: int) -> bool:
    """Whether a line is whole and belongs to a step up to `step` or to an evaluation up to `measured_step`."""
    try:
        found = metrics_line(line)
    except ValueError:
        return False
    return line.endswith("\n") and bool(found["step"] <= (step if "loss" in found else min(step, measured_step)))


class Stopwatch:
    """Measures the time from one line of the log to the next, and collects the bad samples of this rank."""

    def __init__(self, batches: Iterator[ReadyBatch], device: torch.device) -> None:
        self.batches, self.device = batches, device
        self.bad_samples: list[BadSample] = []
        """Those that the progress does not count yet."""
        self.restart()

    def restart(self) -> None:
        """Begin a new interval."""
        self.started_s = time.perf_counter()
        self.waited_s = 0.0
        self.images = 0

    def next_batch(self) -> ReadyBatch:
        """The next batch; the wait for it is measured."""
        before = time.perf_counter()
        ready = next(self.batches)
        self.waited_s += time.perf_counter() - before
        self.images += len(ready.batch.images)
        self.bad_samples += ready.batch.bad_samples
        return ready

    def read(self, *, ranks: int) -> dict[str, float]:
        """images_per_s over all ranks, and data_wait_share of the rank that waited longest."""
        elapsed = max(time.perf_counter() - self.started_s, 1e-9)
        waited = all_max(torch.full((), self.waited_s / elapsed, device=self.device)).item()
        return {"images_per_s": ranks * self.images / elapsed, "data_wait_share": waited}
