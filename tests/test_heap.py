"""Freed memory is there again without the system's help."""

import platform
import resource

import pytest
import torch

from mlip_cli.heap import keep_freed_memory

PAGES = 16 * 1024


def page_faults() -> int:
    """That writing a new tensor of `PAGES` pages needs."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(PAGES, 4096, dtype=torch.uint8).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries stay as they are")
def test_freed_pages_are_kept_when_asked_for() -> None:
    keep_freed_memory(False)
    page_faults()
    assert page_faults() >= PAGES / 512  # of 2 MiB, where the system gives such
    keep_freed_memory()
    for _ in range(5):  # aligned blocks leave gaps, which join
        page_faults()
    assert page_faults() < PAGES / 1024
