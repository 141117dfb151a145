"""One evaluation by all ranks: whole batches each, in rounds, and the same result on every rank.

Batches are those of one process, so that features are its features to the bit.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from mlip_cli.distributed import all_sum, gather
from mlip_cli.errors import RunError

T = TypeVar("T")


class Left(Exception):
    """A rank was asked to stop while it evaluated, and all of them left."""


@dataclass(frozen=True)
class Part:
    """What one rank does of a number of batches."""

    numbers: range
    """Of its batches, in order; a rank that has none does the first one, for the shape of its result."""
    num_own: int
    """How many of them count: all or none."""
    rounds: int
    """Most batches that a rank does."""


class Together:
    """The ranks that share an evaluation; by default one process alone.

    Before each batch and before results are gathered all ranks ask each other whether to go on. So a signal to one of
    them ends the evaluation of all, and so does an error.
    """

    def __init__(
        self,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.rank, self.world_size, self._device = rank, world_size, torch.device(device)
        self._is_stopping = is_stopping
        self._is_over = False

    def part(self, num_batches: int) -> Part:
        """This rank's part of the batches: contiguous, in rank order, as equal as they divide."""
        start, stop = (num_batches * place // self.world_size for place in (self.rank, self.rank + 1))
        numbers = range(start, stop) if stop > start else range(min(1, num_batches))
        return Part(numbers, stop - start, -(-num_batches // self.world_size))

    def in_rounds(self, batches: Iterable[T], part: Part) -> Iterator[T]:
        """The batches of `part`; after each is read and before work on it the ranks agree to go on.

        Raises:
            Left: a rank was asked to stop.
            RunError: a rank failed.
        """
        for batch in batches:
            self._agree()
            yield batch
        for _ in range(part.rounds - len(part.numbers)):
            self._agree()

    def gathered(self, results: Sequence[Tensor], part: Part) -> Tensor:
        """Rows of all batches in order, from what each rank found for its `part`: (n, ...) a batch -> (N, ...).

        Raises:
            Left, RunError: as `in_rounds`.
        """
        own = torch.cat(list(results))
        if self.world_size == 1:
            return own
        self._agree()
        return self._rows(own if part.num_own else own[:0])

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """An evaluation: what ends it on one rank ends it on all of them, with the same words."""
        try:
            yield
        except Exception as error:
            if self.world_size > 1 and not self._is_over:
                self._ask(failure=_words(error, self.rank))
            raise
        if self.world_size > 1:
            self._ask()

    def _agree(self) -> None:
        if self.world_size > 1:
            self._ask(stops=self._is_stopping())
        elif self._is_stopping():
            raise Left

    def _ask(self, *, stops: bool = False, failure: str | None = None) -> None:
        """One question to all ranks; the failures of others are raised here, one's own is raised by the caller."""
        self._is_over = True  # where the others cannot be reached, nobody asks them again
        votes = torch.tensor([stops, failure is not None], dtype=torch.int64, device=self._device)
        stopping, failing = all_sum(votes).tolist()
        self._is_over = bool(stopping or failing)
        if failing:
            own = torch.tensor(list((failure or "").encode()), dtype=torch.uint8, device=self._device)
            said = bytes(self._rows(own).tolist()).decode()
            if failure is None:
                raise RunError(said.splitlines()[0])
        elif stopping:
            raise Left

    def _rows(self, own: Tensor) -> Tensor:
        """(n, ...) of each rank, n its own -> (N, ...), in rank order, where `own` lies."""
        counts = gather(torch.tensor([len(own)], device=self._device)).tolist()
        padded = torch.zeros(max(counts), *own.shape[1:], dtype=own.dtype, device=self._device)
        padded[: len(own)] = own
        parts = gather(padded).split(max(counts))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(own.device)


def _words(error: Exception, rank: int) -> str:
    """What other ranks say of an error: a line that a person can use as it is, or whose it was."""
    text = str(error) if isinstance(error, RunError | OSError) else f"rank {rank} failed: {error!r}"
    return f"{text}\n"


ALONE = Together()
"""One process, which nobody stops."""
