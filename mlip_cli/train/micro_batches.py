"""How many samples go through the model at once: the recipe's number, or the largest that fits."""

from collections.abc import Callable

import torch

from mlip_cli.devices import is_full_memory
from mlip_cli.distributed import from_all, without_exchange
from mlip_cli.losses.objective import Objective
from mlip_cli.recipe.config import Recipe
from mlip_cli.recipe.merge_plan import MergePlan
from mlip_cli.terminal.output import say
from mlip_cli.train.gradients import RandomState, add_gradients
from mlip_cli.train.noise import noise_batch
from mlip_cli.train.state import Progress, Training


def chosen_micro_batch_size(recipe: Recipe, training: Training, progress: Progress, *, share: int) -> int | None:
    """Samples a forward pass out of this rank's `share` of a batch; None: all of it.

    On CUDA `auto` tries steps once. The result stays in `progress` and so in the checkpoints: it is the same on all
    ranks and after a resume. Elsewhere it is the whole share: PyTorch does not know how much memory there is.
    """
    if recipe.train.micro_batch_size != "auto":
        return recipe.train.given_micro_batch_size
    if progress.micro_batch_size is not None:
        return min(progress.micro_batch_size, share)
    found = share
    if training.device.type == "cuda":
        random = RandomState.read(training.device)
        own = largest_that_fits(share, lambda size: try_once(recipe, training, share=share, size=size))
        found = min(from_all(own))
        torch.cuda.empty_cache()
        random.restore(training.device)
        progress.micro_batch_size = found
    say(f"train.micro_batch_size auto: {found:,} of {share:,} samples a rank at a time")
    return found


def largest_that_fits(share: int, attempt: Callable[[int], None]) -> int:
    """The first of share, share/2, share/4, ..., 1 (rounded up) for which `attempt` finds memory; 1 is not tried."""
    size = share
    while size > 1:
        try:
            attempt(size)
        except RuntimeError as error:
            if not is_full_memory(error):
                raise
            torch.cuda.empty_cache()
            size = -(-size // 2)
        else:
            break
    return size


def try_once(recipe: Recipe, training: Training, *, share: int, size: int) -> None:
    """Compute a gradient by micro-batches of `size` and drop it, beside the optimiser's moments.

    The texts are as long as they can be. No rank waits for another one.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    length = recipe.model.text.context_length
    batch = noise_batch(recipe, batch_size=share, num_tokens=length, device=training.device)
    parameters = [] if training.optimizer.state else list(training.plain.parameters())
    moments = [torch.empty_like(parameter) for parameter in parameters if parameter.requires_grad for _ in range(2)]
    try:
        with without_exchange():
            add_gradients(
                training.plain.train(),
                Objective(recipe.losses),
                batch,
                precision=training.precision,
                micro_batch_size=size,
                plan=least_merging(recipe, training),
            )
    finally:
        del moments
        training.plain.zero_grad(set_to_none=True)


def least_merging(recipe: Recipe, training: Training) -> MergePlan:
    """The plan of the steps whose pictures keep the most tokens."""
    merging = recipe.model.merging
    plan: MergePlan = training.plain.training_plan
    return plan if merging is None or merging.active == (0.0, 1.0) else training.plain.merge_plan(0.0)
