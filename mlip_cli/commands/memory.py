"""Memory that does not suffice, as one line with a cure."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from mlip_cli.errors import RunError


@contextmanager
def full_memory_named(place: str, what: str, cure: str) -> Iterator[None]:
    """Turn what PyTorch says of a device without room into one line: `place`, what there is no memory for, the cure.

    Raises:
        RunError: the block needed more memory than there is.
    """
    try:
        yield
    except RuntimeError as error:
        # a CPU has no error of its own for it
        is_of_cpu = "DefaultCPUAllocator" in str(error) and not isinstance(error, RunError)
        if not isinstance(error, torch.OutOfMemoryError) and not is_of_cpu:
            raise
        raise RunError(f"{place}: the device has no memory for {what}; {cure}") from error


def batch_named(setting: str, size: int, *, note: str = "") -> AbstractContextManager[None]:
    """`full_memory_named` where `setting` says how many samples go through the model at once, `size` at present."""
    if size == 1:
        return full_memory_named(setting, "one sample alone", "take a smaller model or smaller pictures")
    return full_memory_named(setting, f"{size:,} samples at once", f"set it to {size // 2:,} or less{note}")
