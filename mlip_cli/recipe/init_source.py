"""What `model.init` names: a run, a checkpoint of ours, or a file of weights by OpenCLIP's names."""

from dataclasses import dataclass

from mlip_cli.errors import UsageError

OPEN_CLIP = "open_clip:"


@dataclass(frozen=True)
class OpenClipFile:
    """Weights of a model that OpenCLIP has a configuration of."""

    architecture: str
    """Name of the configuration, as in ViT-B-32-quickgelu."""
    file: str

    def __str__(self) -> str:
        return f"{OPEN_CLIP}{self.architecture}:{self.file}"


def open_clip_file(init: str) -> OpenClipFile | None:
    """The parts of open_clip:ARCH:FILE; None where `init` is a path of ours.

    Raises:
        UsageError: it begins with open_clip: and lacks one of the parts.
    """
    if not init.startswith(OPEN_CLIP):
        return None
    architecture, _, file = init.removeprefix(OPEN_CLIP).partition(":")
    if not architecture or not file:
        raise UsageError(
            f"expected open_clip:ARCH:FILE, as in open_clip:ViT-B-32-quickgelu:weights.safetensors, not {init}"
        )
    return OpenClipFile(architecture, file)
