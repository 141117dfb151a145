"""Where data, model, objective and loop meet."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path

import torch

from mlip_cli.commands.evaluators import Evaluator, training_evaluators
from mlip_cli.commands.gallery import write_gallery
from mlip_cli.commands.recording import data_cards, recorded
from mlip_cli.commands.report import rebuild
from mlip_cli.commands.run_start import Start
from mlip_cli.commands.training_facts import cautions, facts, resume_facts
from mlip_cli.commands.training_setup import build, open_batches, open_data, training_device
from mlip_cli.commands.validation import validation_pairs
from mlip_cli.config import Recipe
from mlip_cli.data.loader import preflight
from mlip_cli.data.tokenizer import Tokenizer
from mlip_cli.distributed import from_main, process_group, world_size
from mlip_cli.drawing import TrainingPanel, training_panel
from mlip_cli.errors import RunError, Stopped
from mlip_cli.files import write_json
from mlip_cli.losses.objective import Objective
from mlip_cli.model.clip import CLIP
from mlip_cli.output import is_main, say, warn
from mlip_cli.run_folder import Run, claimed
from mlip_cli.train.loop import Progress, train
from mlip_cli.train.metrics import MetricsFile
from mlip_cli.train.resume import Saver, restore


def train_run(recipe: Recipe, start: Start) -> Run:
    """Train by `recipe`; everything that is wrong with it or the data shows before the run folder is touched."""
    device = training_device(recipe)
    with process_group(device):
        run = Run(Path(from_main(str(start.run.folder))))
        data = open_data(recipe)
        lines = preflight(data.datasets, data.order, recipe.train.global_batch_size, world_size())
        checkpoint = run.latest_checkpoint() if start.resumes else None
        training = build(recipe, device, fresh=checkpoint is None)
        progress, random = Progress(), None
        if checkpoint is not None:
            progress, random = restore(checkpoint, training, data=data.fingerprints)
        tokenizer = Tokenizer(recipe.model.text.context_length)
        pairs = validation_pairs(recipe, tokenizer, device=device) if is_main() else None
        evaluators = training_evaluators(recipe, tokenizer, pairs, device=device) if is_main() else []
        if start.is_named_by_us:
            run = Run(Path(from_main(str(claimed(run.folder)) if is_main() else "")))

        with (
            reported(run),
            place_named(run),
            full_memory_named(recipe),
            recorded(run, recipe, device=device, fingerprints=data.fingerprints, step=progress.step),
        ):
            say(f"run folder: {run.folder}")
            for line in [*lines, *facts(recipe, training.plain, data.total_steps), *resume_facts(start, progress.step)]:
                say(line)
            if is_main():
                write_json(run.data_cards, data_cards(data.datasets, pairs.datasets if pairs is not None else []))
            for line in cautions(recipe, training.plain.plan, data.total_steps):
                warn(line)
            metrics = MetricsFile(run.metrics if is_main() else None)
            metrics.cut_back(progress.step)
            saver = Saver(run.checkpoints, recipe.train, training, data=data.fingerprints)
            batches = open_batches(recipe, data, device, start_step=progress.step)
            with closing(batches), training_panel(data.total_steps, step=progress.step) as panel:  # type: ignore[type-var]
                eta_s = steady_eta(data.total_steps, progress.step)
                if random is not None:
                    random.restore(device)
                train(
                    training.model,
                    Objective(recipe.losses),
                    training.optimizer,
                    batches,
                    recipe=recipe,
                    total_steps=data.total_steps,
                    progress=progress,
                    device=device,
                    precision=training.precision,
                    metrics=metrics,
                    show=lambda line: panel.update(line, eta_s=eta_s(int(line["step"]))),
                    on_step=lambda step: panel.move(step, eta_s=eta_s(step)),
                    evaluate=partial(measure, training.plain, evaluators, panel),
                    save=partial(save, saver, panel),
                    is_save_due=saver.is_due,
                )
            if pairs is not None:
                write_gallery(run, training.plain.eval(), pairs, step=progress.step, true_rate=training.plain.plan.rate)
    return run


@contextmanager
def reported(run: Run) -> Iterator[None]:
    """Write the run's page at its end, be it the last step, a stop or a failure."""
    try:
        yield
    except (Stopped, RunError):
        with suppress(OSError, RunError):  # on a full disk the first error is the one to show
            rebuild(run)
        raise
    rebuild(run)


@contextmanager
def place_named(run: Run) -> Iterator[None]:
    """Add the run folder to what is said of a training that was stopped."""
    try:
        yield
    except Stopped as stop:
        raise Stopped(f"{stop}, saved in {run.folder}", exit_code=stop.exit_code) from None


@contextmanager
def full_memory_named(recipe: Recipe) -> Iterator[None]:
    """Say what makes a training fit that the device has no memory for.

    Raises:
        RunError: a step needed more memory than there is.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        size = recipe.train.micro_batch_size or recipe.train.global_batch_size // world_size()
        raise RunError(
            f"train.micro_batch_size: the device has no memory for {size:,} samples at once; set it to "
            f"{max(1, size // 2):,} or less, which gives the same gradient"
        ) from error


def steady_eta(total_steps: int, first_step: int) -> Callable[[int], float | None]:
    """Seconds left after a step by the mean speed since now, when `first_step` is done; None before the next one."""
    started_s = time.monotonic()

    def eta_s(step: int) -> float | None:
        done = step - first_step
        return (time.monotonic() - started_s) / done * (total_steps - step) if done > 0 else None

    return eta_s


def save(saver: Saver, panel: TrainingPanel, progress: Progress) -> None:
    """Write a checkpoint, and say so meanwhile."""
    panel.doing(f"saving the checkpoint of step {progress.step}")
    saver.save(progress)
    panel.doing(None)


class _EvaluationLeft(Exception):
    """A signal came while an evaluator was at work."""


def measure(
    model: CLIP, evaluators: list[Evaluator], panel: TrainingPanel, step: int, is_stopping: Callable[[], bool]
) -> dict[str, float]:
    """All measures of the model as it is, without gradients; none when a signal asks to stop meanwhile."""
    model.eval()
    measures: dict[str, float] = {}
    for evaluator in evaluators:
        done = 0
        panel.doing(f"evaluating {evaluator.name}")

        def on_batch(n: int, evaluator: Evaluator = evaluator) -> None:
            nonlocal done
            if is_stopping():
                raise _EvaluationLeft
            done += n
            if n:
                panel.doing(f"evaluating {evaluator.name}", done=done, total=evaluator.num_pictures)
            else:
                panel.doing(f"evaluating {evaluator.name}: texts")

        try:
            with torch.no_grad():
                found = evaluator.measure(model, on_batch)
        except _EvaluationLeft:
            warn(f"step {step}: the evaluation was left before its end; none of its numbers are written")
            return {}
        panel.measured(step, evaluator.name, found.words)
        measures |= found.fractions
    panel.doing(None)
    return measures
