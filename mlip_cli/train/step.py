"""One training step that can be taken again and again, to be timed whole and in pieces."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mlip_cli.distributed import full
from mlip_cli.errors import RunError
from mlip_cli.losses.features import ObjectiveLike
from mlip_cli.losses.objective import Objective
from mlip_cli.model.clip import CLIP
from mlip_cli.recipe.config import Recipe
from mlip_cli.recipe.merge_plan import MergePlan
from mlip_cli.terminal.output import plural, warn
from mlip_cli.train.gradients import Precision, RandomState, add_gradients
from mlip_cli.train.optim import build_optimizer, clamp_scales, set_learning_rate
from mlip_cli.types import Batch

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


@dataclass
class Progress:
    """Where the run stands; saved with every checkpoint."""

    step: int = 0
    skipped_steps: int = 0
    bad_samples: int = 0
    measured_step: int = 0
    """The last step after which the model was evaluated."""
    best: list[tuple[float, int]] = field(default_factory=list)
    """(measure, step) of the checkpoints that are kept as the best, the best one first."""
    best_metric: str | None = None
    """Name of that measure."""
    micro_batch_size: int | None = None
    """That was found to fit, where the recipe says auto."""

    def note_best(self, metric: str, value: float, *, keep: int) -> bool:
        """Whether this step's measure is one of the `keep` best so far, and is noted then; ties go to the earlier.

        Measures of another metric, which a run may change when it goes on, are forgotten.
        """
        if metric != self.best_metric:
            self.best, self.best_metric = [], metric
        ranked = sorted([*self.best, (value, self.step)], key=lambda found: (-found[0], found[1]))
        self.best = ranked[:keep]
        return (value, self.step) in self.best


class FiniteGuard:
    """Skips steps whose gradient is not finite, on the device and so without waiting for it."""

    def __init__(self, device: torch.device, progress: Progress) -> None:
        self.progress = progress
        self.in_a_row = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)
        self.last_skipped = torch.zeros((), device=device)

    def step(self, optimizer: torch.optim.AdamW, precision: Precision, grad_norm: Tensor) -> None:
        """One optimiser step, or none; `grad_norm` is that of the reduced gradient, so all ranks agree."""
        not_finite = (~torch.isfinite(grad_norm)).float()
        self.in_a_row = (self.in_a_row + not_finite) * not_finite
        self.skipped += not_finite
        self.last_skipped = torch.where(not_finite > 0, self.progress.step + 1, self.last_skipped)
        if not precision.scaler.is_enabled():
            optimizer.found_inf = not_finite  # type: ignore[attr-defined]  # fused AdamW reads it on the device
        precision.scaler.step(optimizer)
        precision.scaler.update()

    def check(self) -> None:
        """Read the counts into the progress.

        Raises:
            RunError: too many in a row.
        """
        if skipped := int(self.skipped):
            self.progress.skipped_steps += skipped
            self.skipped.zero_()
            warn(
                f"step {int(self.last_skipped)}: the gradient was not finite, so the step was skipped; "
                f"{plural(self.progress.skipped_steps, 'step')} of this run so far"
            )
        if self.in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise RunError(
                f"step {self.progress.step}: the gradient was not finite in {int(self.in_a_row)} steps in a row; lower "
                "optim.lr, set optim.clip_grad_norm, or look at the data"
            )


MOST_SKIPPED_IN_A_ROW = 20
"""Steps without a finite gradient after which the run is given up."""


def clip_gradients(model: nn.Module, most: float | None) -> Tensor:
    """Norm of the whole gradient before clipping it to `most`: 0-d."""
    return full(nn.utils.clip_grad_norm_(model.parameters(), math.inf if most is None else most))


def settle_buckets(
    model: nn.Module,
    objective: ObjectiveLike,
    batch: Batch,
    precision: Precision,
    micro_batch_size: int | None,
    plan: MergePlan | None,
) -> None:
    """One backward that is thrown away, before the first step and before a resumed one.

    DDP orders its buckets anew after the first backward, and the order of summation over ranks follows the buckets;
    with it settled beforehand a resumed run adds in the same order as one that never stopped.
    """
    random = RandomState.read(batch.images.device)
    add_gradients(model, objective, batch, precision=precision, micro_batch_size=micro_batch_size, plan=plan)
    model.zero_grad(set_to_none=True)
    random.restore(batch.images.device)
