"""What a batch costs before the model sees it: the real loader, run in this process on one thread."""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from statistics import median

import torch

from mlip_cli.data.dataset import ShardDataset
from mlip_cli.data.loader import DECODE_PICTURE, READ_SAMPLE, TRANSFORM_PICTURE
from mlip_cli.profiling.clock import PartClock
from mlip_cli.profiling.result import LoaderFacts
from mlip_cli.recipe.config import Recipe
from mlip_cli.train.setup import open_batches, order_of
from mlip_cli.types import Batch, PartOf

SAMPLES = 256
"""So many are read: enough for medians over eight batches."""
MOST_IN_A_BATCH = 32

COLLATE = "tokenize and collate"
SAMPLE_PARTS = (READ_SAMPLE, DECODE_PICTURE, TRANSFORM_PICTURE, COLLATE)


def measure_loader(
    recipe: Recipe, datasets: Sequence[ShardDataset], *, num_workers: int, ranks: int = 1
) -> LoaderFacts:
    """Time the training loader, in this process, on samples at random places of the data.

    The seconds of a sample are medians over batches. Reading counts wall-clock time and so the wait for the disk (what
    was read lately lies in memory and needs no wait); the other parts count seconds of one CPU core. `tokenize and
    collate` is all that is not reading, decoding or changing pictures: order, choice of captions, tokens, stacking.
    Sending a batch from process to process does not count.

    Args:
        num_workers: loader processes of a rank; 0: it loads in its own process.
        ranks: of the training on this machine.

    Raises:
        RunError: too many bad samples.
    """
    num_samples = sum(dataset.num_samples for dataset in datasets)
    batch_size = min(MOST_IN_A_BATCH, num_samples)
    rounds = max(3, SAMPLES // batch_size)
    cpu, wall = PartClock(now=time.thread_time), PartClock(now=time.perf_counter)

    @contextmanager
    def part(name: str) -> Iterator[None]:
        with wall.part(name), cpu.part(name):
            yield

    batches = training_batches(recipe, datasets, batch_size=batch_size, num_steps=rounds + 1, part=part)
    seconds, bad = [], 0
    with one_thread(), closing(batches):  # type: ignore[type-var]
        next(batches)  # loads the vocabulary and opens shards
        cpu.take()
        wall.take()
        for _ in range(rounds):
            with cpu.part(COLLATE):
                bad += len(next(batches).bad_samples)
            seconds.append(cpu.take() | {READ_SAMPLE: wall.take()[READ_SAMPLE]})
    sample_seconds = {part: median(batch.get(part, 0.0) for batch in seconds) / batch_size for part in SAMPLE_PARTS}
    return LoaderFacts(
        num_samples=rounds * batch_size,
        bad_samples=bad,
        sample_seconds=sample_seconds,
        loader_processes=num_workers,
        ranks=ranks,
        loader_images_per_s=max(num_workers, 1) / sum(sample_seconds.values()),
    )


def training_batches(
    recipe: Recipe, datasets: Sequence[ShardDataset], *, batch_size: int, num_steps: int, part: PartOf = nullcontext
) -> Iterator[Batch]:
    """The recipe's training batches at another size, loaded in this process."""
    order = order_of(recipe, datasets, global_batch_size=batch_size)
    return open_batches(recipe, datasets, order, steps=range(num_steps), num_workers=0, part=part)


def batch_seconds(loader: LoaderFacts, batch_size: int) -> dict[str, float]:
    """Seconds a batch by part, of all loader processes together.

    We assume that each process has a core for itself: a loader slows a step on a CPU that uses all cores.
    """
    share = batch_size / max(loader.loader_processes, 1)
    return {part: seconds * share for part, seconds in loader.sample_seconds.items()}


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch computes on one thread inside the block, as it does in loader processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
