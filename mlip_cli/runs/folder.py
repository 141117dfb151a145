"""The run folder, which is all that commands share: its files, its stamp, and how to find the newest run."""

import json
import re
import shlex
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

from mlip_cli.errors import UsageError
from mlip_cli.files import write_text
from mlip_cli.terminal.output import say

RUNS = Path("runs")
MOST_RUNS_NAMED = 3

CHECKPOINT_NAME = re.compile(r"step_\d+")
STATE = "state.pt"
"""Written last: a folder without it is not a complete checkpoint."""


def now() -> str:
    """The time for results and stamps: UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def checkpoint_name(step: int) -> str:
    """240 -> step_0000240"""
    return f"step_{step:07d}"


def step_of(checkpoint: Path) -> int:
    """step_0000240 -> 240"""
    return int(checkpoint.name.removeprefix("step_"))


def checkpoint_folders(folder: Path) -> list[Path]:
    """Folders that are named like checkpoints, ordered by step."""
    return sorted((path for path in folder.glob("step_*") if CHECKPOINT_NAME.fullmatch(path.name)), key=step_of)


@dataclass(frozen=True)
class Run:
    """A folder written by `mlip pretrain`."""

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def stamp(self) -> Path:
        return self.folder / "run.json"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.folder / "tensorboard"

    @property
    def wandb_id(self) -> Path:
        """The run's id on W&B."""
        return self.folder / "wandb_id.txt"

    @property
    def evals(self) -> Path:
        return self.folder / "evals"

    @property
    def data_cards(self) -> Path:
        """Cards of the data by role. They describe the data even after it has moved."""
        return self.folder / "data.json"

    @property
    def pictures(self) -> Path:
        return self.folder / "pictures"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def latest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        whole = [path for path in checkpoint_folders(self.checkpoints) if (path / STATE).is_file()]
        return whole[-1] if whole else None

    def read_stamp(self) -> dict[str, Any]:
        """Content of run.json, or {} before it is written."""
        return json.loads(self.stamp.read_text()) if self.stamp.is_file() else {}

    def is_finished(self) -> bool:
        """True when training reached its last step."""
        return self.read_stamp().get("end_reason") == "finished"


def default_folder(recipe_name: str) -> Path:
    """runs/<recipe>-<UTC time>. If two runs start within a second, `claimed` finds another name."""
    return RUNS / f"{recipe_name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"


def claimed(folder: Path) -> Path:
    """Make `folder`, or the first of folder-2, folder-3, ... that does not exist; return its path."""
    for number in count(1):
        path = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise AssertionError("numbers do not end")


def remember_latest(run: Run) -> None:
    """Write the name of the run into the one-line file `latest` beside it."""
    write_text(run.folder.parent / "latest", run.folder.name + "\n")


def all_runs() -> list[Run]:
    """Runs in runs/, the one with the oldest checkpoint first. Runs without a checkpoint come before all others."""
    runs = [Run(p.parent) for p in RUNS.glob("*/recipe.yaml")]

    def age(run: Run) -> tuple[int, str]:
        checkpoint = run.latest_checkpoint()
        return ((checkpoint / STATE).stat().st_mtime_ns if checkpoint else 0, run.folder.name)

    return sorted(runs, key=age)


def newest_run() -> Run:
    """The newest run that has a checkpoint. Its name is printed."""
    runs = [run for run in all_runs() if run.latest_checkpoint()]
    if not runs:
        raise UsageError(f"no run in {RUNS}/; start one with mlip pretrain RECIPE or name a RUN")
    say(f"run {runs[-1].folder}, the newest with a checkpoint")
    return runs[-1]


def newest_in_words() -> str:
    """A hint for a RUN that does not exist: the newest runs in runs/, or how to make one."""
    runs = [run.folder.name for run in reversed(all_runs()) if run.latest_checkpoint()]
    if not runs:
        return f"there are no runs in {RUNS}/ yet; mlip pretrain makes them"
    return f"the newest in {RUNS}/: {', '.join(runs[:MOST_RUNS_NAMED])}"


def find_checkpoint(target: str | None) -> tuple[Run, Path]:
    """The run and the checkpoint that `target` names: a run folder, a checkpoint folder, or None for the newest run.

    Raises:
        UsageError: there is no such run or checkpoint.
    """
    if target is None:
        run = newest_run()
        checkpoint = run.latest_checkpoint()
        assert checkpoint is not None
        return run, checkpoint
    path = Path(target)
    if not path.exists():
        raise UsageError(f"{path}: no such run or checkpoint; {newest_in_words()}")
    if (path / "recipe.yaml").is_file():
        run = Run(path)
        newest = run.latest_checkpoint()
        if newest is None:
            go_on = shlex.join(["mlip", "pretrain", str(run.recipe), "--out", str(path), "--resume"])
            raise UsageError(f"{path}: it holds no complete checkpoint; continue it with {go_on}")
        return run, newest
    run = Run(path.parent.parent)
    if not run.recipe.is_file() or not path.is_dir() or not CHECKPOINT_NAME.fullmatch(path.name):
        raise UsageError(
            f"{path}: not a run folder (no recipe.yaml) and not a checkpoint of one; "
            "name RUN, or RUN/checkpoints/step_NUMBER"
        )
    return run, path
