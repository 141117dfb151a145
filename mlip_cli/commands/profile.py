"""`mlip profile`: parameters, operations, speed and memory of a run's model or a recipe's."""

from mlip_cli.devices import batch_named
from mlip_cli.errors import interrupted_as
from mlip_cli.profiling.measures import measure
from mlip_cli.profiling.subject import load_profiled, training_data
from mlip_cli.report.profiles import print_profile
from mlip_cli.report.write import rebuild
from mlip_cli.runs.folder import checkpoint_name
from mlip_cli.terminal.output import print_json, say


def profile(target: str | None, *, batch_size: int, rounds: int, device: str, as_json: bool) -> None:
    """Count and time the model of a run or of a recipe, and print the result; a run keeps it in evals/.

    Args:
        target: a run, a checkpoint or a recipe; None: the newest run.

    Raises:
        UsageError: no such run or recipe.
        RunError: the device has no memory for the batch.
    """
    with interrupted_as("interrupted; nothing was written"):
        profiled = load_profiled(target, device)
        datasets = training_data(profiled.recipe)
        real = ", the loader real ones" if datasets else ""
        say(f"{profiled.label}: timing {rounds} rounds; the model gets random pictures and words{real}")
        with batch_named("--batch-size", batch_size):
            result = measure(profiled, datasets, batch_size=batch_size, rounds=rounds)
    if profiled.run is not None and profiled.step is not None:
        path = profiled.run.evals / f"profile_{checkpoint_name(profiled.step)}.json"
        result.write(path)
        say(f"written to {path}")
    if as_json:
        print_json(result.to_json())
    else:
        print_profile(result)
    if profiled.run is not None:
        rebuild(profiled.run)
