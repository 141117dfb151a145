"""Cores and open files, as the kernel lets a process use them."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from mlip_cli.machine import allow_open_files, usable_cores

MANY = 64


@pytest.fixture(autouse=True)
def bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(MANY)), raising=False)


def machine(root: Path, groups: str, files: dict[str, str]) -> Path:
    """A folder with the files that tell the cgroups of a process and their limits."""
    for name, text in {
        "proc/self/cgroup": groups,
        **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "750000 100000\n"}, 7),  # a container with cgroups of version 2
        ("0::/\n", {"cpu.max": "max 100000\n"}, MANY),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {}, MANY),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000\n", "a/b/cpu.max": "max 100000\n"}, 4),
        ("0::/a/b\n", {"a/cpu.max": "900000 100000\n", "a/b/cpu.max": "300000 100000\n"}, 3),
        ("0::/a\n", {"other/cpu.max": "100000 100000\n"}, MANY),
        # version 1: the container's own group is mounted, under a path that only the host knows
        (
            "5:memory:/docker/1\n4:cpu,cpuacct:/docker/1\n0::/system.slice\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "600000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
            6,
        ),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, MANY),
        (
            "4:cpu:/job/7\n",
            {"cpu/job/7/cpu.cfs_quota_us": "250000\n", "cpu/job/7/cpu.cfs_period_us": "50000\n"},
            5,
        ),
        ("4:cpuset:/job\n", {"cpuset/cpu.cfs_quota_us": "1\n", "cpuset/cpu.cfs_period_us": "1\n"}, MANY),
    ],
)
def test_the_smallest_limit_counts(tmp_path: Path, groups: str, files: dict[str, str], expected: int) -> None:
    assert usable_cores(root=machine(tmp_path, groups, files)) == expected


def test_where_the_kernel_tells_nothing_all_cores_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_cores(root=tmp_path) == MANY
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert usable_cores(root=tmp_path) == 3
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores(root=tmp_path) == 1


def test_the_limit_of_open_files_rises_as_far_as_it_may() -> None:
    """In a process of its own, since a hard limit that was lowered stays so."""
    work = """if True:
        import resource
        from mlip_cli.machine import allow_open_files
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 300))
        for needed in (80, 200, 150, 1000):
            print(allow_open_files(needed), *resource.getrlimit(resource.RLIMIT_NOFILE))
    """
    done = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True, check=True)
    assert done.stdout == "100 100 300\n200 200 300\n200 200 300\n300 300 300\n"
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert allow_open_files(1) == soft
