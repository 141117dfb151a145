"""Which run folder a training uses: a new one, one to go on with, or one that is finished already. No torch here."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mlip_cli.errors import RecipeError, UsageError
from mlip_cli.recipe.config import Log, Recipe
from mlip_cli.recipe.init_source import OpenClipFile, open_clip_file
from mlip_cli.recipe.load import absolute_paths, differences, load_recipe
from mlip_cli.runs.folder import RUNS, Run, all_runs, default_folder, find_checkpoint
from mlip_cli.terminal.output import say

MICRO_BATCHES = "train.micro_batch_size"

MAY_CHANGE = (
    "extends",
    "log",
    "evaluate",
    "data.num_workers",
    "data.cache",
    "train.checkpoint_every",
    "train.keep",
    "train.device",
    "train.parallel",
    "train.grad_checkpointing",
    "train.compile",
    MICRO_BATCHES,
)
"""Parts of a recipe that may differ when a run goes on; they do not change what is learned. Micro-batches do where
forward passes draw."""


@dataclass(frozen=True)
class Start:
    """Where a training writes, and whether it goes on."""

    run: Run
    resumes: bool
    is_named_by_us: bool = False
    """A new folder, whose name may take a number where another run is quicker."""
    changes: tuple[tuple[str, Any, Any], ...] = ()
    """Permitted differences to the recipe the run began with."""


def drawn_by_forward_passes(recipe: Recipe) -> str | None:
    """What draws at random in each forward pass, so that the size of micro-batches changes its draws; None: nothing."""
    if recipe.model.text.dropout:
        return "model.text.dropout"
    if recipe.model.vision.drop_path:
        return "model.vision.drop_path"
    merging = recipe.model.merging
    return "random_drop" if merging is not None and merging.method == "random_drop" and merging.rate else None


def forbidden_changes(changes: list[tuple[str, Any, Any]], recipe: Recipe) -> list[tuple[str, Any, Any]]:
    """Those that would make it another run."""
    fixed = () if drawn_by_forward_passes(recipe) is None else (MICRO_BATCHES,)
    return [c for c in changes if c[0] in fixed or not any(c[0] == k or c[0].startswith(k + ".") for k in MAY_CHANGE)]


def changes_since(run: Run, recipe: Recipe) -> list[tuple[str, Any, Any]]:
    """Differences between the recipe inside `run` and `recipe`."""
    return differences(load_recipe(str(run.recipe)).recipe, absolute_paths(recipe))


def choose_start(recipe: Recipe, name: str, *, out: Path | None, resume: bool) -> Start:
    """Decide by --out and --resume.

    Raises:
        UsageError: the folder exists and --resume was not given, is no run folder, or began with another recipe.
    """
    if not resume:
        if out is None:
            return _new(name)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"--out {out}: exists already; add --resume to go on with it, or name another folder")
        return Start(Run(out), resumes=False)
    if out is None:
        return _newest_unfinished(recipe, name)
    run = Run(out)
    if not run.recipe.is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"--out {out}: not a run folder (no recipe.yaml inside); name another folder")
        return Start(run, resumes=False)
    changes = changes_since(run, recipe)
    refused = forbidden_changes(changes, recipe)
    if refused:
        redrawn = {MICRO_BATCHES: f", which changes what {drawn_by_forward_passes(recipe)} draws"}
        shown = "; ".join(f"{path}: {old} -> {new}{redrawn.get(path, '')}" for path, old, new in refused[:5])
        raise UsageError(
            f"--resume {out}: the recipe differs from the one this run began with ({shown}); "
            "undo the change, or start a new run with another --out"
        )
    return Start(run, resumes=run.latest_checkpoint() is not None, changes=tuple(changes))


def _newest_unfinished(recipe: Recipe, name: str) -> Start:
    for run in reversed(all_runs(RUNS)):
        if run.latest_checkpoint() is None or run.is_finished():
            continue
        try:
            changes = changes_since(run, recipe)
        except RecipeError as error:
            say(f"passing over {run.folder}, whose recipe is none today: {str(error).splitlines()[0]}")
            continue
        if not forbidden_changes(changes, recipe):
            return Start(run, resumes=True, changes=tuple(changes))
    return _new(name)


def _new(name: str) -> Start:
    return Start(Run(default_folder(name)), resumes=False, is_named_by_us=True)


def check_trackers(log: Log) -> None:
    """Look whether the packages that `log` needs are there.

    Raises:
        UsageError: one is not.
    """
    for name, is_asked_for in (("tensorboard", log.tensorboard), ("wandb", log.wandb is not None)):
        if is_asked_for:
            try:
                version(name)
            except PackageNotFoundError:
                cure = f'pip install "mlip-cli[{name}]"'
                raise UsageError(f"log.{name}: the package {name} is not installed; {cure}") from None


def check_can_be_made(folder: Path) -> None:
    """Look whether the run folder can be made, without making it.

    Raises:
        UsageError: a file is in its way, or the folder that would hold it is read-only.
    """
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not above.is_dir():
        raise UsageError(f"--out {folder}: {above} is a file; name another folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UsageError(f"--out {folder}: nothing can be written in {above}; name another folder")


def command_to_resume(source: str, overrides: Sequence[str], *, out: Path | None) -> str:
    """What to type to go on with a run that was started by these arguments."""
    import shlex

    mlip = ["torchrun", "...", "-m", "mlip_cli"] if "RANK" in os.environ else ["mlip"]
    where = [] if out is None else ["--out", str(out)]
    return shlex.join([*mlip, "pretrain", source, *overrides, *where, "--resume"])


def command_line() -> str:
    """What was typed, for the stamp."""
    import shlex

    return shlex.join(["mlip", *sys.argv[1:]])


def find_init(init: str) -> OpenClipFile | Path:
    """The file, or the checkpoint's folder, that `model.init` names.

    Raises:
        UsageError: there is no such run, checkpoint or file.
    """
    foreign = open_clip_file(init)
    if foreign is None:
        return find_checkpoint(init)[1]
    if not Path(foreign.file).is_file():
        raise UsageError(f"{foreign.file}: no such file; model.init=open_clip:ARCH:FILE reads weights that lie here")
    return foreign
