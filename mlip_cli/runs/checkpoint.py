"""Checkpoints: folders that are whole or absent. Weights are safetensors; torch loads the rest as plain data."""

import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlip_cli.errors import UsageError
from mlip_cli.files import full_disk_named, remove, sync_folder, temporary_path, write_json
from mlip_cli.runs.folder import ORIGIN, STATE, checkpoint_folders, checkpoint_name, mark_of, step_of, whole_checkpoints
from mlip_cli.terminal.output import warn

WEIGHTS = "model.safetensors"
TRAINING_WEIGHTS = "training.safetensors"
"""With averaging, the raw weights that a resumed run needs; `model.safetensors` has the averaged ones."""


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    weights: dict[str, Tensor],
    state: dict[str, Any] | None = None,
    origin: dict[str, Any] | None = None,
    training_weights: dict[str, Tensor] | None = None,
) -> None:
    """Write folder/step_NNNNNNN under a temporary name, sync it and rename it.

    A failure leaves the earlier checkpoints and no half of this one.

    Args:
        state: of a training that can go on.
        origin: where the weights come from, if no training of this run made them; one of the two is given.

    Raises:
        RunError: the disk is full.
        OSError: the checkpoint could not be written for another reason.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / checkpoint_name(step)
    temporary = temporary_path(final)
    is_first = not whole_checkpoints(folder)
    cure = "make room and start again: no checkpoint was saved yet" if is_first else "make room and go on with --resume"
    try:
        with full_disk_named(final, cure):
            temporary.mkdir()
            parts = {WEIGHTS: weights} | ({TRAINING_WEIGHTS: training_weights} if training_weights else {})
            _write_parts(temporary, final, parts=parts, state=state, origin=origin)
            sync_folder(temporary)
            aside = folder / f".{final.name}.old.tmp"
            if os.path.lexists(final):
                os.replace(final, aside)
            os.replace(temporary, final)
            sync_folder(folder)
            _delete(aside)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_parts(
    temporary: Path,
    final: Path,
    *,
    parts: dict[str, dict[str, Tensor]],
    state: dict[str, Any] | None,
    origin: dict[str, Any] | None,
) -> None:
    """Write and sync all files; errors of torch and safetensors become the system's own errors again."""
    try:
        for part, weights in parts.items():
            save_file({name: tensor.detach().contiguous() for name, tensor in weights.items()}, temporary / part)
        if state is not None:
            with open(temporary / STATE, "wb") as file:  # given a path, torch would hide the reason of a failure
                torch.save(state, file)
        if origin is not None:
            write_json(temporary / ORIGIN, origin)
        mark = mark_of(temporary)
        assert mark is not None, "neither a state nor an origin"
        mode = mark.stat().st_mode
        for path in temporary.iterdir():
            path.chmod(mode)  # safetensors hides its files from everybody else
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    except (RuntimeError, SafetensorError) as error:
        number = _system_error(error)
        if number is not None:
            raise OSError(number, os.strerror(number), str(final)) from error
        raise OSError(f"{final}: the checkpoint could not be written: {str(error).splitlines()[0]}") from error


def _system_error(error: BaseException) -> int | None:
    """The errno behind an error: torch raises while it handles the system's error, safetensors names the number."""
    if isinstance(error.__context__, OSError):
        return error.__context__.errno
    named = re.search(r"\(os error (\d+)\)", str(error))
    return int(named[1]) if named else None


def remove_old_checkpoints(folder: Path, *, last: int, every_steps: int | None, also: Collection[int] = ()) -> None:
    """Keep the newest `last` checkpoints, those at multiples of `every_steps`, and those of the steps in `also`.

    What is not whole is not counted, and goes if it is older than these. A link goes, and its target stays. Folders
    with other names stay.
    """
    kept = whole_checkpoints(folder)[-last:]
    for path in checkpoint_folders(folder):
        is_old = bool(kept) and step_of(path) < step_of(kept[0])
        if is_old and not (every_steps and step_of(path) % every_steps == 0) and step_of(path) not in also:
            half = temporary_path(path)
            os.replace(path, half)  # a kill while it is deleted leaves nothing that looks like a checkpoint
            _delete(half)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process had not finished to write or to delete; what it was replacing stays."""
    for aside in folder.glob(".step_*.old.tmp"):
        replaced = folder / aside.name.removeprefix(".").removesuffix(".old.tmp")
        if not os.path.lexists(replaced):
            os.replace(aside, replaced)
    for path in folder.glob(".step_*.tmp"):
        _delete(path)


def _delete(path: Path) -> None:
    """Delete what no longer looks like a checkpoint; where that fails the training goes on, and the next one tries."""
    try:
        remove(path)
    except OSError as error:  # such as a file that another machine reads on a network disk
        warn(f"{path}: could not be deleted ({error.strerror}); the next mlip pretrain in this run tries it again")


def load_weights(checkpoint: Path, name: str = WEIGHTS) -> dict[str, Tensor]:
    """Weights of a checkpoint folder, on the CPU: those to evaluate, or with `TRAINING_WEIGHTS` the raw ones.

    Raises:
        UsageError: the folder is not a checkpoint of mlip, it is damaged, or it has no file `name`.
    """
    path = _part(checkpoint, name)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise damaged(path, f"not a whole safetensors file ({error})") from None


def load_state(checkpoint: Path) -> dict[str, Any]:
    """Everything but the weights, as plain data.

    Raises:
        UsageError: the folder is not a checkpoint of mlip, or it is damaged.
    """
    path = _part(checkpoint, STATE)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises another type for every kind of damage
        raise damaged(path, f"not a whole checkpoint ({type(error).__name__})") from error
    if not isinstance(state, dict):
        raise damaged(path, f"not a state ({type(state).__name__})")
    return state


def _part(checkpoint: Path, name: str) -> Path:
    path = checkpoint / name
    if not path.is_file():
        raise UsageError(f"{checkpoint}: not a checkpoint (no {name} inside); name a run folder or a checkpoint")
    return path


def damaged(path: Path, what: str) -> UsageError:
    """The error of a file of a checkpoint."""
    return UsageError(f"{path}: {what}; remove {path.parent}, and mlip takes the checkpoint before it")
