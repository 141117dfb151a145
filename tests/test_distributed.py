"""Real gloo processes wait for a late one."""

import os
import subprocess
import sys

WORKER = """
import os, time
from datetime import timedelta
import torch.distributed as dist
from mlip_cli.distributed import wait_for_ranks
os.environ |= {{"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "{port}"}}
child = os.fork()
if child == 0:
    os.environ["RANK"] = "1"
dist.init_process_group("gloo", timeout=timedelta(seconds=4))
if child == 0:
    time.sleep(6)
wait_for_ranks()
dist.destroy_process_group()
if child:
    assert os.waitpid(child, 0)[1] == 0
"""


def test_a_rank_that_is_late_by_more_than_collectives_bear_is_waited_for() -> None:
    worker = WORKER.format(port=30_000 + os.getpid() % 10_000)
    done = subprocess.run([sys.executable, "-c", worker], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
