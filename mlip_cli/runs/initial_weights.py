"""`model.init`: the weights that a new run starts from, those of another run or those of a file by OpenCLIP's names."""

import difflib
import json
import math
import pickle
import re
import shlex
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from mlip_cli.data.packages import package_folder
from mlip_cli.errors import UsageError
from mlip_cli.model.clip import CLIP
from mlip_cli.model.frequency import regrid_kernel
from mlip_cli.model.open_clip import ONLY_OURS, as_yaml, from_open_clip, model_section
from mlip_cli.recipe.config import LOSS_NAMES, Recipe
from mlip_cli.recipe.init_source import OpenClipFile
from mlip_cli.recipe.load import differences
from mlip_cli.recipe.merge_plan import stem_depth
from mlip_cli.runs.checkpoint import load_weights
from mlip_cli.runs.folder import Run
from mlip_cli.runs.loading import load_into
from mlip_cli.runs.start import find_init

NO_FORM = ("model.text.dropout", "model.vision.drop_path")
"""Keys that a run may change although it starts from the weights of another."""

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

POSITIONS = "vision.trunk.pos_embed"


@dataclass(frozen=True)
class InitNotes:
    """What a user is told of a start from weights."""

    facts: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()


def check_initial(recipe: Recipe) -> OpenClipFile | Path:
    """The weights that `model.init` names, after a check that their model has the recipe's form. Reads no weights.

    Raises:
        UsageError: no such weights, or those of another architecture; the message names the keys that differ.
    """
    assert recipe.model.init is not None
    source = find_init(recipe.model.init)
    has_stem = stem_depth(recipe.model.frequency) > 0
    if isinstance(source, OpenClipFile):
        place = f"open_clip:{source.architecture}"
        configuration = open_clip_configuration(source.architecture)
        section = model_section(configuration, source=f"model.init: {place}")
        other = recipe.model_copy(update={"model": section})
        size = configuration["vision_cfg"].get("image_size", 224)
        lines = as_yaml(section, with_frequency=has_stem)
        cure = f"use {lines} (its own data.image_size is {size}; for others the positions are resampled)"
    else:
        place, run = str(source), Run(source.parent.parent)
        other = run.read_recipe()
        cure = f"take these values from {run.recipe}, or set model.init to null"
    decide = ["model.embed_dim", "model.vision", "model.text"]
    stages = recipe.model.frequency, other.model.frequency
    if all(stages) or has_stem or stem_depth(other.model.frequency):
        decide.append("model.frequency")
    wrong = [
        f"{key} {json.dumps(mine)} (there {json.dumps(theirs)})"
        for key, theirs, mine in differences(other, recipe)
        if key not in NO_FORM and any(key == own or key.startswith(f"{own}.") for own in decide)
    ]
    if wrong:
        raise UsageError(f"model.init: {place} does not fit the recipe: {'; '.join(wrong)}; {cure}")
    return source


def load_initial(model: CLIP, recipe: Recipe) -> InitNotes:
    """Load the weights that `model.init` names into `model`, and say what they leave open.

    Parts that the weights lack (frequency branch, heads and scales of losses) keep their random values, and parts that
    the model lacks are ignored. Positions and global filters are brought to the grid of the recipe's image size.

    Raises:
        UsageError: no such weights, damaged ones, or those of another architecture.
    """
    source = check_initial(recipe)
    own = model.state_dict()
    facts = [f"model.init: weights of {source}"]
    if isinstance(source, OpenClipFile):
        path = Path(source.file)
        weights = from_open_clip(read_weights(path), source=source.file)
        if recipe.model.text.activation == "gelu":
            facts.append(
                f"model.init: {source.architecture} uses GELU; OpenAI's weights need QuickGELU, as in "
                "ViT-B-32-quickgelu; a file does not say which one it was trained with"
            )
    else:
        path = source
        weights = load_weights(path)
    cautions: list[str] = []
    for name, note, is_lossy in _regridded(weights, model):
        (cautions if is_lossy else facts).append(f"model.init: {name} {note}")
    anew = _without_other_kinds(own, weights)
    facts += [f"model.init: losses.{name} is another kind of loss there, so its scale starts anew" for name in anew]
    missing, ignored = _other_parts(own, weights)
    random = [part for part in missing if part.rpartition(".")[2] not in anew]
    if random:
        facts.append(f"model.init: the weights have no {', '.join(random)}; these parts start from random values")
    if ignored:
        cautions.append(f"model.init: these weights are ignored, as the recipe has no such parts: {', '.join(ignored)}")
    matched = {name: tensor for name, tensor in weights.items() if _part(name) not in ignored}
    load_into(model, {name: own[name] for name in own if _part(name) in missing} | matched, path)
    return InitNotes(tuple(facts), tuple(cautions))


def open_clip_configuration(name: str) -> dict[str, Any]:
    """A configuration of the installed OpenCLIP, read from its file: importing OpenCLIP takes seconds.

    Raises:
        UsageError: OpenCLIP has no configuration of this name.
    """
    files = {path.stem: path for path in (package_folder("open_clip") / "model_configs").glob("*.json")}
    if name not in files:
        close = ", ".join(difflib.get_close_matches(name, files, 3)) or "ViT-B-32-quickgelu"
        raise UsageError(f"model.init: OpenCLIP has no architecture {name!r}; names look like {close}")
    return json.loads(files[name].read_text())


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
            f"{_program(EXTRACT_TORCHSCRIPT, file)}"
        )
    try:
        with torch.serialization.safe_globals([(_NotRead, name) for name in NOT_READ]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused(file, str(error)) from None
    except (RuntimeError, EOFError, OSError) as error:
        raise UsageError(f"{file}: not a whole PyTorch file ({type(error).__name__}); download it again") from error
    weights = _state_dict(content)
    if weights is None:
        keys = ", ".join(map(repr, PLACES_OF_WEIGHTS))
        raise UsageError(f"{file}: no state dict (names and tensors), neither alone nor under {keys}; save one")
    return weights


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
    return f"python -c {shlex.quote(filled)}"


def _is_torchscript(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _regridded(weights: dict[str, Tensor], model: CLIP) -> Iterator[tuple[str, str, bool]]:
    """Bring positions and global filters in `weights` to the model's grid: (name, what was done, is it lossy)."""
    grid, own = model.vision.grid, model.state_dict()
    for name, stored in weights.items():
        tensor = stored.float()  # resampling in half precision would lose digits
        if name not in own or own[name].shape == tensor.shape or own[name].shape[-1] != tensor.shape[-1]:
            continue
        if name == POSITIONS:
            num_prefix = own[name].shape[1] - model.vision.num_patches
            side = math.isqrt(tensor.shape[1] - num_prefix)
            if side**2 + num_prefix != tensor.shape[1]:
                continue  # a tower with other prefix tokens, which load_into refuses
            weights[name] = resample_abs_pos_embed(tensor, list(grid), [side, side], num_prefix)
            yield name, f"resampled from {side} x {side} to {grid[0]} x {grid[1]} patches", False
        elif name.endswith(".kernel"):
            weights[name], lost = regrid_kernel(tensor, grid)
            size = f"from {tensor.shape[0]} x {tensor.shape[1]} to {grid[0]} x {grid[1]} patches"
            yield name, f"{size}, {lost:.1%} of its energy lost", lost > 0


def _without_other_kinds(own: dict[str, Tensor], weights: dict[str, Tensor]) -> list[str]:
    """Remove scale and bias of losses of another kind than in `own` from `weights`; return the names of these losses.

    Only a sigmoid loss has a bias, and the scales of the two kinds differ in size.
    """
    scaled = [name for name in LOSS_NAMES if f"log_scales.{name}" in own.keys() & weights.keys()]
    anew = [name for name in scaled if (f"logit_biases.{name}" in own) != (f"logit_biases.{name}" in weights)]
    for name in anew:
        weights.pop(f"log_scales.{name}")
        weights.pop(f"logit_biases.{name}", None)
    return anew


def _other_parts(own: dict[str, Tensor], weights: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Parts that the weights lack and parts that the model lacks, among those that OpenCLIP does not have."""
    ours, theirs = ({_part(name): None for name in names if name.startswith(ONLY_OURS)} for names in (own, weights))
    return [part for part in ours if part not in theirs], [part for part in theirs if part not in ours]


def _part(name: str) -> str:
    """frequency.blocks.0.norm1.weight -> frequency, token_projections.text.weight -> token_projections.text"""
    words = name.split(".")
    return ".".join(words[:2]) if words[0] in ("token_projections", "log_scales", "logit_biases") else words[0]
