"""The value of `model.init`: a run, a checkpoint, or a file of weights by OpenCLIP's names."""

from dataclasses import dataclass, replace

from mlip_cli.errors import UsageError
from mlip_cli.paths import read_path

OPEN_CLIP = "open_clip:"


@dataclass(frozen=True)
class OpenClipFile:
    """A file of weights, and the configuration of OpenCLIP that describes their model."""

    architecture: str
    """Name of the configuration, such as ViT-B-32-quickgelu."""
    file: str

    def __str__(self) -> str:
        return f"{OPEN_CLIP}{self.architecture}:{self.file}"


def open_clip_file(init: str) -> OpenClipFile | None:
    """The parts of open_clip:ARCH:FILE; None if `init` is the path of a run or a checkpoint.

    Raises:
        UsageError: `init` begins with open_clip: and lacks ARCH or FILE.
    """
    if not init.startswith(OPEN_CLIP):
        return None
    architecture, _, file = init.removeprefix(OPEN_CLIP).partition(":")
    if not architecture or not file:
        raise UsageError(
            f"expected open_clip:ARCH:FILE, as in open_clip:ViT-B-32-quickgelu:weights.safetensors, not {init}"
        )
    return OpenClipFile(architecture, file)


def read_init(init: str) -> str:
    """`init` with its path as `read_path` reads it.

    Raises:
        UsageError: it lacks a part, or its path cannot be one.
    """
    foreign = open_clip_file(init)
    return read_path(init) if foreign is None else str(replace(foreign, file=read_path(foreign.file)))
