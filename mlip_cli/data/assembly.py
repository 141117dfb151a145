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


class Rows:
    """A tensor of `size` rows that comes in parts, one behind the other.

    Each part is copied once, so that its shared memory is free. Alone it is taken as it is, unless it must be pinned.

    Args:
        pin_memory: the tensor lies in pinned memory. PyTorch keeps such memory and gives it out again once the tensor
            is dropped and every copy to a device that was begun from it is done: it notes an event at each such copy.
            So a few buffers serve a whole run, and none is overwritten too early.
    """

    def __init__(self, size: int, *, pin_memory: bool = False) -> None:
        self.size, self.pin_memory, self.num_filled = size, pin_memory, 0
        self.tensor = torch.empty(0)

    def add(self, part: Tensor) -> None:
        """Put the next rows behind those that are there: (n, ...)."""
        if self.num_filled == 0:
            if len(part) == self.size and not self.pin_memory:
                self.tensor, self.num_filled = part, self.size
                return
            self.tensor = torch.empty((self.size, *part.shape[1:]), dtype=part.dtype, pin_memory=self.pin_memory)
        here = slice(self.num_filled, self.num_filled + len(part))
        self.tensor.numpy()[here] = part.numpy()  # on this thread alone; PyTorch would copy on all cores
        self.num_filled += len(part)


def whole_steps(parts: Iterator[Part], size: int, *, pin_memory: bool) -> Iterator[Part]:
    """Join parts into steps of `size` samples, whose tensors are pinned on request (see `Rows`)."""
    joined = _Joined(size, pin_memory=pin_memory)
    for part in parts:
        joined.add(part)
        del part  # its shared memory is free before the next one is waited for
        if len(joined.replaced) == size:
            yield joined.step()
            joined = _Joined(size, pin_memory=pin_memory)


class _Joined:
    """The parts of one step, put together as they come."""

    def __init__(self, size: int, *, pin_memory: bool) -> None:
        self.size, self.pin_memory = size, pin_memory
        self.rows: dict[str, Rows] = {}
        self.keys: tuple[str, ...] = ()
        self.text_lengths: tuple[int, ...] | None = None
        self.bad_samples: tuple[BadSample, ...] = ()
        self.replaced: tuple[bool, ...] = ()
        self.slow: tuple[BadSample, ...] = ()

    def add(self, part: Part) -> None:
        """Put the next part behind those that are there."""
        for name, tensor in part.batch.tensors().items():
            if name not in self.rows:
                rows_a_sample = len(tensor) // len(part.batch.keys)  # token_ids have a row for each caption
                self.rows[name] = Rows(self.size * rows_a_sample, pin_memory=self.pin_memory)
            self.rows[name].add(tensor)
        self.keys += part.batch.keys
        if part.batch.text_lengths is not None:
            self.text_lengths = (self.text_lengths or ()) + part.batch.text_lengths
        self.bad_samples += part.batch.bad_samples
        self.replaced += part.replaced
        self.slow += part.slow

    def step(self) -> Part:
        """The whole, once all parts are there."""
        tensors = {name: rows.tensor for name, rows in self.rows.items()}
        batch = Batch(**tensors, keys=self.keys, bad_samples=self.bad_samples, text_lengths=self.text_lengths)
        return Part(batch, self.replaced, self.slow)
