"""Real gloo processes: a late one is waited for, and what each of them found is named."""

import subprocess
import sys

TWO_RANKS = """
import os, time
from datetime import timedelta
import torch.distributed as dist
from mlip_cli.distributed import wait_for_ranks
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on a port that is free, as torchrun's
os.environ |= {{"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}}
os.environ |= {{"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}}
child = os.fork()
if child == 0:
    os.environ["RANK"] = "1"
dist.init_process_group("gloo", timeout=timedelta(seconds=4))
{work}
dist.destroy_process_group()
if child == 0:
    os._exit(0)  # the store is not its own to end
assert os.waitpid(child, 0)[1] == 0
"""


LATE = """
if child == 0:
    time.sleep(6)
wait_for_ranks()
"""

BAD_SAMPLES = """
import torch
from mlip_cli.output import start_logging
from mlip_cli.train.loop import FiniteGuard, Progress, account
from mlip_cli.train.metrics import Stopwatch
from mlip_cli.types import BadSample
start_logging()
CPU, progress = torch.device("cpu"), Progress()
guard, watch = FiniteGuard(CPU, progress), Stopwatch(iter([]), CPU)
for count in (3, 4, 0, 5):
    if child == 0:
        watch.bad_samples = [BadSample("far.tar", str(n), "torn") for n in range(count)]
    account(progress, guard, watch, CPU)
assert progress.bad_samples == 12 and watch.bad_samples == []
"""


def two_ranks(work: str) -> subprocess.CompletedProcess[str]:
    worker = TWO_RANKS.format(work=work)
    done = subprocess.run([sys.executable, "-c", worker], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_a_rank_that_is_late_by_more_than_collectives_bear_is_waited_for() -> None:
    two_ranks(LATE)


def test_bad_samples_of_every_rank_are_named_ten_a_run() -> None:
    named = [line for line in two_ranks(BAD_SAMPLES).stderr.splitlines() if line.startswith("warning: ")]
    words = [f"warning: far.tar: sample {n}: torn; another one takes its place" for n in (0, 1, 2, 0, 1, 2, 3, 0, 1)]
    last = "warning: far.tar: sample 2: torn; another one takes its place; later ones are only counted"
    assert named == [*words, last]
