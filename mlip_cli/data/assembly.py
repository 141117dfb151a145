"""Parts of a step, as loader processes make them, and the whole that training takes."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mlip_cli.types import BadSample, Batch


@dataclass(frozen=True)
class Part:
    """Samples of one step that follow one another: all of a rank's share, or some of them."""

    batch: Batch
    replaced: tuple[bool, ...]
    """For each position, whether its own sample was bad."""
    slow: tuple[BadSample, ...] = ()
    """Pictures that only Pillow could decode, with the error of the fast decoder."""


def whole_steps(parts: Iterator[Part], size: int, *, pin_memory: bool) -> Iterator[Part]:
    """Join parts into steps of `size` samples. Each part is copied once, as soon as it is there, and then let go.

    A part that is a whole step is passed on as it is, unless it must be pinned.

    Args:
        pin_memory: the tensors of a step lie in pinned memory. PyTorch keeps it and gives it out again once the step is
            dropped and every copy to a device that was begun from it is done: it notes an event at each such copy. So
            a few buffers serve the whole run, and none is overwritten too early.
    """
    joined = _Joined(size, pin_memory=pin_memory)
    for part in parts:
        if len(part.batch.keys) == size and not pin_memory:
            yield part
            continue
        joined.add(part)
        del part  # its shared memory is free before the next one is waited for
        if joined.num_samples == size:
            yield joined.step()
            joined = _Joined(size, pin_memory=pin_memory)


class _Joined:
    """The parts of one step, put together as they come."""

    def __init__(self, size: int, *, pin_memory: bool) -> None:
        self.size, self.pin_memory, self.num_samples = size, pin_memory, 0
        self._tensors: dict[str, Tensor] = {}
        self._keys: tuple[str, ...] = ()
        self._bad_samples: tuple[BadSample, ...] = ()
        self._replaced: tuple[bool, ...] = ()
        self._slow: tuple[BadSample, ...] = ()

    def add(self, part: Part) -> None:
        """Copy the next part behind those that are there."""
        n = len(part.batch.keys)
        for name, tensor in part.batch.tensors().items():
            rows = len(tensor) // n  # token_ids have a row for each caption
            if name not in self._tensors:
                shape = (self.size * rows, *tensor.shape[1:])
                self._tensors[name] = torch.empty(shape, dtype=tensor.dtype, pin_memory=self.pin_memory)
            self._tensors[name][self.num_samples * rows : (self.num_samples + n) * rows] = tensor
        self.num_samples += n
        self._keys += part.batch.keys
        self._bad_samples += part.batch.bad_samples
        self._replaced += part.replaced
        self._slow += part.slow

    def step(self) -> Part:
        """The whole, once all parts are there."""
        batch = Batch(**self._tensors, keys=self._keys, bad_samples=self._bad_samples)
        return Part(batch, self._replaced, self._slow)
