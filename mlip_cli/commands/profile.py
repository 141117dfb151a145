"""`mlip profile`: parameters, operations, speed and memory of a run's model or a recipe's."""

from pathlib import Path

from mlip_cli.errors import RunError, UsageError, interrupted_as
from mlip_cli.recipe.load import load_recipe
from mlip_cli.recipe.shipped import find_recipe
from mlip_cli.report.profiles import print_profile
from mlip_cli.report.write import rebuild
from mlip_cli.runs.find import find_checkpoint
from mlip_cli.runs.folder import checkpoint_name, newest_in_words
from mlip_cli.runs.foreign import find_foreign
from mlip_cli.terminal.output import print_json, say


def profile(
    target: str | None,
    *,
    batch_size: int,
    rounds: int,
    device: str,
    precision: str | None = None,
    is_compiled: bool | None = None,
    as_json: bool,
) -> None:
    """Count and time the model of a run or of a recipe, and print the result; a run keeps it in evals/.

    Args:
        target: a run, a checkpoint or a recipe; None: the newest run.
        precision, is_compiled: see `load_profiled`.

    Raises:
        UsageError: no such run or recipe, or no compiler.
        RunError: the device has no memory for the batch, or the result cannot be stored; then it is printed before.
    """
    unstored = None
    with interrupted_as("interrupted; nothing was written"):
        target = checked_target(target)
        say("loading PyTorch")
        from mlip_cli.devices import batch_named
        from mlip_cli.profiling.measures import measure
        from mlip_cli.profiling.subject import load_profiled, training_data

        profiled = load_profiled(target, device, precision=precision, is_compiled=is_compiled)
        datasets = training_data(profiled.recipe)
        real = ", the loader real ones" if datasets else ""
        say(f"{profiled.label}: timing {rounds} rounds; the model gets random pictures and words{real}")
        with batch_named("--batch-size", batch_size):
            result = measure(profiled, datasets, batch_size=batch_size, rounds=rounds)
    if profiled.run is not None and profiled.step is not None:
        path = profiled.run.evals / f"profile_{checkpoint_name(profiled.step)}.json"
        unstored = result.why_unstored(path)
        if unstored is None:
            say(f"written to {path}")
    if as_json:
        print_json(result.to_json())
    else:
        print_profile(result)
    if unstored:
        raise RunError(unstored)
    if profiled.run is not None:
        rebuild(profiled.run)


def checked_target(target: str | None) -> str:
    """The checkpoint of a run, or the recipe, that `target` names. Nothing here loads torch; raises as `profile`."""
    if target is None or Path(target).is_dir() or find_foreign(target) is not None:
        return str(find_checkpoint(target)[1])
    try:
        find_recipe(target)
    except UsageError as error:  # the name might have been meant as a run
        raise UsageError(f"{error}; no run lies there either: {newest_in_words()}") from None
    load_recipe(target)
    return target
