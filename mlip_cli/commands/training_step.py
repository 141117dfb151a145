"""One training step that can be taken again and again, to be timed whole and in pieces."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from mlip_cli.config import Recipe
from mlip_cli.losses.objective import Objective
from mlip_cli.model.clip import CLIP
from mlip_cli.train.gradients import Precision, add_gradients
from mlip_cli.train.loop import FiniteGuard, Progress, clip_gradients
from mlip_cli.train.optim import build_optimizer, clamp_scales, set_learning_rate
from mlip_cli.types import Batch, ObjectiveLike

COPY = "copy to the device"
OPTIMIZER = "optimizer"


class TrainingStep:
    """One step as `train` takes it, on one batch again and again, with a learning rate of 0.

    Args:
        batch: where the loader leaves it: in main memory, pinned for CUDA.
    """

    def __init__(self, model: CLIP, recipe: Recipe, batch: Batch, device: torch.device) -> None:
        self.model, self.device, self.batch = model, device, batch
        self.objective: ObjectiveLike = Objective(recipe.losses)
        self.losses = recipe.losses
        self.optimizer = build_optimizer(model, recipe.optim)
        set_learning_rate(self.optimizer, 0.0)
        self.clip_grad_norm = recipe.optim.clip_grad_norm
        self.precision = Precision.named(recipe.train.precision, device)
        self.guard = FiniteGuard(device, Progress())
        size = recipe.train.given_micro_batch_size
        self.micro_batch_size = size if size is not None and size < len(batch.images) else None
        """None too where the recipe's are no smaller than this batch."""

    def __call__(
        self, objective: ObjectiveLike | None = None, part: Callable[[str], AbstractContextManager] = nullcontext
    ) -> None:
        """Copy, forward, losses, backward, clipping, optimiser."""
        with part(COPY):
            batch = self.copied()
        self.add_gradients(batch, objective)
        with part(OPTIMIZER):
            self.update()

    def copied(self) -> Batch:
        """The batch on the device."""
        return self.batch.to(self.device, non_blocking=True)

    def add_gradients(self, batch: Batch, objective: ObjectiveLike | None = None) -> None:
        """Forward, losses and backward."""
        add_gradients(
            self.model,
            objective or self.objective,
            batch,
            precision=self.precision,
            micro_batch_size=self.micro_batch_size,
        )

    def update(self) -> None:
        """Clip the gradient, move the weights by nothing, drop the gradient."""
        self.precision.scaler.unscale_(self.optimizer)
        self.guard.step(self.optimizer, self.precision, clip_gradients(self.model, self.clip_grad_norm))
        self.optimizer.zero_grad(set_to_none=True)
        clamp_scales(self.model)

    def parts_of_step(self, batch: Batch) -> dict[str, Callable[[], None]]:
        """Pieces of the step that can run alone, each with all that it needs at hand; holds one gradient."""
        size = self.micro_batch_size or len(batch.images)
        micro_batches = [
            Batch(images, token_ids, keys=())
            for images, token_ids in zip(batch.images.split(size), batch.token_ids.split(size), strict=True)
        ]
        self.add_gradients(batch)
        gradients = [(parameter, parameter.grad) for parameter in self.model.parameters()]
        self.optimizer.zero_grad(set_to_none=True)

        def forward() -> None:
            for micro_batch in micro_batches:
                with self.precision.autocast(self.device):
                    self.model(micro_batch)

        def forward_and_backward() -> None:
            self.add_gradients(batch)
            self.optimizer.zero_grad(set_to_none=True)

        def optimizer() -> None:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            self.update()

        return {
            "training forward": forward,
            "training forward and backward": forward_and_backward,
            "optimizer": optimizer,
        }
