"""TensorBoard and W&B get what metrics.jsonl gets; their troubles are not those of a training."""

import errno
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlip_cli.errors import Stopped, UsageError
from mlip_cli.recipe.config import Log
from mlip_cli.runs import start as run_start
from mlip_cli.runs.contents import MetricsLine
from mlip_cli.runs.folder import Run
from mlip_cli.runs.start import check_trackers
from mlip_cli.train.metrics import MetricsFile
from mlip_cli.train.trackers import Trackers, opened_trackers

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Recorder:
    """A tracker that keeps what it gets, or fails."""

    def __init__(self, name: str, error: Exception | None = None) -> None:
        self.name, self.error = name, error
        self.lines: list[MetricsLine] = []
        self.exit_codes: list[int] = []

    def append(self, line: MetricsLine) -> None:
        if self.error is not None:
            raise self.error
        self.lines.append(line)

    def close(self, exit_code: int) -> None:
        self.exit_codes.append(exit_code)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a folder, by tag."""
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = reading.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]
    }


def session(run: Run, log: Log, *, after: int, until: int) -> None:
    """Lines of the steps between, at every other one of an evaluation too."""
    with opened_trackers(log, run, config={}, step=after) as trackers:
        metrics = MetricsFile(run.metrics)
        metrics.cut_back(after, measured_step=after)
        for step in range(after + 1, until + 1):
            line = {"step": step, "loss": 4 / step, "scale/x": float("nan") if step == 3 else 10.0 * until}
            trackers.append(metrics.append(line))
            if step % 2 == 0:
                trackers.append(metrics.append({"step": step, "a_acc1": step / 8}))


def test_tensorboard_shows_metrics_jsonl_and_no_step_twice_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = Run(tmp_path)
    session(run, Log(tensorboard=True), after=0, until=6)
    session(run, Log(tensorboard=True), after=4, until=8)
    shown = scalars(run.tensorboard)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert shown.keys() == {"loss", "scale/x", "a_acc1"}
    for tag, points in shown.items():
        own = [(line["step"], pytest.approx(line[tag])) for line in lines if line.get(tag) is not None]
        assert points == own
    assert [step for step, _ in shown["loss"]] == list(range(1, 9))
    assert [step for step, _ in shown["scale/x"]] == [1, 2, 4, 5, 6, 7, 8]


def test_a_tracker_with_a_full_disk_is_named_once_and_the_others_continue(caplog: pytest.LogCaptureFixture) -> None:
    trackers, broken, whole = Trackers(), Recorder("log.wandb", FULL), Recorder("log.tensorboard")
    trackers.open("log.wandb", lambda: broken)
    trackers.open("log.tensorboard", lambda: whole)
    with caplog.at_level("WARNING", logger="mlip_cli"):
        for step in (1, 2):
            trackers.append({"step": step})
        trackers.close(0)
    assert [line["step"] for line in whole.lines] == [1, 2]
    assert (broken.exit_codes, whole.exit_codes) == ([], [0])
    assert caplog.messages == [
        "log.wandb: [Errno 28] No space left on device; it gets no more lines; metrics.jsonl has all of them"
    ]


def test_one_that_cannot_be_opened_is_named_and_our_own_mistakes_are_not_hidden(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").touch()
    with caplog.at_level("WARNING", logger="mlip_cli"):
        session(Run(tmp_path), Log(tensorboard=True), after=0, until=2)
    [words] = caplog.messages
    assert words.startswith("log.tensorboard: [Errno 17] File exists: ")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    trackers = Trackers()
    trackers.open("x", lambda: Recorder("x", KeyError("loss")))
    with pytest.raises(KeyError):
        trackers.append({"step": 1})


@pytest.mark.parametrize(
    ("error", "exit_code"), [(None, 0), (Stopped("x", exit_code=143), 143), (FULL, 1), (KeyboardInterrupt(), None)]
)
def test_trackers_hear_how_a_training_ended_but_a_second_ctrl_c_does_not_wait_for_them(
    tmp_path: Path, error: BaseException | None, exit_code: int | None
) -> None:
    recorder = Recorder("x")

    def train() -> None:
        with opened_trackers(Log(), Run(tmp_path), config={}, step=0) as trackers:
            trackers.open("x", lambda: recorder)
            if error is not None:
                raise error

    if error is None:
        train()
    else:
        with pytest.raises(type(error)):
            train()
    assert recorder.exit_codes == ([] if exit_code is None else [exit_code])


@pytest.mark.slow
def test_a_training_feeds_them(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from models_for_tests import small_recipe
    from shards_for_tests import make_dataset

    from mlip_cli.commands.pretrain import pretrain
    from mlip_cli.recipe.load import recipe_yaml

    data = str(make_dataset(tmp_path / "data", n=16))
    recipe = small_recipe(train=data, data={"validation": data, "num_workers": 0}, log={"every_steps": 2})
    (tmp_path / "small.yaml").write_text(recipe_yaml(recipe))
    changes = ["train.steps=4", "log.tensorboard=true"]
    pretrain(str(tmp_path / "small.yaml"), changes, out=tmp_path / "run", resume=False, dry_run=False, as_json=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 4]
    shown = scalars(tmp_path / "run" / "tensorboard")
    assert shown.keys() == {name for line in lines for name in line} - {"step"}
    for tag, points in shown.items():
        assert points == [(line["step"], pytest.approx(line[tag])) for line in lines if tag in line]


@pytest.mark.parametrize("log", [Log(tensorboard=True), Log(wandb="mine")])
def test_a_missing_package_is_named_before_the_training(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise run_start.PackageNotFoundError(name)

    monkeypatch.setattr(run_start, "version", missing)
    check_trackers(Log())
    name = "wandb" if log.wandb else "tensorboard"
    with pytest.raises(UsageError) as error:
        check_trackers(log)
    assert str(error.value) == f'log.{name}: the package {name} is not installed; pip install "mlip-cli[{name}]"'


SESSIONS = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_trackers import session
from mlip_cli.recipe.config import Log
from mlip_cli.errors import UsageError
from mlip_cli.terminal.output import start_logging
from mlip_cli.runs.folder import Run
from mlip_cli.train.trackers import opened_trackers

start_logging()
log, run = Log(wandb="mine"), Run(Path({run!r}))


def is_service(process: Path) -> bool:
    try:
        parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        return parent == os.getpid() and b"wandb-core" in (process / "cmdline").read_bytes()
    except OSError:  # it has ended
        return False


def service() -> int:
    [pid] = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and is_service(entry)]
    return pid


try:
{body}
except UsageError as error:
    print(f"error: {{error}}", file=sys.stderr)
"""

BODIES = {
    "sessions": """
    session(run, log, after=0, until=6)
    session(run, log, after=4, until=8)
""",
    "service dies": """
    with opened_trackers(log, run, config={}, step=0) as trackers:
        trackers.append({"step": 1})
        os.kill(service(), signal.SIGKILL)
        for step in range(2, 6):
            trackers.append({"step": step})
""",
    "no login": "    session(run, log, after=0, until=2)\n",
    "no network": "    session(run, log, after=0, until=2)\n",
}
ENVIRONMENTS = {
    "sessions": {"WANDB_MODE": "offline"},
    "service dies": {"WANDB_MODE": "offline"},
    "no login": {"WANDB_MODE": "online"},
    "no network": {
        "WANDB_MODE": "online",
        "WANDB_API_KEY": "0" * 40,
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_INIT_TIMEOUT": "3",
    },
}


@pytest.fixture(scope="module")
def with_wandb(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Run folder and words of each of `BODIES`, in a process with the real wandb; nothing leaves this machine."""
    pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("wandb")
    common = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    places = ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "HOME")
    started = {}
    for case, body in BODIES.items():
        run = folder / case
        run.mkdir()
        code = SESSIONS.format(tests=str(Path(__file__).parent), run=str(run), body=body)
        environment = common | dict.fromkeys(places, str(folder)) | ENVIRONMENTS[case]
        started[case] = subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
    return {case: (folder / case, process.communicate(timeout=200)[1]) for case, process in started.items()}


def records(path: Path) -> Iterator[bytes]:
    """Records of a .wandb file: a header of 7 bytes, then leveldb's log format in blocks of 32 KiB."""
    content, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def history(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """Id of the run in a .wandb file, and its rows without those that W&B adds."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows, ids = [], []
    for content in records(path):
        record = Record()
        record.ParseFromString(content)
        if record.HasField("run"):
            ids.append(record.run.run_id)
        if record.HasField("history"):
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append({name: value for name, value in items.items() if not name.startswith("_")})
    return ids[0], rows


@pytest.mark.slow
def test_wandb_gets_the_lines_and_a_resumed_run_is_the_same_run(with_wandb: dict[str, tuple[Path, str]]) -> None:
    folder, words = with_wandb["sessions"]
    assert words == ""
    found = [history(path) for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=os.path.getmtime)]
    assert len(found) == 2
    assert {id for id, _ in found} == {(folder / "wandb_id.txt").read_text().strip()}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    whole = [{name: value for name, value in line.items() if value is not None} for line in lines]
    first, second = (rows for _, rows in found)
    assert first[:6] == whole[:6], "up to the step it was resumed after"
    assert second == whole[6:]


@pytest.mark.slow
def test_a_training_outlives_the_process_that_sends_to_wandb(with_wandb: dict[str, tuple[Path, str]]) -> None:
    _, words = with_wandb["service dies"]
    warnings = [line for line in words.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: log.wandb: ")
    assert warnings[0].endswith("; it gets no more lines; metrics.jsonl has all of them")


@pytest.mark.slow
def test_wandb_without_a_login_says_what_to_do(with_wandb: dict[str, tuple[Path, str]]) -> None:
    folder, words = with_wandb["no login"]
    assert words.splitlines()[-1].startswith("error: log.wandb: No API key configured")
    assert words.splitlines()[-1].endswith("; run wandb login, or set WANDB_MODE=offline")
    assert not (folder / "metrics.jsonl").exists()


@pytest.mark.slow
def test_wandb_without_a_network_is_written_offline(with_wandb: dict[str, tuple[Path, str]]) -> None:
    folder, words = with_wandb["no network"]
    [warning] = [line for line in words.splitlines() if line.startswith("warning: ")]
    assert warning.endswith(f"; lines go to {folder}/wandb, and wandb sync sends them later")
    [path] = folder.glob("wandb/offline-run-*/*.wandb")
    assert [row["step"] for row in history(path)[1]] == [1, 2, 2]
