"""Trainings of shipped recipes at the size of the check, and batches like those of web pictures."""

from collections.abc import Callable

import torch
from benchmarks.bench_text import caption_lengths
from gpu.rows import Scale

from mlip_cli.distributed import unwrap
from mlip_cli.profiling.subject import pinned
from mlip_cli.recipe.config import Recipe
from mlip_cli.recipe.load import load_recipe
from mlip_cli.recipe.shipped import recipes_folder
from mlip_cli.train.ahead import one_ahead
from mlip_cli.train.noise import noise_batch
from mlip_cli.train.setup import build, build_stepper
from mlip_cli.train.step import Stepper
from mlip_cli.types import Batch

EAGER = "train.compile=false"
BF16 = "train.precision=bf16"
"""Also in a rehearsal on a CPU without units for it."""


def recipe_of(name: str, scale: Scale, *changes: str) -> Recipe:
    """A shipped recipe; a rehearsal makes its model tiny."""
    by_key = {change.partition("=")[0]: change for change in (BF16, *changes, *scale.overrides)}
    return load_recipe(str(recipes_folder() / f"{name}.yaml"), list(by_key.values())).recipe


def web_batch(recipe: Recipe, device: torch.device, *, batch_size: int) -> Batch:
    """Pictures of noise, captions as long as those of the web; as the loader leaves it for `device`."""
    length = recipe.model.text.context_length
    cpu = torch.device("cpu")
    given = caption_lengths(batch_size)
    return pinned(noise_batch(recipe, batch_size=batch_size, num_tokens=length, device=cpu, lengths=given), device)


def stepper_of(recipe: Recipe, device: torch.device) -> Stepper:
    """Takes the steps of a new training, a share of the batch at once."""
    training, _ = build(recipe, device, fresh=True)
    training.model.train()
    return build_stepper(training, recipe, total_steps=10_000, micro_batch_size=None)


def steps_of(stepper: Stepper, batch: Batch, *, steps: int) -> Callable[[], None]:
    """Takes so many steps as training does: the next batch is copied while a step runs."""
    plan = unwrap(stepper.training.model).training_plan

    def run() -> None:
        for number, ready in enumerate(one_ahead(iter([batch] * steps), stepper.copy), start=1):
            stepper.take(ready, number, plan)

    return run
