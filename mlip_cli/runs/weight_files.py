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
        extracted = str(file.with_suffix(".weights.pt"))
        program = f"import torch; torch.save(torch.jit.load({str(file)!r}, 'cpu').state_dict(), {extracted!r})"
        raise UsageError(
            f"{file}: a TorchScript archive, which is a program; if you trust it, extract its weights with: "
            f"python -c {shlex.quote(program)}"
        )
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UsageError(
            f"{file}: not a file of tensors and plain values, but a Git LFS pointer, a web page, or a pickle that "
            "could run any program; download the weights, or save the state dict alone"
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        raise UsageError(f"{file}: not a whole PyTorch file ({type(error).__name__}); download it again") from error
    weights = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise UsageError(f"{file}: no state dict (names and tensors), neither alone nor as `state_dict`; save one")
    return weights


def _is_torchscript(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())
