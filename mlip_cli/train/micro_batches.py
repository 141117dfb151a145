"""How many samples go through the model at once: what the recipe says, or what fits."""

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from mlip_cli.distributed import all_min
from mlip_cli.losses.objective import Objective
from mlip_cli.recipe.config import LOSS_NAMES, Recipe
from mlip_cli.recipe.merge_plan import MergePlan
from mlip_cli.terminal.output import say
from mlip_cli.train.gradients import RandomState
from mlip_cli.train.state import Progress, Training
from mlip_cli.types import VOCAB_SIZE, Batch, Encoded

BOS, EOS = VOCAB_SIZE - 2, VOCAB_SIZE - 1
MATRICES_A_LOSS = 4
"""Of this rank's pairs against all: logits, their softmax, and the gradients of both."""


def chosen_micro_batch_size(recipe: Recipe, training: Training, progress: Progress, *, share: int) -> int | None:
    """Samples a forward pass out of this rank's `share` of a batch; None: all of it.

    `auto` is searched once on CUDA, with the longest texts, as few merges as any step has, and what else a step needs
    beside it. It stays in `progress` and so in the checkpoints: it is the same on all ranks and after a resume.
    Elsewhere it is the whole share: PyTorch does not know how much memory there is.
    """
    if recipe.train.micro_batch_size != "auto":
        return recipe.train.given_micro_batch_size
    if progress.micro_batch_size is not None:
        return min(progress.micro_batch_size, share)
    found = share
    if training.device.type == "cuda":
        random = RandomState.read(training.device)
        with torch.no_grad():
            beside = memory_beside(recipe, training, share=share)
        found = all_min(largest_that_fits(share, lambda size: try_once(recipe, training, size)))
        del beside
        torch.cuda.empty_cache()
        random.restore(training.device)
        progress.micro_batch_size = found
    say(f"train.micro_batch_size auto: {found:,} of {share:,} samples a rank at a time")
    return found


def least_merging(recipe: Recipe, training: Training) -> MergePlan:
    """The plan of the steps whose pictures keep the most tokens."""
    merging = recipe.model.merging
    plan: MergePlan = training.plain.training_plan
    return plan if merging is None or merging.active == (0.0, 1.0) else training.plain.merge_plan(0.0)


def largest_that_fits(share: int, attempt: Callable[[int], None]) -> int:
    """The first of share, share/2, share/4, ..., 1 (rounded up) for which `attempt` finds memory; 1 is not tried."""
    size = share
    while size > 1:
        try:
            attempt(size)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            size = -(-size // 2)
        else:
            break
    return size


def memory_beside(recipe: Recipe, training: Training, *, share: int) -> list[Tensor]:
    """Tensors as large as what a step needs beside a micro-batch: moments of the optimiser, logits of the losses, and
    where losses compare all tokens, the cached ones with their gradients, everyone's words and the places of maxima."""
    moments = [
        torch.empty_like(p) for group in training.optimizer.param_groups for p in group["params"] for _ in range(2)
    ]
    num_losses = sum(getattr(recipe.losses, name) is not None for name in LOSS_NAMES)
    pairs = (share, recipe.train.global_batch_size)
    logits = [torch.empty(pairs, device=training.device) for _ in range(MATRICES_A_LOSS * num_losses)]
    tokens = memory_of_tokens(recipe, training, pairs) if Objective(recipe.losses).batch_token_losses else []
    return [*([] if training.optimizer.state else moments), *logits, *tokens]


def memory_of_tokens(recipe: Recipe, training: Training, pairs: tuple[int, int]) -> list[Tensor]:
    """What FILIP keeps for `pairs`, (own pictures, captions of all ranks)."""
    (share, everyone), length, width = pairs, recipe.model.text.context_length, recipe.model.token_dim
    plan = least_merging(recipe, training)
    found = [torch.empty(2 * share + everyone, length, width, device=training.device)]
    for name in Objective(recipe.losses).batch_token_losses:
        num_patches = plan.tokens[-1] if name == "spatial_token" else plan.num_patches
        found.append(torch.empty(2 * share, num_patches, width, device=training.device))
        found.append(torch.empty(*pairs, num_patches + length, dtype=torch.uint8, device=training.device))
    return found


def try_once(recipe: Recipe, training: Training, size: int) -> None:
    """Forward and backward of a micro-batch of blank pictures and the longest texts, on this rank alone; no gradients
    stay.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    length, side = recipe.model.text.context_length, recipe.data.image_size
    token_ids = torch.full((size, length), 1, device=training.device)
    token_ids[:, 0], token_ids[:, -1] = BOS, EOS
    images = torch.zeros(size, 3, side, side, dtype=torch.uint8, device=training.device)
    try:
        with training.precision.autocast(training.device):
            batch, plan = Batch(images, token_ids, keys=()), least_merging(recipe, training)
            encoded: Encoded = training.plain.train()(batch, plan=plan)
        outputs = [getattr(encoded, field.name) for field in fields(encoded)]
        sums = [x.float().sum() for x in outputs if isinstance(x, Tensor) and x.requires_grad]
        torch.stack(sums).sum().backward()
    finally:
        training.plain.zero_grad(set_to_none=True)
