"""Weights that others wrote: safetensors files, or what torch saved. Nothing in a file is run."""

import pickle
import shlex
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mlip_cli.errors import UsageError


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a state dict that torch saved, alone or inside a checkpoint.

    Raises:
        UsageError: a damaged file, a TorchScript archive, or a file that holds more than tensors; with the cure.
    """
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except SafetensorError as error:
            raise UsageError(f"{file}: not a whole safetensors file ({error}); download it again") from None
    if _is_torchscript(file):
        raise UsageError(
            f"{file}: a TorchScript archive, which is a program; if you trust it, extract its weights with: "
            + _save_command(file, "torch.jit.load({}, map_location='cpu').state_dict()")
        )
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        if not _is_of_torch(file):
            raise UsageError(
                f"{file}: not a PyTorch file (a Git LFS pointer or a web page?); download the weights"
            ) from None
        raise UsageError(
            f"{file}: holds more than tensors and plain values, which could run any program; if you trust it, extract "
            "its weights with: "
            + _save_command(file, "(lambda c: c.get('state_dict', c))(torch.load({}, 'cpu', weights_only=False))")
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        raise UsageError(f"{file}: not a whole PyTorch file ({type(error).__name__}); download it again") from error
    weights = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise UsageError(f"{file}: no state dict (names and tensors), neither alone nor as `state_dict`; save one")
    return weights


def _is_of_torch(file: Path) -> bool:
    """Whether the file begins as an archive does, or as a pickle of protocol 2 or later."""
    with open(file, "rb") as opened:
        return zipfile.is_zipfile(file) or opened.read(1) == b"\x80"


def _is_torchscript(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _save_command(file: Path, weights: str) -> str:
    """The shell command that writes `weights`, an expression with a place for the file's name, beside `file`."""
    program = f"import torch; torch.save({weights.format(repr(str(file)))}, {str(file.with_suffix('.weights.pt'))!r})"
    return f"python -c {shlex.quote(program)}"
