"""Checkpoints: a folder that is whole or absent. Weights as safetensors, the rest loadable with `weights_only=True`."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlip_cli.errors import UsageError
from mlip_cli.files import sync_folder
from mlip_cli.run_folder import STATE, checkpoint_folders, checkpoint_name, step_of

WEIGHTS = "model.safetensors"


def save_checkpoint(folder: Path, *, step: int, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write folder/step_NNNNNNN: temporary name, sync, rename.

    Raises:
        OSError: the disk is full, say; nothing half-written stays and earlier checkpoints are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / checkpoint_name(step)
    temporary = folder / f".{final.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir()
        save_file({name: tensor.detach().contiguous() for name, tensor in weights.items()}, temporary / WEIGHTS)
        torch.save(state, temporary / STATE)
        for path in temporary.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        sync_folder(temporary)
        aside = folder / f".{final.name}.old.tmp"
        if final.exists():
            os.replace(final, aside)
        os.replace(temporary, final)
        sync_folder(folder)
        shutil.rmtree(aside, ignore_errors=True)
    except (RuntimeError, SafetensorError) as error:
        # torch and safetensors do not say ENOSPC in one way; what they say is passed on with the place
        raise OSError(f"{final}: the checkpoint could not be written: {str(error).splitlines()[0]}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_old_checkpoints(folder: Path, *, last: int, every_steps: int | None) -> None:
    """Keep the newest `last` checkpoints and those at multiples of `every_steps`; other names are not ours."""
    for path in checkpoint_folders(folder)[:-last]:
        if not (every_steps and step_of(path) % every_steps == 0):
            shutil.rmtree(path)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process left of a checkpoint it had not finished."""
    for path in folder.glob(".step_*.tmp"):
        shutil.rmtree(path)


def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Weights of a checkpoint folder, on the CPU.

    Raises:
        UsageError: this is no checkpoint of mlip, or a damaged one.
    """
    path = _part(checkpoint, WEIGHTS)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise _damaged(path, f"not a whole safetensors file ({error})") from None


def load_state(checkpoint: Path) -> dict[str, Any]:
    """Everything but the weights, as plain data.

    Raises:
        UsageError: this is no checkpoint of mlip, or a damaged one.
    """
    path = _part(checkpoint, STATE)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises another type for every kind of damage
        raise _damaged(path, f"not a whole checkpoint ({type(error).__name__})") from error


def _part(checkpoint: Path, name: str) -> Path:
    path = checkpoint / name
    if not path.is_file():
        raise UsageError(f"{checkpoint}: not a checkpoint (no {name} inside); name a run folder or a checkpoint")
    return path


def _damaged(path: Path, what: str) -> UsageError:
    return UsageError(f"{path}: {what}; remove {path.parent}, and the one before it is taken")
