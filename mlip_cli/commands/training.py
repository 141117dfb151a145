"""Where data, model, objective and loop meet."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from mlip_cli.commands.evaluators import Evaluator, training_evaluators
from mlip_cli.commands.gallery import write_gallery
from mlip_cli.commands.loading import find_checkpoint, load_into
from mlip_cli.commands.recording import data_cards, recorded
from mlip_cli.commands.report import rebuild
from mlip_cli.commands.run_start import Start
from mlip_cli.commands.validation import validation_pairs
from mlip_cli.config import Recipe
from mlip_cli.data.dataset import ShardDataset, open_sources
from mlip_cli.data.loader import default_num_workers, preflight, training_loader
from mlip_cli.data.order import Order
from mlip_cli.data.tokenizer import Tokenizer
from mlip_cli.distributed import from_main, pick_device, process_group, rank, world_size, wrap
from mlip_cli.drawing import TrainingPanel, training_panel
from mlip_cli.errors import Stopped, UsageError
from mlip_cli.files import write_json
from mlip_cli.losses.objective import Objective
from mlip_cli.merge_plan import MOST_IN_ONE_MERGE, MergePlan
from mlip_cli.model.clip import CLIP, build_model, set_fused_attention
from mlip_cli.output import is_main, plural, say, warn
from mlip_cli.run_folder import Run, claimed
from mlip_cli.train.checkpoint import load_weights
from mlip_cli.train.gradients import Precision
from mlip_cli.train.loop import Progress, train
from mlip_cli.train.metrics import MetricsFile
from mlip_cli.train.optim import build_optimizer
from mlip_cli.train.resume import Saver, Training, restore
from mlip_cli.types import Batch


@dataclass(frozen=True)
class TrainingData:
    """The training set of a run, in its order."""

    datasets: list[ShardDataset]
    order: Order
    total_steps: int

    @property
    def fingerprints(self) -> dict[str, str]:
        """Folder -> fingerprint."""
        return {str(dataset.folder.resolve()): dataset.fingerprint for dataset in self.datasets}


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
    """Write the run's page at its end, be it the last step or a stop."""
    try:
        yield
    except Stopped:
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


def training_device(recipe: Recipe) -> torch.device:
    """The device of this rank.

    Raises:
        UsageError: PyTorch sees no such device, or it cannot train in the recipe's precision.
    """
    device = pick_device(recipe.train.device)
    if recipe.train.precision == "fp16" and device.type != "cuda":
        raise UsageError(
            f"train.precision: fp16 needs CUDA, and train.device {recipe.train.device} is {device.type} here; "
            "use bf16 or fp32"
        )
    return device


def open_data(recipe: Recipe) -> TrainingData:
    """Open the training shards and fix their order and the number of steps."""
    datasets = open_sources(recipe.data.train)
    order = Order(
        [dataset.num_samples for dataset in datasets],
        [source.weight for source in recipe.data.train],
        seed=recipe.seed,
        global_batch_size=recipe.train.global_batch_size,
    )
    if recipe.train.steps is not None:
        return TrainingData(datasets, order, recipe.train.steps)
    assert recipe.train.epochs is not None
    assert order.steps_per_epoch is not None
    return TrainingData(datasets, order, recipe.train.epochs * order.steps_per_epoch)


def build(recipe: Recipe, device: torch.device, *, fresh: bool) -> Training:
    """Model and optimiser on `device`; a fresh run starts from `model.init` where the recipe names one."""
    torch.manual_seed(recipe.seed)
    model = build_model(recipe)
    if fresh and recipe.model.init is not None:
        _, checkpoint = find_checkpoint(recipe.model.init)
        load_into(model, load_weights(checkpoint), checkpoint)
    set_fused_attention(model, device.type != "cpu")
    model.to(device)
    torch.manual_seed(recipe.seed + 1 + rank())  # dropout and drop path differ between ranks
    optimizer = build_optimizer(model, recipe.optim)
    return Training(wrap(model, device), optimizer, Precision.named(recipe.train.precision, device), device)


def open_batches(recipe: Recipe, data: TrainingData, device: torch.device, *, start_step: int) -> Iterator[Batch]:
    """This rank's share of every batch after `start_step`."""
    return training_loader(
        data.datasets,
        data.order,
        data=recipe.data,
        context_length=recipe.model.text.context_length,
        global_batch_size=recipe.train.global_batch_size,
        seed=recipe.seed,
        rank=rank(),
        world_size=world_size(),
        start_step=start_step,
        stop_step=data.total_steps,
        num_workers=num_workers(recipe),
        pin_memory=device.type == "cuda",
    )


def num_workers(recipe: Recipe) -> int:
    """The recipe's number of loader processes, or one made from cores and ranks."""
    return default_num_workers(world_size()) if recipe.data.num_workers is None else recipe.data.num_workers


def facts(recipe: Recipe, model: CLIP, total_steps: int) -> list[str]:
    """Lines about what was derived from the recipe."""
    parameters = sum(p.numel() for p in model.parameters())
    plan, loaders = model.plan, plural(num_workers(recipe), "loader process", "loader processes")
    lines = [
        f"{plural(parameters, 'parameter')}; {plural(total_steps, 'step')} with batches of "
        f"{recipe.train.global_batch_size:,} on {plural(world_size(), 'rank')}, {loaders} each, "
        f"{recipe.train.precision}"
    ]
    if plan.at:
        tokens = " ".join(map(str, plan.tokens))
        lines.append(f"merging ({plan.method}): patch tokens per block {tokens}, true rate {plan.rate:.3f}")
    return lines


def cautions(recipe: Recipe, plan: MergePlan, total_steps: int | None) -> list[str]:
    """What is allowed and probably not meant; `total_steps` is None where missing data leaves it open."""
    lines = []
    if plan.largest_merge > MOST_IN_ONE_MERGE:
        lines.append(
            f"one merge removes {plan.largest_merge:.0%} of the tokens and leaves guidance little to choose; add "
            "places to model.merging.at"
        )
    if total_steps is not None and recipe.optim.warmup_steps >= total_steps:
        lines.append(
            f"optim.warmup_steps {recipe.optim.warmup_steps} is not below the {plural(total_steps, 'step')} of the run:"
            " the learning rate only rises; lower it"
        )
    return lines


def resume_facts(start: Start, step: int) -> list[str]:
    """Lines about what goes on, and with which permitted changes."""
    if not start.resumes:
        return []
    changes = [f"changed since: {path}: {old} -> {new}" for path, old, new in start.changes]
    return [f"going on with {start.run.folder} after step {step:,}", *changes]


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
