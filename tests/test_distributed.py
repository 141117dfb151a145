"""Real gloo processes: a late one is waited for, all do the same, and what each of them found is named."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import indent

import pytest
from killed_for_tests import Forked, pretrain
from models_for_tests import small_recipe
from shards_for_tests import make_dataset

from mlip_cli.recipe.load import recipe_yaml

pytestmark = pytest.mark.slow

TWO_RANKS = """
import os, time
from datetime import timedelta
import torch, torch.distributed as dist
from mlip_cli import distributed
from mlip_cli.distributed import process_group, wait_for_ranks
distributed.COLLECTIVE_TIMEOUT = distributed.START_TIMEOUT = timedelta(seconds=4)
dist.new_group = None  # a second group may choose an address that other nodes do not reach
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on a port that is free, as torchrun's
os.environ |= {{"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}}
os.environ |= {{"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}}
child = os.fork()
if child == 0:
    os.environ["RANK"] = "1"
{work}
if child == 0:
    os._exit(0)  # the store is not its own to end
assert os.waitpid(child, 0)[1] == 0
"""


LATE = """
if child == 0:
    time.sleep(6)
wait_for_ranks()
"""

NEVER = """
from mlip_cli.errors import RunError
if child == 0:  # rank 1
    try:
        wait_for_ranks(timedelta(seconds=1))
    except RunError as error:
        print(error)
    wait_for_ranks()
else:
    time.sleep(3)
    wait_for_ranks()
    wait_for_ranks()
"""

AGAIN = """
for attempt in range(2):
    with process_group(torch.device("cpu")):
        started = time.monotonic()
        if child == 0:
            time.sleep(1.5)
        wait_for_ranks()
        assert child == 0 or time.monotonic() - started > 1, attempt
"""

NOT_STARTED = """
import os
from datetime import timedelta
import torch, torch.distributed as dist
from mlip_cli import distributed
from mlip_cli.errors import RunError
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
os.environ |= {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
distributed.START_TIMEOUT = timedelta(seconds=1)
try:
    with distributed.process_group(torch.device("cpu")):
        pass
except RunError as error:
    print(error)
"""

BAD_SAMPLES = """
import torch
from mlip_cli.terminal.output import start_logging
from mlip_cli.train.state import Progress
from mlip_cli.train.step import FiniteGuard
from mlip_cli.train.loop import count
from mlip_cli.train.metrics import Stopwatch
from mlip_cli.types import BadSample
start_logging()
CPU, progress = torch.device("cpu"), Progress()
guard, watch = FiniteGuard(CPU), Stopwatch(iter([]), CPU)
for number in (3, 4, 0, 5):
    if child == 0:
        watch.bad_samples = [BadSample("far.tar", str(n), "torn") for n in range(number)]
    count(progress, guard, watch)
assert progress.bad_samples == 12 and watch.bad_samples == []
"""


ASKING = """
import signal
from mlip_cli.train.signals import StopRequest
with StopRequest(torch.device("cpu")) as stop:
    is_time, saved = child == 0, []  # by the clock of one rank
    for step in range(5):
        if stop.agreed(save=is_time).save:
            is_time, saved = False, [*saved, step]
    assert saved == [1], saved
    assert stop.agreed(save=child == 0, at_once=True).save
    assert not stop.agreed(save=False).save
    if child == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    assert [stop.agreed(save=False).exit_code for _ in range(2)] == [0, 143]
"""


def two_ranks(work: str) -> subprocess.CompletedProcess[str]:
    if "with process_group" not in work:
        work = 'with process_group(torch.device("cpu")):\n' + indent(work, "    ")
    worker = TWO_RANKS.format(work=work)
    done = subprocess.run([sys.executable, "-c", worker], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_ranks_wait_for_one_that_is_later_than_the_timeout() -> None:
    two_ranks(LATE)


def test_ranks_that_torchrun_starts_again_wait_for_each_other_again() -> None:
    """In the store of the first attempt, which torchrun keeps."""
    two_ranks(AGAIN)


def test_a_rank_that_does_not_come_is_named() -> None:
    did_not_come = "of 2 did not come within 0:00:01; look at what it printed, and whether its node is up"
    assert two_ranks(NEVER).stdout == f"rank 0 {did_not_come}\n"


def test_ranks_that_do_not_start_are_named() -> None:
    done = subprocess.run([sys.executable, "-c", NOT_STARTED], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("rank 1, 2 of 3 did not come within 0:00:01; ")


def test_ranks_agree_one_step_later_and_save_once() -> None:
    two_ranks(ASKING)


def test_ten_bad_samples_of_all_ranks_are_named_in_a_run() -> None:
    named = [line for line in two_ranks(BAD_SAMPLES).stderr.splitlines() if line.startswith("warning: ")]
    words = [f"warning: far.tar: sample {n}: torn; another one takes its place" for n in (0, 1, 2, 0, 1, 2, 3, 0, 1)]
    last = "warning: far.tar: sample 2: torn; another one takes its place; later ones are only counted"
    assert named == [*words, last]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    data = str(make_dataset(folder / "train", n=24))
    made = small_recipe(mlip=False, train=data, data={"num_workers": 0})
    (folder / "small.yaml").write_text(recipe_yaml(made))
    return folder / "small.yaml"


def counted(arguments: Sequence[str], environment: dict[str, str], words: str) -> None:
    """Body of a forked process: `mlip pretrain`, and a line in WORDS.passes for each pass over a batch."""
    os.environ.update(environment)
    from mlip_cli.train import step

    add_gradients = step.add_gradients

    def adding(*given: object, **named: object) -> object:
        with open(f"{words}.passes", "a") as file:
            file.write(f"{os.environ['RANK']}\n")
        return add_gradients(*given, **named)  # type: ignore[arg-type]

    step.add_gradients = adding  # type: ignore[assignment]
    pretrain(arguments, environment, words)


def test_a_step_is_one_pass_and_a_run_has_one_spare_pass(recipe: Path, tmp_path: Path) -> None:
    """By it DDP finds the order of its sums, which a resumed run then shares."""
    words = tmp_path / "words"
    with Forked([str(recipe), "--out", str(tmp_path / "run")], words, ranks=2, body=counted) as training:
        assert training.join() == [0, 0], training.said()
    assert sorted(Path(f"{words}.passes").read_text().split()) == ["0"] * 9 + ["1"] * 9


def on_its_own_disk(arguments: Sequence[str], environment: dict[str, str], words: str) -> None:
    """Body of a forked process: `mlip pretrain` in a folder that only this rank sees."""
    os.chdir(f"{words}.{environment.get('RANK', '0')}")
    pretrain(arguments, environment, words)


def test_a_rank_that_does_not_see_the_checkpoint_is_refused(recipe: Path, tmp_path: Path) -> None:
    words = tmp_path / "words"
    for rank in (0, 1):
        Path(f"{words}.{rank}").mkdir()
    arguments = [str(recipe), "--out", "run", "--resume"]
    first = [*arguments, "train.checkpoint_every.steps=2", "train.steps=100000"]
    with Forked(first, words, body=on_its_own_disk) as training:
        while not list(Path(f"{words}.0/run/checkpoints").glob("step_*")):
            assert training.is_at_work(), training.said()
        os.kill(training.processes[0].pid, signal.SIGTERM)
        assert training.join() == [143], training.said()
    with Forked([*arguments, "train.steps=100000"], words, ranks=2, body=on_its_own_disk) as training:
        training.processes[1].join(60)
        assert training.processes[1].exitcode == 2, training.said()
    assert "rank 1: error: run/checkpoints/step_" in training.said()
    assert (
        "rank 0 resumes from this checkpoint, and rank 1 does not see it; keep run folders on a disk" in training.said()
    )
