"""What a training does around its loop: the device, the run folder, full disks. Processes are in test_training.py."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import small_batch, small_model, small_recipe, small_training

from mlip_cli.commands.training import measure
from mlip_cli.devices import batch_named, full_memory_named
from mlip_cli.errors import RunError, Stopped, UsageError
from mlip_cli.evaluate.evaluators import Evaluator, Measures
from mlip_cli.evaluate.together import OnBatch
from mlip_cli.losses.objective import Objective
from mlip_cli.recipe.load import absolute_paths, recipe_yaml
from mlip_cli.runs import recording
from mlip_cli.runs.folder import Run, claimed
from mlip_cli.runs.recording import recorded
from mlip_cli.runs.start import choose_start, command_to_resume
from mlip_cli.terminal.output import warn
from mlip_cli.terminal.panel import TrainingPanel
from mlip_cli.train.journal import Journal
from mlip_cli.train.loop import Timetable, train
from mlip_cli.train.metrics import MetricsFile
from mlip_cli.train.optim import Schedule
from mlip_cli.train.resume import Saver
from mlip_cli.train.setup import training_device
from mlip_cli.train.state import Progress
from mlip_cli.train.step import Stepper, StepSettings
from mlip_cli.train.trackers import Trackers
from mlip_cli.types import Batch, Encoder

CPU = torch.device("cpu")
FULL_DEVICE = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
SETTINGS = StepSettings(
    Schedule(1e-3, warmup_steps=2, total_steps=2), clip_grad_norm=None, global_batch_size=8, micro_batch_size=None
)
MICRO_BATCH = ("train.micro_batch_size", None, 4)
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def opened(folder: Path) -> AbstractContextManager[None]:
    return recorded(Run(folder), small_recipe(), device=CPU, fingerprints={}, step=0)


def test_half_precision_without_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe = small_recipe()
    assert training_device(recipe).type != "cuda"
    with pytest.raises(UsageError) as error:
        training_device(recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": "fp16"})}))
    assert str(error.value) == "train.precision fp16: needs CUDA, and the device is cpu here; take bf16 or fp32"


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (8, "--batch-size: the device has no memory for 8 samples at once; set it to 4 or less"),
        (1, "--batch-size: the device has no memory for one sample alone; take a smaller model or smaller pictures"),
    ],
)
def test_memory_that_does_not_suffice_is_one_line_with_a_cure(size: int, message: str) -> None:
    with pytest.raises(RunError) as error, batch_named("--batch-size", size):
        raise FULL_DEVICE
    assert str(error.value) == message


def test_a_cpu_without_memory_gets_the_same_cure_and_other_errors_pass_through() -> None:
    with pytest.raises(RunError, match="x: the device has no memory for y; z"), full_memory_named("x", "y", "z"):
        torch.empty(2**55)
    with pytest.raises(RuntimeError, match="mat1 and mat2") as error, full_memory_named("x", "y", "z"):
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not isinstance(error.value, RunError)


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "NCCL error: unhandled cuda error\nLast error: Failed to CUDA calloc 2147483648 bytes",
    ],
)
def test_libraries_that_find_no_memory_on_a_gpu_get_the_cure_too(words: str) -> None:
    with pytest.raises(RunError, match="x: the device has no memory for y; z"), full_memory_named("x", "y", "z"):
        raise RuntimeError(words)


def test_an_evaluation_that_does_not_fit_is_not_cured_by_smaller_batches_of_training() -> None:
    def evaluate(encoder: Encoder, on_batch: OnBatch) -> Measures:
        raise FULL_DEVICE

    with pytest.raises(RunError) as error, batch_named("train.micro_batch_size", 8):
        measure(
            small_training(small_model()), [Evaluator("a", 6, (), evaluate)], TrainingPanel(9, is_live=False), 4, bool
        )
    assert str(error.value) == (
        "step 4: evaluating a: the device has no memory for 128 pictures at once beside the training; take a smaller "
        "model, or leave it out of evaluate.zeroshot or data.validation and measure it afterwards"
    )


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """The handler of Ctrl-C comes back, which a training gives up at the first one."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(
    ("number", "at", "is_left"),
    [(signal.SIGINT, 1, True), (signal.SIGINT, 2, False), (signal.SIGTERM, 2, True)],
)
def test_ctrl_c_does_not_end_the_evaluation_of_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, at: int, is_left: bool
) -> None:
    recipe, model = small_recipe(evaluate={"every_steps": 1}, log={"every_steps": 1}), small_model(dtype=torch.float32)
    left: dict[int, bool] = {}
    saved: list[int] = []

    def evaluate(step: int, is_leaving: Callable[[], bool]) -> dict[str, float]:
        if step == at:
            os.kill(os.getpid(), number)
        left[step] = is_leaving()
        return {} if left[step] else {"a_acc1": 0.5}

    training = small_training(model)
    saver = Saver(tmp_path, recipe.train, training, data={}, best_metric=None)
    monkeypatch.setattr(saver, "save", lambda progress: saved.append(progress.step))
    with nullcontext() if at == 2 else pytest.raises(Stopped):
        train(
            Stepper(training, Objective(recipe.losses), SETTINGS),
            iter([small_batch(), small_batch()]),
            Progress(),
            timetable=Timetable(total_steps=2, log_every=1, evaluate_every=1),
            plan_of=lambda _: model.training_plan,
            evaluate=evaluate,
            saver=saver,
            journal=Journal(MetricsFile(tmp_path / "metrics.jsonl"), TrainingPanel(2, is_live=False), Trackers()),
        )
    assert left[at] == is_left
    assert saved == [at]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "a_acc1" in line] == [step for step in left if not left[step]]


def test_a_terminal_shows_the_first_step_of_a_session_long_before_its_first_line(tmp_path: Path) -> None:
    recipe, model = small_recipe(), small_model(dtype=torch.float32)
    training, panel = small_training(model), TrainingPanel(8, is_live=True)
    seen: list[list[int]] = []

    def batches() -> Iterator[Batch]:
        for _ in range(2):
            yield small_batch()
            losses = panel._losses.get("loss")
            seen.append([int(step) for step, _ in losses.points] if losses else [])
        raise RunError("enough")

    with pytest.raises(RunError, match="enough"):
        train(
            Stepper(training, Objective(recipe.losses), SETTINGS),
            batches(),
            Progress(step=3),
            timetable=Timetable(total_steps=8, log_every=8, evaluate_every=None),
            plan_of=lambda _: model.training_plan,
            evaluate=lambda *_: {},
            saver=Saver(tmp_path, recipe.train, training, data={}, best_metric=None),
            journal=Journal(MetricsFile(tmp_path / "metrics.jsonl"), panel, Trackers()),
        )
    assert seen == [[4], [4]], "after the first step, and not after the second"
    assert not (tmp_path / "metrics.jsonl").exists()


def test_the_stamp_adds_the_cpu_time_of_a_session_and_of_its_children(tmp_path: Path) -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    for _ in range(2):
        with opened(tmp_path / "run"):
            subprocess.run([sys.executable, "-c", burn], check=True)
    own = [session["cpu_s"] for session in json.loads((tmp_path / "run" / "run.json").read_text())["sessions"]]
    assert len(own) == 2
    assert min(own) >= 0.29


def test_a_full_disk_names_the_run_and_the_stamp_says_why_it_ended(tmp_path: Path) -> None:
    with pytest.raises(RunError) as error, opened(tmp_path / "run"):
        raise FULL
    assert str(error.value) == f"{tmp_path / 'run'}: No space left on device; make room and go on with --resume"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["end_reason"].startswith("failed: [Errno 28]")


def test_a_log_that_cannot_be_written_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"run: No space left on device"), opened(tmp_path / "run"):
        warn("a line")
    assert "Traceback" not in capsys.readouterr().err


def test_without_room_for_the_recipe_the_folder_stays_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: str) -> None:
        raise FULL

    monkeypatch.setattr(recording, "write_text", full)
    with pytest.raises(RunError), opened(tmp_path / "run"):
        pass
    assert list((tmp_path / "run").iterdir()) == []


def test_latest_is_written_in_runs_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latest").write_text("the user's own")
    for folder in ("mine", "runs/a", "runs/b"):
        with opened(Path(folder)):
            pass
    assert (tmp_path / "latest").read_text() == "the user's own"
    assert (tmp_path / "runs" / "latest").read_text() == "b\n"


def test_runs_that_start_within_a_second_have_names_of_their_own(tmp_path: Path) -> None:
    found = [claimed(tmp_path / "runs" / "openmoji-20261122-084311") for _ in range(3)]
    names = [f"openmoji-20261122-084311{number}" for number in ("", "-2", "-3")]
    assert [path.name for path in found] == names
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == names


def test_the_command_to_continue_is_the_one_that_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    overrides = ["model.merging.at=[2, 3]"]
    assert command_to_resume("openmoji", overrides, out=None) == (
        "mlip pretrain openmoji 'model.merging.at=[2, 3]' --resume"
    )
    monkeypatch.setenv("RANK", "0")
    assert command_to_resume("a b.yaml", [], out=Path("runs/x")) == (
        "torchrun ... -m mlip_cli pretrain 'a b.yaml' --out runs/x --resume"
    )


def test_a_signal_leaves_an_evaluation_and_its_numbers() -> None:
    asked = False

    def evaluate(encoder: Encoder, on_batch: OnBatch) -> Measures:
        nonlocal asked
        for _ in range(2):
            asked = encoder.model is second
            on_batch(3)
        return Measures({"a_acc1": 0.5}, "top-1 50.0 %; n 6")

    evaluators = [Evaluator(name, 6, (), evaluate) for name in "ab"]
    panel = TrainingPanel(9, is_live=False)
    first, second = small_model(), small_model()
    assert measure(small_training(first), evaluators, panel, 4, lambda: asked) == {"a_acc1": 0.5}
    assert not first.training
    assert measure(small_training(second), evaluators, panel, 4, lambda: asked) is None


@pytest.mark.parametrize(
    ("model", "drawn"),
    [
        ({}, None),
        ({"merging": {"rate": 0.0, "method": "random_drop"}}, None),
        ({"text": {"dropout": 0.1}}, "model.text.dropout"),
        ({"merging": {"rate": 0.5, "method": "random_drop"}}, "random_drop"),
    ],
)
def test_micro_batches_change_on_resume_only_where_forward_passes_draw_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: dict[str, Any], drawn: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = Path("runs/a/checkpoints/step_0000004")
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.pt").touch()
    recipe = small_recipe(model=model)
    Path("runs/a/recipe.yaml").write_text(recipe_yaml(absolute_paths(recipe)))
    changed = recipe.model_copy(update={"train": recipe.train.model_copy(update={"micro_batch_size": 4})})
    if drawn is None:
        assert choose_start(changed, "x", out=Path("runs/a"), resume=True).changes == (MICRO_BATCH,)
        assert choose_start(changed, "x", out=None, resume=True).resumes
        return
    with pytest.raises(UsageError) as error:
        choose_start(changed, "x", out=Path("runs/a"), resume=True)
    assert str(error.value) == (
        "--resume runs/a: the recipe differs from the one this run began with (train.micro_batch_size: None -> 4, "
        f"which changes what {drawn} draws); undo the change, or start a new run with another --out"
    )
    assert not choose_start(changed, "x", out=None, resume=True).resumes
