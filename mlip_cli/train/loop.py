"""The training loop, the only one."""

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from mlip_cli.devices import peak_gib
from mlip_cli.distributed import all_sum, from_all, full, world_size
from mlip_cli.errors import RunError, Stopped
from mlip_cli.recipe.merge_plan import MergePlan
from mlip_cli.terminal.output import plural, warn
from mlip_cli.train.ahead import one_ahead
from mlip_cli.train.journal import Journal
from mlip_cli.train.metrics import Stopwatch
from mlip_cli.train.resume import Saver
from mlip_cli.train.signals import StopRequest
from mlip_cli.train.state import Progress
from mlip_cli.train.step import NOT_FINITE_CURE, FiniteGuard, Stepper, StepResult
from mlip_cli.types import Batch

COLLECT_EVERY = 1_000
"""Steps between looks for unreachable Python objects."""

MOST_BAD_NAMED = 10
"""So many bad samples are named; later ones are only counted."""

Evaluate = Callable[[int, Callable[[], bool]], dict[str, float] | None]
"""Called with a step, and with a function that says whether to stop. Returns the measures by their names in
metrics.jsonl, or None if it was told to stop. An error on one rank is raised on all."""


@dataclass(frozen=True)
class Timetable:
    """After which steps a training logs and evaluates."""

    total_steps: int
    log_every: int
    evaluate_every: int | None
    evaluates_at_start: bool = False
    """Whether step 0, the weights that the training starts from, is evaluated too."""

    def logs(self, step: int) -> bool:
        """Every `log_every` steps, and after the last one."""
        return step % self.log_every == 0 or step == self.total_steps

    def evaluates(self, step: int) -> bool:
        """Every `evaluate_every` steps, and after the last one; before the first one if it is asked for."""
        every = self.evaluate_every
        if step == 0:
            return self.evaluates_at_start
        return step == self.total_steps or (every is not None and step % every == 0)


def train(
    stepper: Stepper,
    batches: Iterator[Batch],
    progress: Progress,
    *,
    timetable: Timetable,
    plan_of: Callable[[int], MergePlan],
    evaluate: Evaluate,
    saver: Saver,
    journal: Journal,
) -> None:
    """Train from `progress.step` to the last step.

    Args:
        batches: one rank's share of each step, beginning with step `progress.step + 1`.
        plan_of: merges of a step.

    Raises:
        Stopped: a signal came; the state is saved.
        RunError: too many steps in a row had no finite gradient, or all steps of a short run.
    """
    total_steps, first_step = timetable.total_steps, progress.step + 1
    watch = Stopwatch(one_ahead(batches, stepper.copy), stepper.training.device)
    # if a signal or an error ended an evaluation, it is repeated before the next step; that of step 0 begins a run
    was_ended = progress.measured_step < progress.step and timetable.evaluates(progress.step)
    stepper.training.model.train()
    with StopRequest(stepper.training.device) as stop, garbage_kept() as collect:
        for step in range(progress.step if was_ended else progress.step + 1, total_steps + 1):
            is_new, is_last = step > progress.step, step == total_steps
            if is_new:
                taken = stepper.take(watch.next_batch(), step, plan_of(step))
                progress.step = step
                if timetable.logs(step):
                    count(progress, stepper.guard, watch)
                    journal.line(line_of(taken, stepper=stepper, progress=progress, watch=watch))
                    watch.restart()
                elif step == first_step:
                    journal.glance(line_of(taken, stepper=stepper, progress=progress, watch=watch))
                journal.step_done(step)

            evaluates = timetable.evaluates(step)
            if evaluates:
                count(progress, stepper.guard, watch)
                # A resumed run does not measure the last step again: the first Ctrl-C lets its evaluation finish.
                is_stopping = stop.is_urgent if is_last else stop.is_asked_for
                measure(stepper, progress, partial(evaluate, step, is_stopping), saver=saver, journal=journal)
            was_ended = evaluates and progress.measured_step < step

            saves = is_last or not (is_new or step == 0) or saver.is_due(progress)
            asked = stop.agreed(save=not saves and saver.is_time(), at_once=evaluates)
            if saves or asked.save:
                count(progress, stepper.guard, watch)
                save(progress, saver=saver, journal=journal)
            if asked.exit_code and (was_ended or not is_last):
                raise Stopped(f"stopped after step {step} of {total_steps}", exit_code=asked.exit_code)
            if evaluates or saves or asked.save:
                watch.restart()
            if evaluates or step % COLLECT_EVERY == 0:
                collect()
    if 0 < progress.step == progress.skipped_steps:
        raise RunError(f"the gradient was not finite in any of {plural(total_steps, 'step')}; {NOT_FINITE_CURE}")


@contextmanager
def garbage_kept() -> Iterator[Callable[[], object]]:
    """For the block Python looks for unreachable cycles only when the function that is given is called.

    It would look at steps of its own on each rank, and all ranks wait for the one that looks. A step leaves no cycles.
    """
    was_on = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield gc.collect
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()


def measure(
    stepper: Stepper,
    progress: Progress,
    evaluate: Callable[[], dict[str, float] | None],
    *,
    saver: Saver,
    journal: Journal,
) -> None:
    """Evaluate after the newest step; the progress notes it if the evaluation came to its end."""
    try:
        measures = evaluate()
    except Exception:
        save(progress, saver=saver, journal=journal)  # what was learned is kept although it could not be measured
        raise
    stepper.training.model.train()
    if measures is not None:
        progress.measured_step = progress.step
    if measures:
        samples_seen = stepper.samples_seen(progress.step)
        journal.measures({"step": progress.step, "samples_seen": samples_seen, **measures})
        saver.note_best(progress, measures)


def save(progress: Progress, *, saver: Saver, journal: Journal) -> None:
    """Write a checkpoint, and show it."""
    with journal.saving(progress.step):
        saver.save(progress)


def line_of(taken: StepResult, *, stepper: Stepper, progress: Progress, watch: Stopwatch) -> dict[str, float]:
    """The line of a step for metrics.jsonl; all ranks take part, and the device is waited for."""
    log_scales: nn.ParameterDict = stepper.training.plain.log_scales
    means = all_sum(torch.stack([stepper.objective.total(taken.terms), *taken.terms.values()])) / world_size()
    others = [full(x).reshape(1) for x in (taken.grad_norm, *log_scales.values())]
    read = torch.cat([means, *others]).tolist()  # at once, as each read waits for the device
    losses, (grad_norm, *logs) = read[: len(means)], read[len(means) :]
    return {
        "step": taken.step,
        "samples_seen": stepper.samples_seen(taken.step),
        **dict(zip(["loss", *taken.terms], losses, strict=True)),
        "lr": taken.lr,
        **{f"scale/{name}": math.exp(value) for name, value in zip(log_scales, logs, strict=True)},
        "grad_norm": grad_norm,
        **watch.read(ranks=world_size()),
        "peak_gib": peak_gib(stepper.training.device),
        "skipped_steps": progress.skipped_steps,
        "bad_samples": progress.bad_samples,
    }


def count(progress: Progress, guard: FiniteGuard, watch: Stopwatch) -> None:
    """Add skipped steps and the bad samples of all ranks to the progress; name the first bad samples of the run."""
    guard.count(progress)
    number = int(all_sum(torch.full((), len(watch.bad_samples), device=watch.device)))
    if number and progress.bad_samples < MOST_BAD_NAMED:
        found = [bad for own in from_all(watch.bad_samples) for bad in own]
        for place, bad in enumerate(found[: MOST_BAD_NAMED - progress.bad_samples], start=progress.bad_samples + 1):
            last = "; later ones are only counted" if place == MOST_BAD_NAMED else ""
            warn(f"{bad.shard}: sample {bad.key}: {bad.reason}; another one takes its place{last}")
    progress.bad_samples += number
    watch.bad_samples = []
