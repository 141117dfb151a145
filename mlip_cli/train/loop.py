"""The training loop, the only one."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from mlip_cli.devices import peak_gib
from mlip_cli.distributed import all_mean, all_sum, from_all, full, unwrap, world_size
from mlip_cli.errors import Stopped
from mlip_cli.losses.features import ObjectiveLike
from mlip_cli.recipe.config import Recipe
from mlip_cli.recipe.merge_plan import MergePlan
from mlip_cli.terminal.output import warn
from mlip_cli.train.metrics import MetricsFile, Stopwatch
from mlip_cli.train.signals import StopRequest
from mlip_cli.train.state import Progress
from mlip_cli.train.step import FiniteGuard, Stepper
from mlip_cli.types import Batch

MOST_BAD_NAMED = 10
"""Bad samples that are named; more are counted."""


def train(
    stepper: Stepper,
    batches: Iterator[Batch],
    *,
    recipe: Recipe,
    total_steps: int,
    progress: Progress,
    plan: Callable[[int], MergePlan],
    metrics: MetricsFile,
    show: Callable[[dict[str, float]], None],
    on_step: Callable[[int], None],
    evaluate: Callable[[int, Callable[[], bool]], dict[str, float] | None],
    save: Callable[[Progress], None],
    is_save_due: Callable[[int], bool],
    is_time_to_save: Callable[[], bool],
) -> None:
    """Train from `progress.step` to `total_steps`.

    Args:
        batches: one rank's share of each step, beginning with step `progress.step + 1`.
        plan: merges of a step.
        show: gets every logged line. on_step: is told of every step. save: writes a checkpoint.
        evaluate: measures at a step; it may leave, with None, when its second argument says so. What fails in it on one
            rank fails on all.
        is_save_due: of a step, the same on all ranks. is_time_to_save: by the clock; one rank's yes is enough.

    Raises:
        Stopped: a signal came; the state is saved.
        RunError: too many steps in a row had no finite gradient.
    """
    config, model, objective, device = recipe.train, stepper.training.model, stepper.objective, stepper.training.device
    guard = stepper.guard
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
                model.train()
            saves = last or (evaluates and best) or step < first or is_save_due(step)
            asked = stop.agreed(save=not saves and is_time_to_save(), at_once=evaluates)
            exit_code = asked.exit_code
            saves = saves or bool(exit_code) or asked.save
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
            taken = stepper.take(watch.next_batch(), step, plan(step))
            progress.step = step
            last = step == total_steps
            if step % recipe.log.every_steps == 0 or last:
                account(progress, guard, watch, device)
                line = {
                    "step": step,
                    "samples_seen": step * config.global_batch_size,
                    **losses(objective, taken.terms),
                    "lr": taken.lr,
                    **scales(model),
                    "grad_norm": taken.grad_norm.item(),
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


def account(progress: Progress, guard: FiniteGuard, watch: Stopwatch, device: torch.device) -> None:
    """Bring the counts of `progress` up to date, over all ranks, and name the first bad samples of the run."""
    guard.count(progress)
    count = int(all_sum(torch.tensor(len(watch.bad_samples), device=device)))
    if count and progress.bad_samples < MOST_BAD_NAMED:
        found = [bad for own in from_all(watch.bad_samples) for bad in own]
        for number, bad in enumerate(found[: MOST_BAD_NAMED - progress.bad_samples], start=progress.bad_samples + 1):
            last = "; later ones are only counted" if number == MOST_BAD_NAMED else ""
            warn(f"{bad.shard}: sample {bad.key}: {bad.reason}; another one takes its place{last}")
    progress.bad_samples += count
    watch.bad_samples = []


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
