"""How many samples a loader process hands over at once, and whether what is under way fits into /dev/shm."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from mlip_cli.errors import RunError
from mlip_cli.files import GIB

FOLDER = Path("/dev/shm")
"""Where Linux keeps shared memory. Other systems have no such folder, and nothing is checked there."""
MIB = 2**20
ITEM_BYTES = 3 * MIB
"""Most bytes that a loader process hands over at once, unless one sample is larger: 20 samples of 224 px. Eight ranks
of 16 loader processes have 264 such items under way: 0.8 GiB."""


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
        processes = f"{self.ranks} x {self.num_workers}" if self.ranks > 1 else f"{self.num_workers}"
        parts = f"{items_ahead(self.num_workers)} x {self.item_bytes / MIB:.1f} MiB"
        return f"{self.num_bytes / GIB:.2f} GiB ({processes} loader processes x {parts})"

    def cure(self, free: int) -> str:
        """What to change where only `free` bytes are there."""
        fitting = (n for n in range(self.num_workers, 0, -1) if Need(self.ranks, n, self.item_bytes).num_bytes <= free)
        enough = -(-2 * self.num_bytes // GIB)
        return f"docker run --shm-size={enough}g (or --ipc=host), or data.num_workers={next(fitting, 0)}"


def free_shared_memory() -> int | None:
    """Free bytes of shared memory; None where the system does not say."""
    return shutil.disk_usage(FOLDER).free if FOLDER.is_dir() else None


def check_shared_memory(need: Need) -> None:
    """See that it fits, before a loader process starts: one that writes beyond the end is killed without a word.

    Raises:
        RunError: it does not fit.
    """
    free = free_shared_memory()
    if free is not None and need.num_bytes > free:
        raise RunError(
            f"{FOLDER}: the batches under way need up to {need}, {free / GIB:.2f} GiB are free; {need.cure(free)}"
        )
