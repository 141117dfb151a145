"""What the C library does with memory that was freed."""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3)


def keep_freed_memory(keep: bool = True) -> None:
    """Have glibc keep freed memory for what comes next, or treat it as at first; other C libraries stay as they are.

    At first it gives every large block back at once, and when the next one is asked for, the system writes zeros into
    all of its pages (tests/benchmarks/bench_heap.py). With it the process keeps the most that it needed.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_MAX, 0 if keep else 65_536)
        libc.mallopt(_TRIM_THRESHOLD, -1 if keep else 128 * 1024)
