"""One evaluation by all ranks: each works on its slice of the batches, then all share what they found.

Batches are those of one process, so results are its results to the bit.
"""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch.distributed as dist

from mlip_cli.distributed import from_all, rank, world_size
from mlip_cli.errors import RunError

T = TypeVar("T")

OnBatch = Callable[[int], None]
"""Called with the number of pictures that this rank just finished, and with 0 at the start of the texts and after each
batch of them. It may raise EvaluationStopped."""


class EvaluationStopped(Exception):
    """A signal asked a rank to stop while it evaluated."""


def slice_of(num_batches: int, *, rank: int, world_size: int) -> range:
    """Numbers of a rank's batches: contiguous, in rank order, as equal as they divide."""
    return range(num_batches * rank // world_size, num_batches * (rank + 1) // world_size)


def on_all_ranks(work: Callable[[range], Iterable[T]], *, num_batches: int) -> list[T]:
    """Results of all batches, in order, on every rank; each rank calls `work` with the numbers of its own batches.

    Without a process group this process works on all of them. Tensors in the results lie on the CPU.

    Raises:
        EvaluationStopped: `work` raised it on some rank; the others finished their slices first.
        RunError: `work` failed on another rank; its message. This rank's own error is raised as it is.
    """
    if not dist.is_initialized():
        return list(work(range(num_batches)))
    own: list[T] = []
    is_stopping = False
    try:
        own = list(work(slice_of(num_batches, rank=rank(), world_size=world_size())))
    except EvaluationStopped:
        is_stopping = True
    except Exception as error:
        from_all(([], _message(error), False))  # the other ranks wait for this one
        raise
    results, failures, stops = zip(*from_all((own, None, is_stopping)), strict=True)
    for message in failures:
        if message is not None:
            raise RunError(message)
    if any(stops):
        raise EvaluationStopped
    return [result for of_rank in results for result in of_rank]


def _message(error: Exception) -> str:
    """What other ranks say of an error: its own line for people, or else which rank failed with what."""
    return str(error) if isinstance(error, RunError | OSError) else f"rank {rank()} failed: {error!r}"
