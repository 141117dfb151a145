"""The run folder, which is all that commands share: its files, its stamp, and how to find the newest run."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import TypeVar

from mlip_cli.errors import RecipeError, UsageError
from mlip_cli.files import lives, remove, write_text, writer_of
from mlip_cli.recipe.config import Recipe
from mlip_cli.recipe.load import load_recipe
from mlip_cli.runs.contents import DataCard, Stamp, read_cards
from mlip_cli.terminal.output import say

RUNS = Path("runs")
MOST_RUNS_NAMED = 3

CURES = {
    "run.json": "remove it: the run goes on, and only the record of its earlier sessions is lost",
    "data.json": "remove it: a training that goes on here writes it anew",
    "recipe.yaml": "restore it from a copy: it says what the weights of this run are",
    "metrics.jsonl": "delete the line",
}
"""What to do about a damaged file of a run, by its name."""

Content = TypeVar("Content")

CHECKPOINT_NAME = re.compile(r"step_\d+")
STATE = "state.pt"
"""What a training needs to go on."""
ORIGIN = "origin.json"
"""Where weights come from that no training of this run made. A complete checkpoint has either this or STATE, written
last."""


def now() -> str:
    """The time for results and stamps: UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def evaluation_precision(recipe: Recipe, device_type: str) -> str:
    """The precision in which a run is evaluated unless another one is asked for: on CUDA that of its training.

    Elsewhere fp32: a CPU without units for bf16 takes 2.5 to 17 times as long in it as in fp32.
    """
    return recipe.train.precision if device_type == "cuda" else "fp32"


def checkpoint_name(step: int) -> str:
    """240 -> step_0000240"""
    return f"step_{step:07d}"


def step_of(checkpoint: Path) -> int:
    """step_0000240 -> 240"""
    return int(checkpoint.name.removeprefix("step_"))


def checkpoint_folders(folder: Path) -> list[Path]:
    """Folders that are named like checkpoints, ordered by step."""
    return sorted((path for path in folder.glob("step_*") if CHECKPOINT_NAME.fullmatch(path.name)), key=step_of)


def whole_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, ordered by step."""
    return [path for path in checkpoint_folders(folder) if mark_of(path) is not None]


def mark_of(checkpoint: Path) -> Path | None:
    """The file that makes a checkpoint complete: its STATE, else its ORIGIN; None: it is not complete."""
    return next((mark for name in (STATE, ORIGIN) if (mark := checkpoint / name).is_file()), None)


@dataclass(frozen=True)
class Run:
    """A folder written by `mlip pretrain`."""

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def tokenizer(self) -> Path:
        """The run's copy of `model.text.tokenizer.file`."""
        return self.folder / "tokenizer.json"

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
        whole = whole_checkpoints(self.checkpoints)
        return whole[-1] if whole else None

    def read_stamp(self) -> Stamp:
        """Content of run.json; an empty stamp before it is written.

        Raises:
            UsageError: the file is damaged.
        """
        return _read(self.stamp, Stamp.read) or Stamp()

    def read_cards(self) -> dict[str, DataCard]:
        """Content of data.json; no cards before it is written.

        Raises:
            UsageError: the file is damaged.
        """
        return _read(self.data_cards, read_cards) or {}

    def read_recipe(self) -> Recipe:
        """The recipe that the run began with.

        Raises:
            RecipeError: it does not load; the last line says what to do.
        """
        try:
            return with_tokenizer(load_recipe(str(self.recipe)).recipe, self.tokenizer)
        except RecipeError as error:
            is_of_another_version = f"{self.recipe}: made by mlip" in str(error)
            cure = "" if is_of_another_version else f"\n{self.recipe}: damaged; {CURES[self.recipe.name]}"
            raise RecipeError(f"{error}{cure}") from None

    def holds_tokenizer_of(self, recipe: Recipe) -> bool:
        """Whether the run's copy of a tokenizer is the recipe's, byte by byte; without a checkpoint it may be missing.

        False: the recipe has CLIP's.
        """
        if recipe.model.text.tokenizer is None:
            return False
        if not self.tokenizer.is_file():
            return self.latest_checkpoint() is None
        given = Path(recipe.model.text.tokenizer.file)
        return given.is_file() and given.read_bytes() == self.tokenizer.read_bytes()

    def is_finished(self) -> bool:
        """True when training reached its last step, and where no training can go on."""
        return self.read_stamp().end_reason == "finished" or not self.can_go_on()

    def can_go_on(self) -> bool:
        """Whether a training can go on from the newest checkpoint; weights from elsewhere have no optimiser state."""
        newest = self.latest_checkpoint()
        return newest is None or (newest / STATE).is_file()


def with_tokenizer(recipe: Recipe, file: Path) -> Recipe:
    """The recipe with `file` as its tokenizer, if it has one that is not CLIP's."""
    text = recipe.model.text
    if text.tokenizer is None:
        return recipe
    tokenizer = text.tokenizer.model_copy(update={"file": os.path.abspath(file)})
    model = recipe.model.model_copy(update={"text": text.model_copy(update={"tokenizer": tokenizer})})
    return recipe.model_copy(update={"model": model})


def _read(path: Path, read: Callable[[Path], Content]) -> Content | None:
    """The content of a file; None: there is no file."""
    if not path.is_file():
        return None
    try:
        return read(path)
    except ValueError as error:
        raise UsageError(f"{path}: damaged ({error}); {CURES[path.name]}") from None


def holds_nothing(folder: Path) -> bool:
    """Whether a folder is empty but for temporary files of ours, which a process that was killed leaves."""
    return all(writer_of(path) is not None for path in folder.iterdir())


def sweep(run: Run) -> None:
    """Delete temporary files of killed processes; the run's lock is held.

    Other commands write results and pages beside a training, so that the files of a process that lives here stay.
    """
    for path in run.folder.rglob(".*.tmp"):
        writer = writer_of(path)
        if writer is None or path.is_relative_to(run.checkpoints):  # these have a sweep of their own
            continue
        if writer == os.getpid() or not lives(writer):
            remove(path)


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
        mark = mark_of(checkpoint) if checkpoint else None
        return (mark.stat().st_mtime_ns if mark else 0, run.folder.name)

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
