"""What this machine lets a process use: cores and open files."""

import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")


def usable_cores(process: int = 0, *, root: Path = ROOT) -> int:
    """Number of cores that a process may keep busy, at least 1.

    Three limits count: the cores of the machine, those that the process is bound to, and the quota of its cgroups,
    which containers have (Kubernetes: `limits.cpu`). Of a quota of 7.5 cores 7 are usable.

    Args:
        process: 0: this one. Its cores count; the quota is always that of this process.
        root: the folder in which `proc` and `sys` lie.
    """
    bound = len(os.sched_getaffinity(process)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([bound, *map(math.floor, _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """Cores that each cgroup around this process allows, where one is limited (cgroups(7); versions 1 and 2)."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    mounts = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            for folder in _folders(mounts, path):
                quota, _, period = _words(folder / "cpu.max").partition(" ")
                yield from _cores(quota, period)
        elif "cpu" in controllers.split(","):
            for mount in (mounts / "cpu", mounts / controllers):
                for folder in _folders(mount, path):
                    yield from _cores(_words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us"))


def _folders(mount: Path, path: str) -> Iterator[Path]:
    """The folder of a cgroup and of those around it. In a container the mount may begin at the container's own."""
    inside = PurePosixPath(path.lstrip("/"))
    yield from (mount / name for name in (inside, *inside.parents))


def _words(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _cores(quota: str, period: str) -> Iterator[float]:
    """Microseconds of CPU time in each period; `max`, -1 and a missing file set no limit."""
    if quota.isdecimal() and period.isdecimal() and int(period) > 0:
        yield int(quota) / int(period)


def allow_open_files(needed: int) -> int:
    """Raise the soft limit of open files to `needed`, or as far as the hard limit lets us; return what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return needed if soft == resource.RLIM_INFINITY else soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):  # macOS has a lower limit that it does not tell
        return soft
    return wanted
