"""What a batch costs before the model sees it: the real loader, run in this process on one thread."""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from statistics import median

import torch

from mlip_cli.data.dataset import ShardDataset
from mlip_cli.data.loader import DECODE, READ, TRANSFORM, training_loader
from mlip_cli.data.order import Order
from mlip_cli.profiling.clock import PartClock
from mlip_cli.recipe.config import Recipe

SAMPLES = 256
"""How many are read: enough for medians over eight batches."""
MOST_IN_A_BATCH = 32

COLLATE = "tokenize and collate"
PARTS = (READ, DECODE, TRANSFORM, COLLATE)


@dataclass(frozen=True)
class LoaderCost:
    """What one sample costs a loader process."""

    num_samples: int
    """How many were timed."""
    bad_samples: int
    """How many of them had to be replaced, as in training."""
    sample_seconds: dict[str, float]
    """Of one sample, by part: medians over batches. Reading counts wall-clock time and so the wait for the disk (what
    was read lately lies in memory and needs no wait); the other parts count seconds of one CPU core."""

    @property
    def sample_s(self) -> float:
        """All parts of one sample."""
        return sum(self.sample_seconds.values())

    def batch_seconds(self, batch_size: int, num_workers: int) -> dict[str, float]:
        """Seconds a batch by part, for so many loader processes; 0 is the training process itself.

        We assume that each has a core for itself: a loader slows a step on a CPU that uses all cores.
        """
        return {part: s * batch_size / max(num_workers, 1) for part, s in self.sample_seconds.items()}


def measure_loader(recipe: Recipe, datasets: Sequence[ShardDataset]) -> LoaderCost:
    """Time the training loader on samples at random places of the data.

    `tokenize and collate` is all that is not reading, decoding or changing pictures: order, choice of captions,
    tokens, stacking. Sending a batch from process to process does not count.

    Raises:
        RunError: too many bad samples.
    """
    num_samples = sum(dataset.num_samples for dataset in datasets)
    batch_size = min(MOST_IN_A_BATCH, num_samples)
    rounds = max(3, SAMPLES // batch_size)
    order = Order(
        [dataset.num_samples for dataset in datasets],
        [source.weight for source in recipe.data.train],
        seed=recipe.seed,
        global_batch_size=batch_size,
    )
    cpu, wall = PartClock(now=time.thread_time), PartClock(now=time.perf_counter)

    @contextmanager
    def part(name: str) -> Iterator[None]:
        with wall.part(name), cpu.part(name):
            yield

    batches = training_loader(
        datasets,
        order,
        data=recipe.data,
        context_length=recipe.model.text.context_length,
        global_batch_size=batch_size,
        seed=recipe.seed,
        rank=0,
        world_size=1,
        start_step=0,
        stop_step=rounds + 1,
        num_workers=0,
        part=part,
    )
    seconds, bad = [], 0
    with one_thread(), closing(batches):  # type: ignore[type-var]
        next(batches)  # loads the vocabulary and opens shards
        cpu.take()
        wall.take()
        for _ in range(rounds):
            with cpu.part(COLLATE):
                bad += len(next(batches).bad_samples)
            seconds.append(cpu.take() | {READ: wall.take()[READ]})
    return LoaderCost(
        num_samples=rounds * batch_size,
        bad_samples=bad,
        sample_seconds={part: median(batch.get(part, 0.0) for batch in seconds) / batch_size for part in PARTS},
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch computes on one thread inside the block, as it does in loader processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
