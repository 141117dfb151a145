"""How many loader processes there are, what each hands over at once, and whether all that fits into /dev/shm."""

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from mlip_cli.errors import RunError
from mlip_cli.files import GIB, MIB
from mlip_cli.machine import usable_cores
from mlip_cli.terminal.output import plural, size_in_words, warn

FOLDER = Path("/dev/shm")
"""Where Linux keeps shared memory. Other systems have no such folder, and nothing is checked there."""
ITEM_BYTES = 3 * MIB
"""Most bytes that a loader process hands over at once, unless one sample is larger: 20 samples of 224 px. Eight ranks
of 16 loader processes have 264 such items under way: 0.8 GiB."""


def ranks_here(world_size: int) -> int:
    """How many of the ranks run on this machine: torchrun says it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def default_num_workers(world_size: int) -> int:
    """Loader processes of each rank of a training by `world_size` ranks: its share of the machine's cores, less one for
    the rank itself."""
    ranks = ranks_here(world_size)
    # `torchrun --numa-binding` binds a rank to cores that it shares with some of the others; torchrun itself has all
    of_all = usable_cores(os.getppid()) if "LOCAL_WORLD_SIZE" in os.environ else usable_cores()
    return max(0, min(usable_cores(), of_all // ranks) - 1)


def items_ahead(num_workers: int) -> int:
    """Items that each loader process makes ahead, the one in its hands among them. Few processes need more, since one
    that is late then holds up a larger part of the work."""
    return 4 if num_workers <= 2 else 2


def samples_at_once(num_samples: int, sample_bytes: int) -> int:
    """How many of `num_samples` to put into an item so that all items are of almost one size, at most ITEM_BYTES."""
    most = max(1, ITEM_BYTES // sample_bytes)
    num_items = -(-num_samples // most)
    return -(-num_samples // num_items)


@dataclass(frozen=True)
class Need:
    """The shared memory that the loader processes of this machine take at most."""

    ranks: int
    num_workers: int
    """Of each rank."""
    item_bytes: int

    @property
    def num_bytes(self) -> int:
        """Of all items that are under way, and of the one that each rank copies."""
        ahead = self.num_workers * items_ahead(self.num_workers)
        return self.ranks * (ahead + 1) * self.item_bytes if ahead else 0

    def __str__(self) -> str:
        """The size, and how it comes about."""
        processes = plural(self.num_workers, "loader process", "loader processes")
        processes = f"{self.ranks} x {processes}" if self.ranks > 1 else processes
        parts = f"{items_ahead(self.num_workers)} x {size_in_words(self.item_bytes)}"
        return f"{size_in_words(self.num_bytes)} ({processes} x {parts})"

    def fitting(self, free: int) -> int:
        """The most loader processes, up to `num_workers`, whose items fit into `free` bytes."""
        numbers = range(self.num_workers, 0, -1)
        return next((n for n in numbers if replace(self, num_workers=n).num_bytes <= free), 0)


def free_shared_memory() -> int | None:
    """Free bytes of shared memory; None where the system does not say."""
    return shutil.disk_usage(FOLDER).free if FOLDER.is_dir() else None


def fitted(need: Need) -> int:
    """As many loader processes as were wanted, or as fit into shared memory; then a warning says so."""
    free = free_shared_memory()
    if free is None or need.num_bytes <= free:
        return need.num_workers
    fewer = need.fitting(free)
    warn(
        f"{FOLDER}: {size_in_words(free)} are free, so each rank starts "
        f"{plural(fewer, 'loader process', 'loader processes')} instead of {need.num_workers}; {cure(need, free)}"
    )
    return fewer


def check_shared_memory(need: Need) -> None:
    """See that it fits, before a loader process starts: one that writes beyond the end is killed without a word.

    Raises:
        RunError: it does not fit.
    """
    free = free_shared_memory()
    if free is not None and need.num_bytes > free:
        raise RunError(
            f"{FOLDER}: batches on their way need up to {need}, and {size_in_words(free)} are free; {cure(need, free)}"
        )


def cure(need: Need, free: int) -> str:
    """What to change where only `free` bytes are there."""
    enough = -(-2 * need.num_bytes // GIB)
    return f"docker run --shm-size={enough}g (or --ipc=host), or data.num_workers={need.fitting(free)}"
