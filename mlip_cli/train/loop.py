"""The training loop, the only one."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mlip_cli.config import Recipe
from mlip_cli.distributed import all_mean, all_sum, from_all, full, parallel, unwrap, world_size
from mlip_cli.errors import RunError, Stopped
from mlip_cli.merge_plan import MergePlan
from mlip_cli.output import plural, warn
from mlip_cli.train.average import WeightAverage
from mlip_cli.train.gradients import Precision, RandomState, add_gradients
from mlip_cli.train.metrics import MetricsFile, Stopwatch, peak_gib
from mlip_cli.train.optim import clamp_scales, learning_rate, set_learning_rate
from mlip_cli.train.signals import StopRequest
from mlip_cli.types import Batch, ObjectiveLike

MOST_BAD_NAMED = 10
"""Bad samples that are named; more are counted."""

MOST_SKIPPED_IN_A_ROW = 20
"""Steps without a finite gradient after which the run is given up."""


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


def train(
    model: nn.Module,
    objective: ObjectiveLike,
    optimizer: torch.optim.AdamW,
    batches: Iterator[Batch],
    *,
    recipe: Recipe,
    total_steps: int,
    progress: Progress,
    device: torch.device,
    precision: Precision,
    micro_batch_size: int | None,
    plan: Callable[[int], MergePlan | None],
    average: WeightAverage | None,
    metrics: MetricsFile,
    show: Callable[[dict[str, float]], None],
    on_step: Callable[[int], None],
    evaluate: Callable[[int, Callable[[], bool]], dict[str, float] | None],
    save: Callable[[Progress], None],
    is_save_due: Callable[[int], bool],
) -> None:
    """Train from `progress.step` to `total_steps`.

    Args:
        model: on `device`, wrapped for several ranks; gives `Encoded` for a `Batch`.
        batches: one rank's share of each step, beginning with step `progress.step + 1`.
        micro_batch_size: samples a forward pass; None: the whole share.
        plan: merges of a step; None: the model's own.
        average: takes in the weights after every step.
        show: gets every logged line. on_step: is told of every step. save: writes a checkpoint.
        evaluate: measures at a step; it may leave, with None, when its second argument says so. What fails in it on one
            rank fails on all.
        is_save_due: asked before every step, for after it; one rank's yes is enough.

    Raises:
        Stopped: a signal came; the state is saved.
        RunError: too many steps in a row had no finite gradient.
    """
    config, optim = recipe.train, recipe.optim
    guard = FiniteGuard(device, progress)
    watch = Stopwatch(batches, device)
    first = progress.step + 1
    model.train()
    with StopRequest(device) as stop:

        def conclude(step: int) -> None:
            """Evaluate and save after a step where that is due, and end where a signal asked for it."""
            last, was_left = step == total_steps, False
            evaluates = is_evaluation_due(step, total_steps, recipe)
            if evaluates:
                account(progress, guard, watch, device)
                # nothing measures the last step later: one Ctrl-C does not end its evaluation, another one leaves
                try:
                    measures = evaluate(step, stop.is_urgent if last else stop.is_asked_for)
                except Exception:
                    save(progress)  # what was learned is not lost with what could not be measured
                    raise
                was_left = measures is None
                if measures:
                    metrics.append({"step": step, "samples_seen": step * config.global_batch_size, **measures})
                progress.measured_step = progress.measured_step if was_left else step
                best = note_if_best(measures or {}, progress, recipe)
                stop.cast(save=best or is_save_due(step) or step < first)
                stop.vote_again()
                model.train()
            exit_code, save_due = stop.decision()
            saves = last or bool(exit_code) or save_due
            if saves:
                account(progress, guard, watch, device)
                save(progress)
            if exit_code and (was_left or not last):
                raise Stopped(f"stopped after step {step} of {total_steps}", exit_code=exit_code)
            if evaluates or saves:
                watch.restart()

        if progress.measured_step < progress.step and is_evaluation_due(progress.step, total_steps, recipe):
            conclude(progress.step)  # an evaluation that a signal or an error had ended
        for step in range(first, total_steps + 1):
            batch = watch.next_batch().to(device, non_blocking=True)
            if parallel(model) == "ddp" and step == first:
                settle_buckets(model, objective, batch, precision, micro_batch_size, plan(step))

            lr = learning_rate(step, peak=optim.lr, warmup_steps=optim.warmup_steps, total_steps=total_steps)
            set_learning_rate(optimizer, lr)
            stop.cast(save=is_save_due(step))
            terms = add_gradients(
                model,
                objective,
                batch,
                precision=precision,
                micro_batch_size=micro_batch_size,
                plan=plan(step),
                sum_count=stop.ride,
            )
            precision.scaler.unscale_(optimizer)
            grad_norm = clip_gradients(model, optim.clip_grad_norm)
            guard.step(optimizer, precision, grad_norm)
            optimizer.zero_grad(set_to_none=True)
            clamp_scales(unwrap(model))
            progress.step = step
            if average is not None:
                average.update(samples_seen=step * config.global_batch_size, batch_size=config.global_batch_size)

            last = step == total_steps
            if step % recipe.log.every_steps == 0 or last:
                account(progress, guard, watch, device)
                line = {
                    "step": step,
                    "samples_seen": step * config.global_batch_size,
                    **losses(objective, terms),
                    "lr": lr,
                    **scales(model),
                    "grad_norm": grad_norm.item(),
                    **watch.read(ranks=world_size()),
                    "peak_gib": peak_gib(device),
                    "skipped_steps": progress.skipped_steps,
                    "bad_samples": progress.bad_samples,
                }
                metrics.append(line)
                show(line)
                warn_if_stalled(line, step, recipe)
                watch.restart()
            on_step(step)
            conclude(step)


def is_evaluation_due(step: int, total_steps: int, recipe: Recipe) -> bool:
    """Whether the model is measured after this step."""
    every = recipe.evaluate.every_steps
    return step == total_steps or bool(every and step % every == 0)


def note_if_best(measures: dict[str, float], progress: Progress, recipe: Recipe) -> bool:
    """Whether this step is to be kept for what was measured; the progress then names it."""
    metric, keep = recipe.evaluate.best_metric, recipe.train.keep.best
    if metric is None or keep is None or not measures:
        return False
    return progress.note_best(metric, measures[metric], keep=keep)


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


def account(progress: Progress, guard: FiniteGuard, watch: Stopwatch, device: torch.device) -> None:
    """Bring the counts of `progress` up to date, over all ranks, and name the first bad samples of the run."""
    guard.check()
    count = int(all_sum(torch.tensor(len(watch.bad_samples), device=device)))
    if count and progress.bad_samples < MOST_BAD_NAMED:
        found = [bad for own in from_all(watch.bad_samples) for bad in own]
        for number, bad in enumerate(found[: MOST_BAD_NAMED - progress.bad_samples], start=progress.bad_samples + 1):
            last = "; later ones are only counted" if number == MOST_BAD_NAMED else ""
            warn(f"{bad.shard}: sample {bad.key}: {bad.reason}; another one takes its place{last}")
    progress.bad_samples += count
    watch.bad_samples = []


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


def losses(objective: ObjectiveLike, terms: dict[str, Tensor]) -> dict[str, float]:
    """Total and every term, means over ranks."""
    values = all_mean(torch.stack([objective.total(terms), *terms.values()]))
    return dict(zip(["loss", *terms], values.tolist(), strict=True))


def scales(model: nn.Module) -> dict[str, float]:
    """Logit scale of every loss, as `scale/NAME`."""
    log_scales: nn.ParameterDict = unwrap(model).log_scales  # type: ignore[assignment]
    return {f"scale/{name}": math.exp(full(value).item()) for name, value in log_scales.items()}


def warn_if_stalled(line: dict[str, float], step: int, recipe: Recipe) -> None:
    """Say once when the contrastive loss has not left its value for guessing."""
    patience = 2 * max(recipe.optim.warmup_steps, 50)
    guess = math.log(recipe.train.global_batch_size)
    is_first = step >= patience > step - recipe.log.every_steps
    term = recipe.losses.spatial_global
    if is_first and term is not None and term.kind == "infonce" and line["spatial_global"] > 0.99 * guess:
        warn(
            f"step {step}: spatial_global {line['spatial_global']:.3f} is still that of guessing "
            f"(ln {recipe.train.global_batch_size} = {guess:.3f}); look at captions, optim.lr and warm-up"
        )
