"""`mlip pretrain`: checks without torch, then the training (commands/training.py), then the run folder on stdout."""

from dataclasses import replace
from pathlib import Path

from mlip_cli.commands.missing import missing_data
from mlip_cli.errors import RunError, Stopped, UsageError
from mlip_cli.evaluate.before_after import read_changes
from mlip_cli.paths import check_can_be_made
from mlip_cli.recipe.config import Recipe
from mlip_cli.recipe.load import load_recipe
from mlip_cli.runs.contents import read_metrics
from mlip_cli.runs.folder import CURES, RUNS, Run
from mlip_cli.runs.start import (
    Start,
    check_inits_there,
    check_launcher,
    check_trackers,
    choose_start,
    command_to_resume,
    recipe_of_init,
    with_begun_precision,
)
from mlip_cli.terminal.output import is_main, print_json, print_lines, say, warn


def pretrain(
    source: str, overrides: list[str], *, out: Path | None, resume: bool, dry_run: bool, as_json: bool
) -> None:
    """Train by a recipe; its mistakes show before torch is imported.

    Raises:
        Stopped: a signal came; the message ends with the command that resumes the run.
    """
    check_launcher()
    loaded = load_recipe(source, overrides, of_init=recipe_of_init)
    for note in loaded.notes:
        say(note)
    start = choose_start(loaded.recipe, loaded.name, out=out, resume=resume)
    if not start.resumes:
        check_inits_there(loaded.recipe.model)
    if resume:
        check_can_go_on(start)
    check_trackers(loaded.recipe.log)
    if not (start.resumes and start.run.is_finished()):
        check_can_be_made(start.run.folder, option="--out")
    if dry_run:
        from mlip_cli.commands.dry_run import describe

        recipe = with_begun_precision(loaded.recipe, start.run) if start.resumes else loaded.recipe
        describe(replace(loaded, recipe=recipe), resumes=start.resumes, as_json=as_json)
        return
    run = start.run
    if start.resumes and run.is_finished():
        say(f"{run.folder}: finished already; nothing to do")
    else:
        if resume and not start.resumes:
            missing = f"no unfinished run of this recipe in {RUNS}/" if out is None else f"no checkpoint in {out}"
            say(f"--resume: {missing}; a new run starts")
        check_data(loaded.recipe)
        say(f"{loaded.name}: opening the data and building the model")
        from mlip_cli.commands.training import train_run

        try:
            run = train_run(loaded.recipe, start)
        except Stopped as stop:
            go_on = command_to_resume(source, overrides, out=out)
            raise Stopped(f"{stop}; go on with:\n{go_on}", exit_code=stop.exit_code) from None
    if is_main():
        print_run(run, as_json=as_json)


def check_can_go_on(start: Start) -> None:
    """Check that the weights of a run that is to be resumed have the state of a training beside them.

    Raises:
        UsageError: they come from elsewhere.
    """
    if start.resumes and not start.run.can_go_on():
        raise UsageError(
            f"--resume {start.run.folder}: its weights were not trained here and have no optimiser state; start a new "
            f"run from them with model.init={start.run.folder}"
        )


def check_data(recipe: Recipe) -> None:
    """Check that all data is there, before torch is loaded.

    Raises:
        UsageError: some is missing, one line each.
    """
    from mlip_cli.data.open import check_there

    if not recipe.data.train:
        raise UsageError("data.train: no data to train on; name a folder that mlip prepare-data wrote")
    if missing := list(missing_data(recipe, check_there)):
        raise UsageError("\n".join(missing))


def print_run(run: Run, *, as_json: bool) -> None:
    """The run folder on stdout; as JSON with its last measures, and what changed since step 0 where that is known."""
    if not as_json:
        print_lines(str(run.folder))
        return
    lines, damaged = read_metrics(run.metrics)
    for number in damaged:
        warn(f"{run.metrics}:{number}: not a line of metrics; {CURES[run.metrics.name]}")
    if not lines:
        raise RunError(f"{run.metrics}: no line of metrics is left; the weights are in {run.checkpoints}")
    last = {key: value for line in lines if line["step"] == lines[-1]["step"] for key, value in line.items()}
    kept = read_changes(run)
    changes = {"before_after": kept.changes_as_json()} if kept is not None and kept.changes else {}
    print_json({"run": str(run.folder), "step": last["step"], "metrics": last, **changes})
