"""Weights of other programs that are named in place of a RUN. No torch; `importing` makes a run of them."""

import difflib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlip_cli.data.packages import package_folder
from mlip_cli.errors import UsageError
from mlip_cli.files import read_object
from mlip_cli.recipe.architecture import Architecture, of_open_clip, of_transformers, with_preprocessing
from mlip_cli.recipe.init_source import open_clip_file

OPEN_CLIP_CONFIG, TRANSFORMERS_CONFIG = "open_clip_config.json", "config.json"
WEIGHTS_OF_OPEN_CLIP = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
WEIGHTS_OF_TRANSFORMERS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Foreign:
    """Weights of another program, and the architecture that it describes."""

    shown: str
    """As the user named it."""
    name: str
    """Start of the name of its run."""
    files: tuple[Path, ...]
    """The weights, in one file or in several."""
    architecture: Architecture
    configuration: str | None = None
    """Name of the configuration, where OpenCLIP has it; a folder brings its own."""
    tag: str | None = None
    """OpenCLIP's name of the weights, if the user gave it."""

    @property
    def folder(self) -> Path:
        """Where files beside the weights lie."""
        return self.files[0].parent


def find_foreign(target: str) -> Foreign | None:
    """What `target` names, if it is open_clip:ARCH:FILE, or a folder in the layout of OpenCLIP or of transformers.

    ARCH may be ARCH/TAG, with OpenCLIP's name of the weights, which says how they read pixels.

    None: something else, such as a run.

    Raises:
        UsageError: there is no such file or configuration, or its model has parts that mlip does not have.
    """
    file = open_clip_file(target)
    if file is not None:
        path = Path(file.file).absolute()
        if not path.is_file():
            raise UsageError(f"{path}: no such file; open_clip:ARCH:FILE reads a local file of weights")
        name, _, tag = file.architecture.partition("/")
        described = of_open_clip(open_clip_configuration(name), source=f"open_clip:{name}")
        return Foreign(target, name, (path,), described, name, tag or None)
    folder = Path(target).absolute()
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return _of_open_clip(folder, target)
    if (folder / TRANSFORMERS_CONFIG).is_file() and not (folder / "recipe.yaml").is_file():
        return _of_transformers(folder, target)
    return None


def open_clip_configuration(name: str) -> dict[str, Any]:
    """A configuration of the installed OpenCLIP, read from its file: importing OpenCLIP takes seconds.

    Raises:
        UsageError: OpenCLIP has no configuration of this name.
    """
    files = {path.stem: path for path in (package_folder("open_clip") / "model_configs").glob("*.json")}
    if name not in files:
        close = ", ".join(difflib.get_close_matches(name, files, 3)) or "ViT-B-32-quickgelu"
        raise UsageError(f"open_clip:{name}: OpenCLIP has no architecture {name!r}; names look like {close}")
    return json.loads(files[name].read_text())


def _of_open_clip(folder: Path, target: str) -> Foreign:
    place = folder / OPEN_CLIP_CONFIG
    content = read_foreign_object(place)
    configuration = content.get("model_cfg", content)
    if not isinstance(configuration, dict) or not isinstance(configuration.get("embed_dim"), int):
        raise UsageError(f"{place}: not a configuration of OpenCLIP (no model_cfg with embed_dim); fetch it again")
    with _misfits_named(place):
        architecture = of_open_clip(configuration, source=str(place))
        described = with_preprocessing(architecture, content.get("preprocess_cfg") or {})
    return Foreign(target, _name(folder), _weights(folder, WEIGHTS_OF_OPEN_CLIP), described)


def _of_transformers(folder: Path, target: str) -> Foreign:
    place, beside = folder / TRANSFORMERS_CONFIG, folder / "preprocessor_config.json"
    configuration, preprocessor = read_foreign_object(place), read_foreign_object(beside) if beside.is_file() else {}
    with _misfits_named(place):
        described = of_transformers(configuration, preprocessor, source=str(place))
    return Foreign(target, _name(folder), _weights(folder, WEIGHTS_OF_TRANSFORMERS), described)


@contextmanager
def _misfits_named(place: Path) -> Iterator[None]:
    """Turn what a configuration of wrong types or values leads to into one line.

    Raises:
        UsageError: the block met such a value.
    """
    try:
        yield
    except UsageError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
        why = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{place}: a value in it is of a wrong kind ({type(error).__name__}: {why}); fetch it again"
        ) from error


def _name(folder: Path) -> str:
    return folder.resolve().name or "model"


def read_foreign_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of another program.

    Raises:
        UsageError: it is damaged.
    """
    try:
        return read_object(path)
    except ValueError as error:
        raise UsageError(f"{path}: damaged ({error}); fetch it again") from None


def _weights(folder: Path, names: Sequence[str]) -> tuple[Path, ...]:
    """The files of weights in a folder: one, or those that an index lists."""
    for name in names:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return (folder / name,)
        if index.is_file():
            parts = sorted({str(part) for part in (read_foreign_object(index).get("weight_map") or {}).values()})
            files = tuple(folder / part for part in parts if Path(part).name == part)
            missing = [file for file in files if not file.is_file()]
            if missing or not files:
                raise UsageError(f"{index}: {missing[0] if missing else 'it'} is missing; download the whole folder")
            return files
    raise UsageError(f"{folder}: no weights; expected {' or '.join(names)}")
