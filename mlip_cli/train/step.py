"""The training step, the only one: `train` takes it, and `mlip profile` times it."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlip_cli.distributed import full, parallel
from mlip_cli.errors import RunError
from mlip_cli.losses.objective import Objective
from mlip_cli.recipe.merge_plan import MergePlan
from mlip_cli.terminal.output import plural, warn
from mlip_cli.train.ahead import Copier, ReadyBatch
from mlip_cli.train.gradients import Counting, Precision, RandomState, add_gradients
from mlip_cli.train.optim import Schedule, clamp_scales, set_learning_rate
from mlip_cli.train.state import Progress, Training
from mlip_cli.types import Batch, PartOf

OPTIMIZER = "optimizer"


@dataclass(frozen=True)
class StepSettings:
    """The numbers of a recipe that a step needs."""

    schedule: Schedule
    clip_grad_norm: float | None
    """None: the gradient is not clipped."""
    global_batch_size: int
    micro_batch_size: int | None
    """Samples a forward pass; None: this rank's whole share."""


@dataclass(frozen=True)
class StepResult:
    """What a step found. The tensors lie on the device: reading them waits for it."""

    step: int
    lr: float
    terms: dict[str, Tensor]
    """Losses of this rank by name: 0-d, not weighted, without graph."""
    grad_norm: Tensor
    """Norm of the gradient of the global batch before clipping: 0-d."""


class Stepper:
    """Takes one step after the other of one training."""

    def __init__(self, training: Training, objective: Objective, settings: StepSettings) -> None:
        self.training, self.objective, self.settings = training, objective, settings
        self.copy = Copier(objective, training.device)
        """Makes a batch in main memory ready for a step."""
        self.guard = FiniteGuard(training.device)
        self._is_first = True

    def samples_seen(self, step: int) -> int:
        """Samples of all ranks up to the end of a step."""
        return step * self.settings.global_batch_size

    def take(
        self,
        ready: ReadyBatch,
        step: int,
        plan: MergePlan,
        part: PartOf = nullcontext,
    ) -> StepResult:
        """Learning rate, forward, losses, backward, clip, AdamW, clamp of scales, average.

        Args:
            ready: this rank's share, from `copy`.
            step: counted from 1.
            plan: merges of this step.
            part: opens a context by the name of each part of the step, for a clock.
        """
        ready.wait()
        if self._is_first and parallel(self.training.model) == "ddp":
            self._fix_order_of_sums(ready, plan)
        self._is_first = False
        lr = self.settings.schedule.learning_rate(step)
        set_learning_rate(self.training.optimizer, lr)
        terms = self.add_gradients(ready.batch, plan, part, counts=ready.counts)
        with part(OPTIMIZER):
            grad_norm = self.update(step)
        return StepResult(step, lr, terms, grad_norm)

    def add_gradients(
        self, batch: Batch, plan: MergePlan, part: PartOf = nullcontext, counts: Counting | None = None
    ) -> dict[str, Tensor]:
        """Forward, losses and backward of a batch that lies on the device."""
        return add_gradients(
            self.training.model,
            self.objective,
            batch,
            precision=self.training.precision,
            micro_batch_size=self.settings.micro_batch_size,
            plan=plan,
            part=part,
            counts=counts,
        )

    def update(self, step: int) -> Tensor:
        """Move the weights and drop the gradient; return its norm before clipping."""
        training, batch_size = self.training, self.settings.global_batch_size
        training.precision.scaler.unscale_(training.optimizer)
        grad_norm = clip_gradients(training.model, self.settings.clip_grad_norm)
        self.guard.step(training.optimizer, training.precision, grad_norm, step=step)
        training.optimizer.zero_grad(set_to_none=True)
        clamp_scales(training.plain)
        if training.average is not None:
            training.average.update(samples_seen=self.samples_seen(step), batch_size=batch_size)
        return grad_norm

    def _fix_order_of_sums(self, ready: ReadyBatch, plan: MergePlan) -> None:
        """One backward that is thrown away, before the first step and before a resumed one.

        DDP orders its buckets anew after the first backward, and the order of summation over ranks follows the
        buckets. After this backward a resumed run adds in the same order as one that never stopped.
        """
        random = RandomState.read(self.training.device)
        self.add_gradients(ready.batch, plan, counts=ready.counts)
        self.training.model.zero_grad(set_to_none=True)
        random.restore(self.training.device)


MOST_SKIPPED_IN_A_ROW = 20
"""So many steps without a finite gradient end the run."""
NOT_FINITE_CURE = "lower optim.lr, set optim.clip_grad_norm, or look at the data"


class FiniteGuard:
    """Skips steps whose gradient is not finite, on the device and so without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.in_a_row = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)
        self.last_skipped = torch.zeros((), device=device)

    def step(self, optimizer: torch.optim.AdamW, precision: Precision, grad_norm: Tensor, *, step: int) -> None:
        """Step the optimiser if `grad_norm` is finite; it is the norm of the reduced gradient, so all ranks agree."""
        not_finite = (~torch.isfinite(grad_norm)).float()
        self.in_a_row = (self.in_a_row + not_finite) * not_finite
        self.skipped += not_finite
        self.last_skipped = torch.where(not_finite > 0, step, self.last_skipped)
        if not precision.scaler.is_enabled():
            optimizer.found_inf = not_finite  # type: ignore[attr-defined]  # fused AdamW reads it on the device
        precision.scaler.step(optimizer)
        precision.scaler.update()

    def count(self, progress: Progress) -> None:
        """Add the skipped steps to the progress.

        Raises:
            RunError: too many steps in a row had no finite gradient.
        """
        skipped, last_skipped, in_a_row = map(
            int, torch.stack([self.skipped, self.last_skipped, self.in_a_row]).tolist()
        )
        if skipped:
            progress.skipped_steps += skipped
            self.skipped.zero_()
            warn(
                f"step {last_skipped}: the gradient was not finite, so the step was skipped; "
                f"{plural(progress.skipped_steps, 'step')} of this run so far"
            )
        if in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise RunError(
                f"step {progress.step}: the gradient was not finite in {in_a_row} steps in a row; {NOT_FINITE_CURE}"
            )


def clip_gradients(model: nn.Module, most: float | None) -> Tensor:
    """Norm of the whole gradient: 0-d. If it is above `most`, the gradient is clipped to that."""
    if most is None:
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return full(nn.utils.get_total_norm(gradients))
    return full(nn.utils.clip_grad_norm_(model.parameters(), most))
