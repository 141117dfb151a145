"""Where data, model, objective and loop meet."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from functools import partial
from pathlib import Path

import torch

from mlip_cli.data.tokenizer import Tokenizer
from mlip_cli.devices import batch_named, full_memory_named
from mlip_cli.distributed import from_main, process_group, rank, wait_for_ranks, world_size
from mlip_cli.errors import RunError, Stopped, UsageError
from mlip_cli.evaluate.evaluators import Evaluator, training_evaluators
from mlip_cli.evaluate.gallery import find_pairs, write_gallery
from mlip_cli.evaluate.together import EvaluationStopped, OnBatch
from mlip_cli.evaluate.validation import BATCH_SIZE, validation_pairs
from mlip_cli.files import write_json
from mlip_cli.losses.objective import Objective
from mlip_cli.model.clip import CLIP
from mlip_cli.recipe.config import Log, Recipe
from mlip_cli.recipe.merge_plan import MergePlan, merging_steps
from mlip_cli.report.write import rebuild
from mlip_cli.runs.folder import Run, claimed
from mlip_cli.runs.recording import data_cards, recorded
from mlip_cli.runs.start import MICRO_BATCHES, Start, drawn_by_forward_passes
from mlip_cli.terminal.output import is_main, say, warn
from mlip_cli.terminal.panel import TimeLeft, TrainingPanel, training_panel
from mlip_cli.train.facts import cautions, facts, preflight, resume_facts
from mlip_cli.train.gradients import RandomState
from mlip_cli.train.loop import train
from mlip_cli.train.metrics import MetricsFile
from mlip_cli.train.micro_batches import chosen_micro_batch_size
from mlip_cli.train.resume import Saver, Training, restore
from mlip_cli.train.setup import TrainingData, build, open_batches, open_data, training_device
from mlip_cli.train.signals import sure_to_leave
from mlip_cli.train.step import Progress
from mlip_cli.train.trackers import opened_trackers

Evaluate = Callable[[int, Callable[[], bool]], dict[str, float] | None]
"""Step, and whether a signal asks to stop -> measures by their names in metrics.jsonl; None if it was stopped."""


def train_run(recipe: Recipe, start: Start) -> Run:
    """Train by `recipe`; everything that is wrong with it or the data shows before the run folder is touched."""
    device = training_device(recipe)
    with sure_to_leave(), process_group(device):
        run = Run(Path(from_main(str(start.run.folder))))
        data = open_data(recipe)
        wait_for_ranks()  # data may have had to be copied or indexed on some machines first, here and below
        lines = preflight(data.datasets, data.order, recipe.train.global_batch_size, world_size())
        checkpoint = checkpoint_of_all(run, start)
        training, init = build(recipe, device, fresh=checkpoint is None)
        progress, random = Progress(), None
        if checkpoint is not None:
            progress, random = restore(checkpoint, training, data=data.fingerprints)
        tokenizer = Tokenizer(recipe.model.text.context_length)
        pairs = validation_pairs(recipe, tokenizer, device=device, beside=data.datasets)
        wait_for_ranks()
        evaluators = training_evaluators(recipe, tokenizer, pairs, device=device)
        if start.is_named_by_us:
            run = Run(Path(from_main(str(claimed(run.folder)) if is_main() else "")))

        with (
            reported(run),
            place_named(run),
            recorded(run, recipe, device=device, fingerprints=data.fingerprints, step=progress.step),
        ):
            say(f"run folder: {run.folder}")
            of_model = facts(recipe, training.plain, data.total_steps)
            for line in [*lines, *init.facts, *of_model, *resume_facts(start, progress.step)]:
                say(line)
            if is_main():
                write_json(run.data_cards, data_cards(data.datasets, pairs.datasets if pairs is not None else []))
            for line in [*init.cautions, *cautions(recipe, training.plain.training_plan, data.total_steps)]:
                warn(line)
            run_loop(run, recipe, data, training, progress, evaluators=evaluators, random=random)
            if pairs is not None:
                with training.as_measured() as model, evaluation_memory_named("the gallery"):
                    found = find_pairs(model.eval(), pairs)
                if is_main():
                    write_gallery(run, found, pairs, step=progress.step, true_rate=training.plain.plan.rate)
    return run


def checkpoint_of_all(run: Run, start: Start) -> Path | None:
    """The checkpoint that rank 0 goes on from, on every rank; None: a new run.

    Raises:
        UsageError: another rank does not see it.
    """
    newest = run.latest_checkpoint() if start.resumes else None
    chosen = from_main(str(newest or ""))
    if chosen and not Path(chosen).is_dir():
        raise UsageError(
            f"{chosen}: rank 0 goes on from there, and rank {rank()} sees no such folder; keep run folders on a disk "
            "that all nodes share"
        )
    return Path(chosen) if chosen else None


def run_loop(
    run: Run,
    recipe: Recipe,
    data: TrainingData,
    training: Training,
    progress: Progress,
    *,
    evaluators: list[Evaluator],
    random: RandomState | None,
) -> None:
    """Train from where `progress` stands to the last step, with metrics, checkpoints and a panel.

    Args:
        random: the state of the generators that a resumed run goes on with.
    """
    device = training.device
    saver = Saver(run.checkpoints, recipe.train, training, data=data.fingerprints)
    batches = open_batches(recipe, data, device, start_step=progress.step)
    wait_for_ranks()
    share = recipe.train.global_batch_size // world_size()
    micro_batch_size = chosen_micro_batch_size(recipe, training, progress, share=share)
    at_once = min(share, micro_batch_size or share)
    drawn = drawn_by_forward_passes(recipe)
    note = ", which gives the same gradient" if drawn is None else f" in a new run: it changes what {drawn} draws"
    config = recipe.model_dump(mode="json")
    with (
        opened_trackers(recipe.log if is_main() else Log(), run, config=config, step=progress.step) as trackers,
        closing(batches),  # type: ignore[type-var]
        training_panel(data.total_steps, step=progress.step, line_every=recipe.log.every_steps) as panel,
        batch_named(MICRO_BATCHES, at_once, note=note),
    ):
        metrics = MetricsFile(run.metrics if is_main() else None, also=trackers.append)
        metrics.cut_back(progress.step, measured_step=progress.measured_step)
        left = TimeLeft(data.total_steps, step=progress.step, evaluate_every=recipe.evaluate.every_steps)
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
            micro_batch_size=micro_batch_size,
            average=training.average,
            plan=partial(plan_of_step, recipe, training.plain, data.total_steps),
            metrics=metrics,
            show=lambda line: panel.update(line, eta_s=left.logged(int(line["step"]))),
            on_step=lambda step: panel.move(step, eta_s=left.after(step)),
            evaluate=timed(partial(measure, training, evaluators, panel), left),
            save=partial(save, saver, panel, left),
            is_save_due=saver.is_due,
        )


def plan_of_step(recipe: Recipe, model: CLIP, total_steps: int, step: int) -> MergePlan:
    """The merges of a training step, counted from 1: none outside of `model.merging.active`."""
    merging = recipe.model.merging
    if merging is None or step in merging_steps(total_steps, merging.active):
        return model.training_plan
    return model.merge_plan(0.0)


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


def evaluation_memory_named(work: str) -> AbstractContextManager[None]:
    """Say what helps where an evaluation does not fit beside the training."""
    return full_memory_named(
        work,
        f"{BATCH_SIZE} pictures at once beside the training",
        "take a smaller model, or leave it out of evaluate.zeroshot or data.validation and measure it afterwards",
    )


def save(saver: Saver, panel: TrainingPanel, left: TimeLeft, progress: Progress) -> None:
    """Write a checkpoint, say so meanwhile, and then how long it took: a SIGTERM leaves little time for it."""
    panel.doing(f"saving the checkpoint of step {progress.step}")
    start_s = time.monotonic()
    with left.saving():
        saver.save(progress)
    panel.doing(None)
    panel.measured(progress.step, "checkpoint", f"saved in {time.monotonic() - start_s:.1f} s")


def timed(evaluate: Evaluate, left: TimeLeft) -> Evaluate:
    """`evaluate`, whose cost `left` comes to know."""

    def evaluate_timed(step: int, is_stopping: Callable[[], bool]) -> dict[str, float] | None:
        with left.evaluating(step):
            return evaluate(step, is_stopping)

    return evaluate_timed


def measure(
    training: Training,
    evaluators: list[Evaluator],
    panel: TrainingPanel,
    step: int,
    is_stopping: Callable[[], bool],
) -> dict[str, float] | None:
    """All measures of the model as it is, without gradients, by all ranks and for all of them.

    None if a signal asked any rank to stop meanwhile. An error on one rank is raised on all.
    """
    measures: dict[str, float] = {}
    try:
        with torch.no_grad(), training.as_measured() as model:
            model.eval()
            for evaluator in evaluators:
                with evaluation_memory_named(f"step {step}: evaluating {evaluator.name}"):
                    found = evaluator.measure(model, on_batch_of(evaluator, panel, is_stopping))
                panel.measured(step, evaluator.name, found.words)
                measures |= found.values
    except EvaluationStopped:
        warn(f"step {step}: the evaluation was stopped; none of its numbers are written")
        return None
    panel.doing(None)
    return measures


def on_batch_of(evaluator: Evaluator, panel: TrainingPanel, is_stopping: Callable[[], bool]) -> OnBatch:
    """After each batch: stop if a signal asks for it, and show how far the evaluation is.

    The other ranks are as far as this one.
    """
    done = 0
    panel.doing(f"evaluating {evaluator.name}")

    def on_batch(n: int) -> None:
        nonlocal done
        if is_stopping():
            raise EvaluationStopped
        done = min(done + n * world_size(), evaluator.num_pictures)
        if n:
            panel.doing(f"evaluating {evaluator.name}", done=done, total=evaluator.num_pictures)
        else:
            panel.doing(f"evaluating {evaluator.name}: texts")

    return on_batch
