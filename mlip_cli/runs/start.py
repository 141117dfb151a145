"""Choose the run folder of a training: a new one, one to continue, or one that is finished. Imports no torch."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mlip_cli.errors import RecipeError, UsageError
from mlip_cli.recipe.config import Log, Model, Recipe
from mlip_cli.recipe.load import absolute_paths, differences
from mlip_cli.runs.find import find_checkpoint
from mlip_cli.runs.folder import Run, all_runs, default_folder, holds_nothing, with_tokenizer
from mlip_cli.runs.foreign import find_foreign
from mlip_cli.runs.moved_data import Change, changed_by_moves, check_moves, is_move
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
"""Parts of a recipe that may change on resume, since they do not change what is learned. The micro-batch size may not
change if forward passes draw random numbers."""


SIZES_OF_LAUNCHERS = {
    "srun": "SLURM_STEP_NUM_TASKS",
    "mpirun": "OMPI_COMM_WORLD_SIZE",
    "mpiexec": "PMI_SIZE",
}
"""Launcher -> the variable in which it tells its processes how many they are."""


def check_launcher() -> None:
    """Several processes must know of each other, as those of torchrun do.

    Raises:
        UsageError: another launcher started them, so that each would train alone.
    """
    if "RANK" in os.environ:
        return
    for launcher, variable in SIZES_OF_LAUNCHERS.items():
        count = os.environ.get(variable, "")
        if count.isdigit() and int(count) > 1:
            raise UsageError(
                f"{launcher} started {count} processes ({variable}), and each of them would train alone; start one a "
                "node and let torchrun start one a GPU: torchrun --nproc-per-node GPUS -m mlip_cli pretrain RECIPE "
                "(recipes/slurm.sbatch does so on several nodes)"
            )


@dataclass(frozen=True)
class Start:
    """The folder that a training writes, and whether it continues a run."""

    run: Run
    resumes: bool
    is_named_by_us: bool = False
    """True if mlip chose the name. If another run takes it first, a number is added."""
    changes: tuple[Change, ...] = ()
    """Permitted differences from the recipe that the run began with."""


def drawn_by_forward_passes(recipe: Recipe) -> str | None:
    """Name of what draws random numbers in a forward pass, so that the micro-batch size changes its draws; or None."""
    if recipe.model.text.dropout:
        return "model.text.dropout"
    if recipe.model.vision.drop_path:
        return "model.vision.drop_path"
    merging = recipe.model.merging
    return "random_drop" if merging is not None and merging.method == "random_drop" and merging.rate else None


def forbidden_changes(changes: Sequence[Change], recipe: Recipe) -> list[Change]:
    """Those of `changes` that a resumed run may not make. Data may lie elsewhere, if it is the same: see moved_data."""
    fixed = () if drawn_by_forward_passes(recipe) is None else (MICRO_BATCHES,)
    return [change for change in changes if change[0] in fixed or not _is_allowed(change)]


def _is_allowed(change: Change) -> bool:
    return is_move(change) or any(change[0] == key or change[0].startswith(key + ".") for key in MAY_CHANGE)


def with_begun_precision(recipe: Recipe, run: Run) -> Recipe:
    """The recipe in which `train.precision: auto` means what it meant where the run began."""
    return recipe.in_precision(run.read_recipe().train.precision) if recipe.train.precision == "auto" else recipe


def changes_since(run: Run, recipe: Recipe) -> list[Change]:
    """Differences between the recipe inside `run` and `recipe`. A tokenizer is the same if its file has the same
    content."""
    recipe = with_begun_precision(absolute_paths(recipe), run)
    if run.holds_tokenizer_of(recipe):
        recipe = with_tokenizer(recipe, run.tokenizer)
    return differences(run.read_recipe(), recipe)


def choose_start(recipe: Recipe, name: str, *, out: Path | None, resume: bool) -> Start:
    """Choose by --out and --resume.

    Raises:
        UsageError: the folder exists without --resume, is not a run folder, is damaged, or began with another recipe or
            with other data.
    """
    if out is None:
        return _newest_unfinished(recipe, name) if resume else _new(name)
    run = Run(out)
    if not resume or not run.recipe.is_file():
        if out.exists() and not (out.is_dir() and holds_nothing(out)):
            exists = "exists already; add --resume to go on with it, or name another folder"
            strange = "not a run folder (no recipe.yaml inside); name another folder"
            raise UsageError(f"--out {out}: {strange if resume else exists}")
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
    check_moves(run, recipe, changes)
    return Start(run, resumes=run.latest_checkpoint() is not None, changes=tuple(changes))


def _newest_unfinished(recipe: Recipe, name: str) -> Start:
    for run in reversed(all_runs()):
        if run.latest_checkpoint() is None:
            continue
        try:
            if run.is_finished():
                continue
            changes = changes_since(run, recipe)
            if not forbidden_changes(changes, recipe) and not changed_by_moves(run, recipe, changes):
                return Start(run, resumes=True, changes=tuple(changes))
        except RecipeError as error:
            say(f"skipping {run.folder}: its recipe does not load with this version: {str(error).splitlines()[0]}")
        except UsageError as error:
            say(f"skipping {run.folder}: {error}")
    return _new(name)


def _new(name: str) -> Start:
    return Start(Run(default_folder(name)), resumes=False, is_named_by_us=True)


def check_trackers(log: Log) -> None:
    """Check that the packages that `log` needs are installed.

    Raises:
        UsageError: one of them is not.
    """
    for name, is_asked_for in (("tensorboard", log.tensorboard), ("wandb", log.wandb is not None)):
        if is_asked_for:
            try:
                version(name)
            except PackageNotFoundError:
                cure = f'pip install "mlip-cli[{name}]"'
                raise UsageError(f"log.{name}: the package {name} is not installed; {cure}") from None


def command_to_resume(source: str, overrides: Sequence[str], *, out: Path | None) -> str:
    """The command that continues a run that these arguments started."""
    mlip = ["torchrun", "...", "-m", "mlip_cli"] if "RANK" in os.environ else ["mlip"]
    where = [] if out is None else ["--out", str(out)]
    return shlex.join([*mlip, "pretrain", source, *overrides, *where, "--resume"])


def command_line() -> str:
    """The command line as typed, for the stamp."""
    return shlex.join(["mlip", *sys.argv[1:]])


def check_inits_there(model: Model) -> None:
    """Check that the weights are there that a new run starts from. Reads none.

    Raises:
        UsageError: there is no such run, checkpoint or file.
    """
    if model.init is not None and find_foreign(model.init) is None:
        find_checkpoint(model.init)
    tower = model.vision.init
    if tower is not None and not Path(tower).is_file():
        raise UsageError(f"model.vision.init: {tower}: no such file; it is a file of weights that timm saved")


def recipe_of_init(init: str) -> Recipe:
    """The recipe of the run that `model.init` names, or the one that weights of another program get.

    Raises:
        UsageError: there is no such run, checkpoint or file, or mlip cannot read it.
    """
    foreign = find_foreign(init)
    if foreign is None:
        return find_checkpoint(init)[0].read_recipe()
    from mlip_cli.runs.importing import recipe_of

    return recipe_of(foreign)
