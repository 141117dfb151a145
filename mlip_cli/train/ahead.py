"""Batches on the device one step ahead, so that neither the device nor this process waits for a copy."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from mlip_cli.losses.objective import Objective
from mlip_cli.train.gradients import Counting, begin_counting
from mlip_cli.types import Batch, PartOf

COPY = "copy to the device"


@dataclass(frozen=True)
class ReadyBatch:
    """A batch on the device, or on its way there."""

    batch: Batch
    counts: Counting
    wait: Callable[[], None] = lambda: None
    """Waits for what the device had to do when the copy began, so that this process is at most a step ahead of it."""


class Copier:
    """Copies batches to the device; on CUDA beside the work of the step before.

    Without a bound on how far this process is ahead, batches would pile up in the device's memory.
    """

    def __init__(self, objective: Objective, device: torch.device) -> None:
        self.objective, self.device = objective, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.works_ahead = self._stream is not None

    def __call__(self, batch: Batch, part: PartOf = nullcontext) -> ReadyBatch:
        """Begin the copy of a batch, and the count of its captions."""
        with part(COPY):
            batch = self._copied(batch)
        counts = begin_counting(self.objective, batch)
        if self._stream is None:
            return ReadyBatch(batch, counts)
        queued = torch.cuda.current_stream(self.device).record_event()
        return ReadyBatch(batch, counts, queued.synchronize)

    def _copied(self, batch: Batch) -> Batch:
        if self._stream is None:
            return batch.to(self.device, non_blocking=True)
        of_steps = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._stream):
            copied = batch.to(self.device, non_blocking=True)
        of_steps.wait_stream(self._stream)

        def kept(tensor: Tensor) -> Tensor:
            tensor.record_stream(of_steps)  # its memory is free when the step is done, not when the copy is
            return tensor

        return copied.with_tensors(kept)


def one_ahead(batches: Iterator[Batch], copier: Copier) -> Iterator[ReadyBatch]:
    """Each batch; on CUDA when the copy of the next one has begun, elsewhere at once."""
    ready: ReadyBatch | None = None
    for batch in batches:
        following = copier(batch)
        if not copier.works_ahead:
            yield following
            continue
        if ready is not None:
            yield ready
        ready = following
    if ready is not None:
        yield ready
