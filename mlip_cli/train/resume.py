"""Save a running training as a checkpoint, and restore it to the bit."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mlip_cli.distributed import from_all, full_on_main, parallel, rank, sharded_like, world_size
from mlip_cli.errors import UsageError
from mlip_cli.files import free_bytes
from mlip_cli.recipe.config import Train
from mlip_cli.runs.checkpoint import (
    TRAINING_WEIGHTS,
    WEIGHTS,
    damaged,
    load_state,
    load_weights,
    remove_old_checkpoints,
    save_checkpoint,
)
from mlip_cli.runs.folder import STATE, whole_checkpoints
from mlip_cli.runs.moved_data import changed_data
from mlip_cli.terminal.output import is_main, size_in_words, warn
from mlip_cli.train.gradients import RandomState
from mlip_cli.train.state import Progress, Training

KEYS = {"progress", "optimizer", "scaler", "random", "data", "environment"}
"""What the state of a checkpoint holds."""


def environment(training: Training) -> dict[str, Any]:
    """Other things that a bit-exact resume depends on."""
    return {
        "torch": str(torch.__version__),  # a subclass of str, which plain loading refuses
        "device": training.device.type,
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "ranks": world_size(),
        "parallel": parallel(training.model),
        "decoder": training.decoder,
    }


class Saver:
    """Writes the checkpoints of a training, on rank 0."""

    def __init__(
        self, folder: Path, config: Train, training: Training, *, data: dict[str, str], best_metric: str | None
    ) -> None:
        self.folder = folder
        self.config = config
        self.training = training
        self.data = data
        self.best_metric = best_metric
        self.last_saved_s = time.monotonic()

    def note_best(self, progress: Progress, measures: dict[str, float]) -> None:
        """Note a measure that is one of the best, if the recipe keeps the best checkpoints."""
        if self.best_metric is not None and self.config.keep.best is not None:
            progress.note_best(self.best_metric, measures[self.best_metric], keep=self.config.keep.best)

    def is_due(self, progress: Progress) -> bool:
        """Whether the newest step is to be saved: by its number or its measure, so the same on all ranks."""
        every = self.config.checkpoint_every.steps
        step = progress.step
        return progress.is_best or (every is not None and step > 0 and step % every == 0)

    def is_time(self) -> bool:
        """Whether this rank's clock says that a checkpoint is due."""
        minutes = self.config.checkpoint_every.minutes
        return minutes is not None and time.monotonic() - self.last_saved_s >= 60 * minutes

    def save(self, progress: Progress) -> None:
        """Write a checkpoint and remove those that the recipe does not keep; all ranks take part.

        Raises:
            RunError, OSError: the checkpoint could not be written; earlier ones are untouched.
        """
        training = self.training
        random = asdict(RandomState.read(training.device))
        everyone: list[Any] = [None] * world_size()
        if world_size() > 1:
            dist.gather_object(random, everyone if is_main() else None)
        else:
            everyone = [random]
        optimizer = full_on_main(training.optimizer.state_dict())
        weights = full_on_main(training.plain.state_dict())
        averages = {} if training.average is None else training.average.weights()
        if is_main():
            state = {
                "progress": asdict(progress),
                "optimizer": optimizer,
                "scaler": training.precision.scaler.state_dict(),
                "random": everyone,
                "data": self.data,
                "environment": environment(training),
            }
            save_checkpoint(
                self.folder,
                step=progress.step,
                weights=weights | averages,
                state=state,
                training_weights={name: weights[name] for name in averages},
            )
            keep = self.config.keep
            best = [step for _, step in progress.best[: keep.best or 0]]
            remove_old_checkpoints(self.folder, last=keep.last, every_steps=keep.every_steps, also=best)
        self.last_saved_s = time.monotonic()


def checkpoint_bytes(training: Training) -> int:
    """About how much a checkpoint takes on disk."""
    plain = training.plain
    weights = sum(tensor.numel() * tensor.element_size() for tensor in plain.state_dict().values())
    trained = sum(p.numel() * p.element_size() for p in plain.parameters() if p.requires_grad)
    return weights + (0 if training.average is None else trained) + 2 * trained  # AdamW keeps two moments


def check_room(folder: Path, training: Training, config: Train, *, steps: int) -> None:
    """Check that a checkpoint fits on the disk, and warn if those that the recipe keeps do not; all ranks take part.

    Args:
        folder: of the checkpoints; those that it holds already are counted.
        steps: those still to be taken.

    Raises:
        UsageError: not one more fits.
    """
    size, keep, every = checkpoint_bytes(training), config.keep, config.checkpoint_every
    free, num_present = from_all((free_bytes(folder), len(whole_checkpoints(folder))))[0]
    is_free = f"{size_in_words(free)} are free on this disk"
    if free < size:
        cure = "make room and go on with --resume" if num_present else "make room, or name another --out"
        raise UsageError(f"{folder}: a checkpoint takes about {size_in_words(size)}, and {is_free}; {cure}")
    still = steps if every.minutes is not None or every.steps is None else steps // every.steps + 1
    kept = keep.last + (keep.best or 0) + (0 if keep.every_steps is None else steps // keep.every_steps)
    needed = size * min(still, kept + 1 - num_present)  # one goes when the next one is whole
    if is_main() and free < needed:
        warn(
            f"{folder}: the checkpoints that train.keep asks for take about {size_in_words(needed)}, and {is_free}; "
            "make room, or keep fewer"
        )


def restore(checkpoint: Path, training: Training, *, data: dict[str, str]) -> tuple[Progress, RandomState | None]:
    """Load weights, optimiser and scaler of `checkpoint`; return the progress and the random state of this rank.

    The random state is None with another number of ranks: their random streams did not exist before.

    Raises:
        UsageError: the checkpoint is damaged, or the data has changed since.
    """
    state = load_state(checkpoint)
    missing = KEYS - state.keys()
    if missing:
        raise damaged(checkpoint / STATE, f"not the state of a training (no {', '.join(sorted(missing))})")
    changed = changed_data(list(state["data"].items()), list(data.items()))
    if changed:
        raise UsageError(
            f"{checkpoint}: the data has changed since: {changed}; restore it, or start a new run with "
            f"model.init={checkpoint}"
        )
    weights, own = load_weights(checkpoint), training.plain.state_dict()
    if training.average is not None:
        training.average.load(weights)
        weights |= load_weights(checkpoint, TRAINING_WEIGHTS)
    if {name: tensor.shape for name, tensor in weights.items()} != {name: own[name].shape for name in own}:
        raise damaged(checkpoint / WEIGHTS, "weights of another model")
    training.plain.load_state_dict({name: sharded_like(weights[name], own[name]) for name in weights})
    training.optimizer.load_state_dict(sharded_state(state["optimizer"], training.optimizer))
    training.precision.scaler.load_state_dict(state["scaler"])
    here = environment(training)
    different = [f"{name} {old} -> {here[name]}" for name, old in state["environment"].items() if old != here[name]]
    if different:
        warn(f"resuming in another environment ({', '.join(different)}): results may differ in the last bits")
    random = RandomState(**state["random"][rank()]) if len(state["random"]) == world_size() else None
    return Progress(**state["progress"]), random


def sharded_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A whole optimiser state in the form of `optimizer`: the moments of a sharded parameter are sharded like it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        number: {name: sharded_like(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": moments}
