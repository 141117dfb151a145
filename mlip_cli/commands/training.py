"""A training by a recipe: where data, model, steps, evaluators and the run folder meet."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from functools import partial
from pathlib import Path

import torch

from mlip_cli.data.tokenizer import Tokenizer
from mlip_cli.devices import batch_named, full_memory_named, has_units_for_bf16
from mlip_cli.distributed import from_all, from_main, process_group, rank, wait_for_ranks, world_size
from mlip_cli.errors import RunError, Stopped, UsageError
from mlip_cli.evaluate.before_after import Answers, keep_answers
from mlip_cli.evaluate.evaluators import Evaluator, Measures, training_evaluators
from mlip_cli.evaluate.gallery import find_pairs, write_gallery
from mlip_cli.evaluate.together import EvaluationStopped, OnBatch
from mlip_cli.evaluate.validation import BATCH_SIZE, ValidationPairs, validation_pairs
from mlip_cli.files import write_json
from mlip_cli.recipe.config import Log, Recipe
from mlip_cli.report.before_after import ending_lines
from mlip_cli.report.write import rebuild
from mlip_cli.runs.contents import read_metrics
from mlip_cli.runs.folder import Run, claimed, with_tokenizer
from mlip_cli.runs.recording import data_cards, recorded
from mlip_cli.runs.start import MICRO_BATCHES, Start, drawn_by_forward_passes, with_begun_precision
from mlip_cli.terminal.history import Headline
from mlip_cli.terminal.output import is_main, say, warn
from mlip_cli.terminal.panel import TrainingPanel, training_panel
from mlip_cli.train.facts import cautions, facts, preflight, resume_facts
from mlip_cli.train.gradients import RandomState
from mlip_cli.train.journal import Journal, StallWarning
from mlip_cli.train.loop import Timetable, train
from mlip_cli.train.metrics import MetricsFile
from mlip_cli.train.micro_batches import chosen_micro_batch_size
from mlip_cli.train.resume import Saver, check_room, restore
from mlip_cli.train.setup import (
    TrainingData,
    build,
    build_stepper,
    compile_facts,
    num_workers,
    open_batches,
    open_data,
    plan_by_step,
    precision_cautions,
    training_device,
    with_usual_precision,
)
from mlip_cli.train.state import Progress, Training
from mlip_cli.train.trackers import opened_trackers

Keep = Callable[[int, Sequence[Answers]], None]
"""Called with the step and the answers of an evaluation that came to its end."""


def keep_nothing(step: int, answers: Sequence[Answers]) -> None:
    """For a training that compares nothing with step 0."""


def train_run(recipe: Recipe, start: Start) -> Run:
    """Train by `recipe`. Mistakes in it or in the data show before the run folder is touched."""
    device = training_device(recipe)
    with process_group(device):
        run = Run(Path(from_main(str(start.run.folder))))
        data = open_data(recipe)
        wait_for_ranks()  # some machines may have copied or indexed data first, here and below
        lines = preflight(data.datasets, data.order, world_size())
        checkpoint = shared_checkpoint(run, resumes=start.resumes)
        if checkpoint is not None:
            recipe = with_tokenizer(with_begun_precision(recipe, run), run.tokenizer)
        recipe = with_usual_precision(recipe, has_units=all(from_all(has_units_for_bf16(device))))
        training, init = build(recipe, device, fresh=checkpoint is None)
        progress, random = Progress(), None
        if checkpoint is not None:
            progress, random = restore(checkpoint, training, data=data.fingerprints)
        tokenizer = Tokenizer.of(recipe.model.text)
        pairs = validation_pairs(recipe, tokenizer, device=device, beside=data.datasets)
        wait_for_ranks()
        evaluators = training_evaluators(recipe, tokenizer, pairs, device=device)
        room = partial(check_room, run.checkpoints, training, recipe.train, steps=data.total_steps - progress.step)
        if checkpoint is None:
            room()
        if start.is_named_by_us:
            run = Run(Path(from_main(str(claimed(run.folder)) if is_main() else "")))

        with (
            reported(run),
            recorded(run, recipe, device=device, fingerprints=data.fingerprints, step=progress.step),
        ):
            if checkpoint is not None:
                room()
            say(f"run folder: {run.folder}")
            of_model = facts(recipe, training.plain, data.total_steps)
            for line in [
                *lines,
                *init.facts,
                *of_model,
                *compile_facts(recipe, device),
                *resume_facts(start, progress.step),
            ]:
                say(line)
            warned = cautions(recipe, training.plain.training_plan, data.total_steps)
            for line in [*init.cautions, *warned, *precision_cautions(recipe, device)]:
                warn(line)
            if is_main():
                write_json(run.data_cards, data_cards(data.datasets, pairs.datasets if pairs is not None else []))
            run_loop(run, recipe, data, training, progress, evaluators=evaluators, random=random)
            if pairs is not None:
                show_pairs(run, training, pairs, step=progress.step)
            for line in ending_lines(run) if is_main() else ():
                say(line)
    return run


def shared_checkpoint(run: Run, *, resumes: bool) -> Path | None:
    """The checkpoint that rank 0 resumes from, on every rank, whatever this rank sees; None: a new run.

    Raises:
        UsageError: another rank does not see it.
    """
    newest = run.latest_checkpoint() if resumes else None
    chosen = from_main(str(newest or ""))
    if chosen and not Path(chosen).is_dir():
        raise UsageError(
            f"{chosen}: rank 0 resumes from this checkpoint, and rank {rank()} does not see it; keep run folders on a "
            "disk that all nodes share"
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
    config, log = recipe.train, recipe.log
    batches = open_batches(
        recipe,
        data.datasets,
        data.order,
        steps=range(progress.step, data.total_steps),
        num_workers=num_workers(recipe),
        pin_memory=training.device.type == "cuda",
    )
    wait_for_ranks()
    share = config.global_batch_size // world_size()
    micro_batch_size = chosen_micro_batch_size(recipe, training, progress, share=share)
    with (
        opened_trackers(
            log if is_main() else Log(), run, config=recipe.model_dump(mode="json"), step=progress.step
        ) as trackers,
        closing(batches),  # type: ignore[type-var]
        training_panel(
            data.total_steps, line_every=log.every_steps, steps_per_epoch=data.order.steps_per_epoch
        ) as panel,
        batch_named(MICRO_BATCHES, min(share, micro_batch_size or share), note=memory_note(recipe)),
    ):
        metrics = MetricsFile(run.metrics if is_main() else None)
        metrics.cut_back(progress.step, measured_step=progress.measured_step)
        for line in read_metrics(run.metrics)[0] if is_main() else []:
            panel.recall(line)
        if random is not None:
            random.restore(training.device)
        train(
            build_stepper(training, recipe, total_steps=data.total_steps, micro_batch_size=micro_batch_size),
            batches,
            progress,
            timetable=Timetable(
                data.total_steps, log.every_steps, recipe.evaluate.every_steps, recipe.evaluate.at_start
            ),
            plan_of=plan_by_step(recipe.model.merging, training.plain, data.total_steps),
            evaluate=partial(measure, training, evaluators, panel, keep=keeper(run, recipe)),
            saver=Saver(
                run.checkpoints, config, training, data=data.fingerprints, best_metric=recipe.evaluate.best_metric
            ),
            journal=Journal(metrics, panel, trackers, stall=stall_warning(recipe)),
        )


def keeper(run: Run, recipe: Recipe) -> Keep:
    """What keeps the answers of evaluations, for a comparison with step 0, if that is measured."""
    if recipe.evaluate.at_start and is_main():
        return partial(keep_answers, run)
    return keep_nothing


def stall_warning(recipe: Recipe) -> StallWarning | None:
    """The warning for a global contrastive loss; None: the recipe has another one."""
    term = recipe.losses.spatial_global
    if term is None or term.kind != "infonce":
        return None
    patience = 2 * max(recipe.optim.warmup_steps, 50)
    return StallWarning(recipe.train.global_batch_size, patience, recipe.log.every_steps)


def memory_note(recipe: Recipe) -> str:
    """What smaller micro-batches change, for the message about full memory."""
    drawn = drawn_by_forward_passes(recipe)
    return ", which gives the same gradient" if drawn is None else f" in a new run: it changes what {drawn} draws"


@contextmanager
def reported(run: Run) -> Iterator[None]:
    """Write the run's page at its end, after the last step, a stop or a failure; a stop says where the run is saved."""
    try:
        yield
    except (Stopped, RunError) as error:
        with suppress(OSError, RunError):  # on a full disk the first error is the one to show
            if run.recipe.is_file():  # a page alone would make the folder one that is not a run's
                rebuild(run)
        if isinstance(error, Stopped):
            raise Stopped(f"{error}, saved in {run.folder}", exit_code=error.exit_code) from None
        raise
    rebuild(run)


def show_pairs(run: Run, training: Training, pairs: ValidationPairs, *, step: int) -> None:
    """Write the gallery of validation pairs into the run folder; all ranks take part."""
    with training.as_measured() as encoder, evaluation_memory_named("the gallery"):
        found = find_pairs(encoder, pairs)
    if is_main():
        write_gallery(run, found, pairs, step=step, true_rate=training.plain.plan.rate)


def evaluation_memory_named(work: str) -> AbstractContextManager[None]:
    """Name the cure if an evaluation does not fit beside the training."""
    return full_memory_named(
        work,
        f"{BATCH_SIZE} pictures at once beside the training",
        "take a smaller model, or leave it out of evaluate.zeroshot or data.validation and measure it afterwards",
    )


def measure(
    training: Training,
    evaluators: list[Evaluator],
    panel: TrainingPanel,
    step: int,
    is_stopping: Callable[[], bool],
    *,
    keep: Keep = keep_nothing,
) -> dict[str, float] | None:
    """All measures of the model, without gradients; all ranks share the work and get the result.

    None if a signal asked any rank to stop meanwhile. An error on one rank is raised on all.
    """
    measures: dict[str, float] = {}
    answers: list[Answers] = []
    try:
        with torch.no_grad(), training.as_measured() as encoder:
            for evaluator in evaluators:
                with evaluation_memory_named(f"step {step}: evaluating {evaluator.name}"):
                    found = evaluator.measure(encoder, on_batch_of(evaluator, panel, is_stopping))
                panel.measured(step, evaluator.name, found.words, headline=headline_of(evaluator, found))
                measures |= found.values
                answers += found.answers
    except EvaluationStopped:
        warn(f"step {step}: the evaluation was stopped before its end, and its measures are not written")
        return None
    panel.doing(None)
    keep(step, answers)
    return measures


def headline_of(evaluator: Evaluator, found: Measures) -> Headline | None:
    """The score that the panel follows: openmoji_mean_recall -> openmoji mean recall."""
    metric = evaluator.headline
    if metric is None:
        return None
    words = re.sub(r" r(\d+)$", r" R@\1", metric.replace("_", " "))
    return Headline(metric, words, found.values[metric], found.chances.get(metric))


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
