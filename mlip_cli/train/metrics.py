"""metrics.jsonl: one complete object a line, and what goes into it."""

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from mlip_cli.distributed import all_max
from mlip_cli.files import write_text
from mlip_cli.types import BadSample, Batch


class MetricsFile:
    """Appends lines, which outlive the process from then on. Without a path it keeps silent (ranks other than 0).

    Args:
        also: gets each line that was written.
    """

    def __init__(self, path: Path | None, *, also: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
        self.path = path
        self._also = also

    def append(self, line: dict[str, Any]) -> None:
        """Write one line; a value that is not finite becomes null.

        Raises:
            OSError: the disk is full, say; with the name of the file.
        """
        if self.path is None:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(finite, allow_nan=False) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self._also(finite)

    def cut_back(self, step: int, *, measured_step: int) -> None:
        """Drop the lines after `step`, of evaluations those after `measured_step`, and a damaged end.

        A run that goes on writes them again, and no step stands twice.
        """
        if self.path is None or not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            if not line.endswith("\n") or not _is_kept(line, step, measured_step):
                break
            kept.append(line)
        write_text(self.path, "".join(kept))


def _is_kept(line: str, step: int, measured_step: int) -> bool:
    """Whether a line is of a step up to `step`, or of an evaluation up to `measured_step`; not a damaged one."""
    try:
        found = json.loads(line)
        return bool(found["step"] <= (step if "loss" in found else min(step, measured_step)))
    except (ValueError, KeyError, TypeError):
        return False


class Stopwatch:
    """Where the time between two logging steps went."""

    def __init__(self, batches: Iterator[Batch], device: torch.device) -> None:
        self.batches, self.device = batches, device
        self.bad_samples: list[BadSample] = []
        """Of this rank, until `account` takes them over into the progress."""
        self.restart()

    def restart(self) -> None:
        """Begin a new interval."""
        self.started_s = time.perf_counter()
        self.waited_s = 0.0
        self.images = 0

    def next_batch(self) -> Batch:
        """The next batch; waiting for it is counted."""
        before = time.perf_counter()
        batch = next(self.batches)
        self.waited_s += time.perf_counter() - before
        self.images += len(batch.images)
        self.bad_samples += batch.bad_samples
        return batch

    def read(self, *, ranks: int) -> dict[str, float]:
        """images_per_s over all ranks, data_wait_share of the one that waited longest."""
        elapsed = max(time.perf_counter() - self.started_s, 1e-9)
        waited = all_max(torch.tensor(self.waited_s / elapsed, device=self.device)).item()
        return {"images_per_s": ranks * self.images / elapsed, "data_wait_share": waited}
