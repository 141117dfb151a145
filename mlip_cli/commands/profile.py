"""`mlip profile`: parameters, operations, speed and memory of a run's model or a recipe's."""

import torch

from mlip_cli import __version__
from mlip_cli.devices import batch_named, device_name
from mlip_cli.errors import interrupted_as
from mlip_cli.profiling.measures import counts, measures_of_step, speeds_of_towers
from mlip_cli.profiling.result import ProfileResult
from mlip_cli.profiling.subject import caption_length, load_subject, random_batch, training_data
from mlip_cli.report.profile_tables import print_profile
from mlip_cli.report.write import rebuild
from mlip_cli.runs.folder import checkpoint_name, now
from mlip_cli.terminal.output import print_json, say


def profile(target: str | None, *, batch_size: int, rounds: int, device: str, as_json: bool) -> None:
    """Count and time the model of a run (its checkpoint too) or of a recipe, and print both; a run keeps it in evals/.

    Raises:
        UsageError: no such run or recipe.
        RunError: the device has no memory for the batch.
    """
    with interrupted_as("interrupted; nothing was written"):
        subject = load_subject(target, device)
        datasets = training_data(subject.recipe)
        num_tokens, length_source = caption_length(subject.recipe, datasets)
        real = ", the loader real ones" if datasets else ""
        say(f"{subject.label}: timing {rounds} rounds; the model gets random pictures and words{real}")
        facts = {
            "kind": ProfileResult.KIND,
            "measured_at": now(),
            "mlip_version": __version__,
            "target": subject.label,
            "step": subject.step,
            "device": str(subject.device),
            "device_name": device_name(subject.device),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "precision": subject.recipe.train.precision,
            "image_size": subject.model.image_size,
            "batch_size": batch_size,
            "rounds": rounds,
            "context_length": subject.model.context_length,
            "caption_tokens": num_tokens,
            "caption_tokens_from": length_source,
            **counts(subject.model, num_tokens),
        }
        with batch_named("--batch-size", batch_size):
            batch = random_batch(subject, batch_size=batch_size, num_tokens=num_tokens)
            towers = speeds_of_towers(subject, batch, rounds)
            measured = measures_of_step(subject, batch, rounds, datasets)
        result = ProfileResult.from_json(facts | measured | {"speed": [*towers, *measured["speed"]]})
    if subject.run is not None and subject.step is not None:
        path = subject.run.evals / f"profile_{checkpoint_name(subject.step)}.json"
        result.write(path)
        say(f"written to {path}")
    if as_json:
        print_json(result.to_json())
    else:
        print_profile(result)
    if subject.run is not None:
        rebuild(subject.run)
