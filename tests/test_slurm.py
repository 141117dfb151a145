"""recipes/slurm.sbatch as SLURM runs it, on stand-ins for srun, scancel and scontrol: two nodes of one CPU process."""

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from forks_for_tests import mlip
from models_for_tests import small_recipe
from shards_for_tests import make_dataset
from torch.distributed.run import parse_args
from waits_for_tests import wait_until

from mlip_cli.recipe.load import recipe_yaml

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "recipes" / "slurm.sbatch"
STEPS = 80
"""Enough for the signal to arrive before the last one."""
JOB = str(os.getpid() % 10_000)  # the script makes a port of it

SRUN = """#!{python}
# Starts the command once a node. Like the real one it answers its own SIGTERM by killing all tasks.
import os, signal, subprocess, sys, time
arguments = sys.argv[1:]
with open("srun.words", "w") as file:
    file.write("\\n".join(arguments))
while arguments[0].startswith("--"):
    arguments.pop(0)
tasks = [subprocess.Popen(arguments) for _ in range(int(os.environ["SLURM_JOB_NUM_NODES"]))]
def kill(number, frame):
    for task in tasks:
        task.kill()
signal.signal(signal.SIGTERM, kill)
with open("tasks.tmp", "w") as file:
    file.write(" ".join(str(task.pid) for task in tasks))
os.rename("tasks.tmp", "tasks")
sys.exit(max(abs(task.wait()) for task in tasks))
"""

SCANCEL = """#!/bin/bash
# By default signals reach the tasks of the steps: neither the batch script nor what the tasks have started.
[ "$1 $2" = "--signal=TERM $SLURM_JOB_ID" ] && kill -TERM $(cat tasks)
"""

SCONTROL = """#!/bin/bash
case "$1 $2" in
    "show hostnames") printf 'localhost\\nlocalhost\\n' ;;
    *) echo "$@" >>scontrol.log ;;
esac
"""

RECORDING_TORCHRUN = """#!/bin/bash
[ "$*" = --help ] && exec {python} -m torch.distributed.run --help
printf '%s\\n' "$@" >torchrun.words
"""

FAILING_TORCHRUN = """#!/bin/bash
exit 1
"""

WAITING_TORCHRUN = """#!/bin/bash
trap 'exit 1' TERM
while :; do sleep 0.1; done
"""


class Cluster:
    """A folder to work in, and the stand-ins on PATH."""

    def __init__(self, folder: Path, recipe: Path) -> None:
        self.folder, self.recipe = folder, recipe
        self.commands = folder / "bin"
        self.commands.mkdir()
        self.add("srun", SRUN.replace("{python}", sys.executable))
        self.add("scancel", SCANCEL)
        self.add("scontrol", SCONTROL)
        self.add("torchrun", f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n')
        self.started: list[subprocess.Popen[str]] = []

    def add(self, name: str, text: str) -> None:
        path = self.commands / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def start(self, *overrides: str, nodes: int = 2) -> subprocess.Popen[str]:
        """The script, as SLURM starts it again after every requeue."""
        for left in ("tasks", "scontrol.log"):
            (self.folder / left).unlink(missing_ok=True)
        slurm = {
            "SLURM_JOB_ID": JOB,
            "SLURM_JOB_NODELIST": "localhost,localhost",
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_GPUS_ON_NODE": "1",
            "SLURM_CPUS_ON_NODE": "192",
        }
        process = subprocess.Popen(
            ["bash", str(SCRIPT), str(self.recipe), "run", *overrides],
            cwd=self.folder,
            env=os.environ | slurm | {"PATH": f"{self.commands}:{os.environ['PATH']}", "COLUMNS": "200"},
            text=True,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def end(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """(exit code, words)"""
        _, words = process.communicate(timeout=120)
        return process.returncode, words

    def requeued(self) -> list[str]:
        log = self.folder / "scontrol.log"
        return log.read_text().splitlines() if log.exists() else []

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "run" / "checkpoints").glob("step_*"))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    data = make_dataset(tmp_path / "train", n=16)
    recipe = small_recipe(
        mlip=False, train=str(data), data={"num_workers": 0}, log={"every_steps": 1}, evaluate={"every_steps": None}
    )
    train = recipe.train.model_copy(update={"steps": STEPS, "device": "cpu"})
    (tmp_path / "small.yaml").write_text(recipe_yaml(recipe.model_copy(update={"train": train})))
    cluster = Cluster(tmp_path, tmp_path / "small.yaml")
    yield cluster
    for process in cluster.started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_signal_saves_and_queues_the_job_again_and_the_next_start_finishes_it(cluster: Cluster) -> None:
    metrics = cluster.folder / "run" / "metrics.jsonl"
    first = cluster.start()
    wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, first)
    first.send_signal(signal.SIGUSR1)
    code, words = cluster.end(first)
    (saved,) = cluster.checkpoints()
    assert saved < f"step_{STEPS:07d}"
    assert (code, cluster.requeued()) == (0, [f"requeue {JOB}"]), words
    assert f"slurm: saved {saved}; back into the queue" in words
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, int(saved[-7:]) + 1))

    cluster.add("torchrun", RECORDING_TORCHRUN.replace("{python}", sys.executable))
    code, words = cluster.end(cluster.start(nodes=1))  # one node is enough
    assert (code, cluster.requeued()) == (0, []), words
    asked = parse_args((cluster.folder / "torchrun.words").read_text().splitlines())
    assert (asked.nnodes, asked.nproc_per_node, asked.module, asked.training_script) == ("1", "1", True, "mlip_cli")
    done = mlip(asked.training_script_args, environment=os.environ, folder=cluster.folder)
    assert done.returncode == 0, done.stderr
    assert f"resuming run after step {len(steps)}" in done.stderr
    stamp = json.loads((cluster.folder / "run" / "run.json").read_text())
    assert stamp["end_reason"] == "finished"
    assert [session["ranks"] for session in stamp["sessions"]] == [2, 1]
    assert cluster.checkpoints()[-1] == f"step_{STEPS:07d}"


def test_a_training_that_fails_is_not_queued_again(cluster: Cluster) -> None:
    cluster.add("torchrun", FAILING_TORCHRUN)
    code, _ = cluster.end(cluster.start(nodes=1))
    assert (code, cluster.requeued()) == (1, [])


def test_a_job_without_a_new_checkpoint_is_not_queued_again(cluster: Cluster) -> None:
    cluster.add("torchrun", WAITING_TORCHRUN)
    process = cluster.start()
    wait_until((cluster.folder / "tasks").exists, process)
    process.send_signal(signal.SIGUSR1)
    code, words = cluster.end(process)
    assert (code, cluster.requeued()) == (1, [])
    assert words.splitlines()[-1] == (
        "error: run: no checkpoint since this job began; not queued again: give it more time, or checkpoint more often"
    )


def test_each_torchrun_gets_all_cores_of_its_node_and_binds_its_processes_if_it_can(cluster: Cluster) -> None:
    cluster.add("torchrun", RECORDING_TORCHRUN.replace("{python}", sys.executable))
    cluster.add("numactl", "#!/bin/bash\n")
    assert cluster.end(cluster.start(nodes=1))[0] == 0
    assert "--cpus-per-task=192" in (cluster.folder / "srun.words").read_text().splitlines()
    words = (cluster.folder / "torchrun.words").read_text().splitlines()
    assert getattr(parse_args(words), "numa_binding", "node") == "node"  # torch 2.9 has no such option
    cluster.add("torchrun", RECORDING_TORCHRUN.replace("{python} -m torch.distributed.run --help", "echo old"))
    assert cluster.end(cluster.start(nodes=1))[0] == 0
    assert not any("numa" in word for word in (cluster.folder / "torchrun.words").read_text().splitlines())


def test_without_arguments_the_script_says_how_it_is_used(cluster: Cluster) -> None:
    done = subprocess.run(["bash", str(SCRIPT)], cwd=cluster.folder, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: usage: sbatch slurm.sbatch RECIPE RUN [KEY=VALUE ...]\n"
