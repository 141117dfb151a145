"""recipes/prepare.sbatch as SLURM runs it: each task of the array, then what waits for all of them."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from runs_of_prepare_for_tests import run
from sources_for_tests import contents, write_sidecars

SCRIPT = Path(__file__).parents[1] / "recipes" / "prepare.sbatch"
RECORDING = """#!/bin/bash
printf '%s\\n' "$@" >{name}.words
"""


def task(folder: Path, number: int, *words: str, restarts: int = 0) -> tuple[list[str], list[str]]:
    """The words with which a task of --array=5-7 calls mlip, and those with which it calls sbatch."""
    for name in ("mlip", "sbatch"):
        (folder / f"{name}.words").unlink(missing_ok=True)
        (folder / "commands").mkdir(exist_ok=True)
        (folder / "commands" / name).write_text(RECORDING.replace("{name}", name))
        (folder / "commands" / name).chmod(0o755)
    slurm = {
        "SLURM_ARRAY_JOB_ID": "1234",
        "SLURM_ARRAY_TASK_ID": str(number),
        "SLURM_ARRAY_TASK_MIN": "5",
        "SLURM_ARRAY_TASK_COUNT": "3",
        "SLURM_RESTART_COUNT": str(restarts),
        "SLURM_CPUS_PER_TASK": "1",
    }
    subprocess.run(
        ["bash", str(SCRIPT), *words],
        cwd=folder,
        env=os.environ | slurm | {"PATH": f"{folder / 'commands'}:{os.environ['PATH']}"},
        check=True,
    )
    found = [folder / f"{name}.words" for name in ("mlip", "sbatch")]
    mlip, sbatch = (path.read_text().splitlines() if path.exists() else [] for path in found)
    return mlip, sbatch


@pytest.mark.slow
def test_the_tasks_and_the_job_after_them_leave_the_bytes_of_one_process(tmp_path: Path) -> None:
    write_sidecars(tmp_path / "my pictures", 22)
    words = ("my pictures", "out", "--holdout", "0.3")
    assert run(tmp_path, *words, "--workers", "1")[0] == 0
    (tmp_path / "out").rename(tmp_path / "whole")
    finishing = []
    for number in (7, 5, 6):
        (command, *given), sbatch = task(tmp_path, number, *words)
        finishing += sbatch
        assert command == "prepare-data"
        assert given == [*words, "--part", f"{number - 4}/3", "--workers", "1"]
        assert run(tmp_path, *given)[0] == 0
        assert bool(sbatch) == (number == 5)
    assert "--dependency=afterok:1234" in finishing
    tool, command, *given = shlex.split(finishing[finishing.index("--wrap") + 1])
    assert [tool, command, *given] == ["mlip", "prepare-data", *words, "--finish"]
    assert run(tmp_path, *given)[0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_task_that_is_queued_again_queues_nothing_twice(tmp_path: Path) -> None:
    assert task(tmp_path, 5, "in", "out", restarts=1)[1] == []


def test_without_arguments_the_script_says_how_it_is_used() -> None:
    done = subprocess.run(["bash", str(SCRIPT)], text=True, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: usage: sbatch prepare.sbatch SOURCE OUT [OPTION ...]\n"
