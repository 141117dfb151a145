"""metrics.jsonl survives kills and damage, and counts nothing twice or never."""

import errno
from pathlib import Path

import pytest
import torch
from models_for_tests import small_recipe

from mlip_cli.losses.objective import Objective
from mlip_cli.train.ahead import Copier, one_ahead
from mlip_cli.train.metrics import MetricsFile, Stopwatch
from mlip_cli.types import BadSample, Batch


@pytest.mark.parametrize("tail", ['{"step": 3, "lo', "\0\0\0\0\n", '{"step": 9}\n{"step": 10}\n', "[1]\n", ""])
def test_cutting_back_keeps_whole_lines_up_to_the_step(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.append({"step": 1, "loss": 2.5})
    metrics.append({"step": 2, "loss": float("nan")})
    whole = path.read_text()
    assert whole == '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": null}\n'
    path.write_text(whole + tail)
    metrics.cut_back(3, measured_step=3)
    assert path.read_text() == whole


def test_cutting_back_forgets_an_evaluation_that_no_checkpoint_knows(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for line in ({"step": 2, "acc1": 0.1}, {"step": 4, "loss": 1.0}, {"step": 4, "acc1": 0.2}):
        metrics.append(line)
    metrics.cut_back(4, measured_step=2)
    assert metrics.path is not None
    assert metrics.path.read_text() == '{"step": 2, "acc1": 0.1}\n{"step": 4, "loss": 1.0}\n'


def test_a_line_that_cannot_be_written_names_its_file() -> None:
    with pytest.raises(OSError, match="/dev/full") as error:
        MetricsFile(Path("/dev/full")).append({"step": 1})
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, "/dev/full")


def test_a_new_interval_forgets_no_bad_sample() -> None:
    bad = BadSample("shard", "key", "reason")
    batch = Batch(torch.zeros(2, 3, 4, 4), torch.zeros(2, 8), ("a", "b"), bad_samples=(bad,))
    cpu = torch.device("cpu")
    watch = Stopwatch(one_ahead(iter([batch, batch]), Copier(Objective(small_recipe(mlip=False).losses), cpu)), cpu)
    watch.next_batch()
    watch.restart()  # as after an evaluation between two lines of the log
    watch.next_batch()
    assert watch.images == 2
    assert watch.bad_samples == [bad, bad]
