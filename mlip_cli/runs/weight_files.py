"""Files of weights that other programs wrote. Nothing in them is ever run."""

import json
import pickle
import re
import shlex
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mlip_cli.errors import UsageError

PLACES_OF_WEIGHTS = ("state_dict", "model_state_dict", "model", "module")
"""Keys of a checkpoint, whose value is a state dict, or a checkpoint again."""

NOT_READ = (
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray", "_codecs.encode"),
)
"""Names in pickles of NumPy's numbers, which stand beside the weights in some checkpoints."""

EXTRACT = (
    'import torch; x = torch.load({file}, "cpu", weights_only=False); '
    "x = next((x[key] for key in {keys} if key in x), x) if isinstance(x, dict) else x; "
    'torch.save(x.state_dict() if hasattr(x, "state_dict") else x, {extracted})'
)
EXTRACT_TORCHSCRIPT = 'import torch; torch.save(torch.jit.load({file}, "cpu").state_dict(), {extracted})'
"""Programs that extract the weights of files which are programs themselves."""


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
    if file.suffix == ".npz":
        raise UsageError(f"{file}: arrays of NumPy, by JAX's names; take timm's file of these weights")
    if _is_torchscript(file):
        raise UsageError(
            f"{file}: a TorchScript archive, which is a program; if you trust it, extract its weights with: "
            f"{_program(EXTRACT_TORCHSCRIPT, file)}"
        )
    try:
        with torch.serialization.safe_globals([(_NotRead, name) for name in NOT_READ]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused(file, str(error)) from None
    except Exception as error:  # torch raises another type for every kind of damage
        raise UsageError(f"{file}: not a whole PyTorch file ({type(error).__name__}); download it again") from error
    weights = _state_dict(content)
    if weights is None:
        keys = ", ".join(map(repr, PLACES_OF_WEIGHTS))
        raise UsageError(f"{file}: no state dict (names and tensors), neither alone nor under {keys}; save one")
    return weights


def differing(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """Tensors of `given` that a model with the tensors `own` has not, or in another shape, and those that it lacks."""
    mine, theirs = ({name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (own, given))
    return [
        f"{name} {theirs.get(name, 'missing')} (expected {mine.get(name, 'none')})"
        for name in sorted(mine.keys() | theirs.keys())
        if mine.get(name) != theirs.get(name)
    ]


def check_finite(weights: Mapping[str, Tensor], *, source: str) -> None:
    """Check that no weight is NaN or infinite.

    Raises:
        UsageError: one is; the message begins with `source`.
    """
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        raise UsageError(f"{source}: {broken[0]} holds NaN or infinity; use another copy of the weights")


class _NotRead:
    """Takes the place of NumPy's values, which are numbers beside the weights: nothing is done with them."""

    def __init__(self, *content: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def _state_dict(content: object) -> dict[str, Tensor] | None:
    """The names and tensors in what torch has read, itself or under a key of `PLACES_OF_WEIGHTS`, or None."""
    if not isinstance(content, dict) or not content:
        return None
    if all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()):
        return content
    found = (_state_dict(content.get(key)) for key in PLACES_OF_WEIGHTS)
    return next((weights for weights in found if weights is not None), None)


def _refused(file: Path, reason: str) -> UsageError:
    """The error of a file that torch does not read as tensors and plain values."""
    foreign = re.search(r"GLOBAL (\S+)", reason)
    with open(file, "rb") as opened:
        is_pickle = opened.read(1) == b"\x80"
    if foreign is None and is_pickle:
        return UsageError(
            f"{file}: a pickle that torch did not write, which could run any program; save its weights as safetensors"
        )
    if foreign is None:
        return UsageError(
            f"{file}: not a file of tensors and plain values, but a Git LFS pointer, a web page, or another file; "
            "download the weights"
        )
    return UsageError(
        f"{file}: not a file of tensors and plain values alone: it holds {foreign[1]}, so it is a whole module, or a "
        "pickle that could run any program; if you trust it, extract its weights with: "
        f"{_program(EXTRACT, file)}"
    )


def _program(program: str, file: Path) -> str:
    """A command to copy; double quotes inside it, so that it needs no others than the shell's."""
    names = {"file": str(file), "extracted": str(file.with_suffix(".weights.pt")), "keys": PLACES_OF_WEIGHTS}
    filled = program.format(**{name: json.dumps(value, ensure_ascii=False) for name, value in names.items()})
    return f"{shlex.quote(sys.executable)} -c {shlex.quote(filled)}"


def _is_torchscript(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())
