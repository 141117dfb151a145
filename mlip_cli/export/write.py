"""One format of an exported model: written, then read back by the program that it is for."""

from dataclasses import dataclass
from pathlib import Path

from mlip_cli.runs.loading import LoadedRun, at_rate


@dataclass(frozen=True)
class Written:
    """What was written."""

    lost: list[str]
    """Parts of the model that the format does not hold."""
    difference: float
    """Largest difference of features, as unit vectors, to those of the run."""
    by: str
    """The program that computed the other ones."""


def import_packages(format: str) -> None:
    """Import the packages that write and read a format."""
    if format == "open_clip":
        import open_clip  # noqa: F401
    if format == "huggingface":
        import transformers

        _ = transformers.CLIPModel, transformers.SiglipModel, transformers.AutoTokenizer
    if format == "onnx":
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401


def write_format(loaded: LoadedRun, folder: Path, *, format: str, merge_rate: float | None) -> Written:
    """Write a model into a folder, and compare what comes out of it.

    Raises:
        UsageError: the format cannot hold the model, or packages that it needs are not installed.
        RunError: the features differ.
    """
    if format == "onnx":
        from mlip_cli.export.onnx import check_onnx, write_onnx

        encoder = at_rate(loaded.model, merge_rate)
        return Written(write_onnx(loaded, encoder, folder), check_onnx(loaded, encoder, folder), "onnxruntime")
    if format == "open_clip":
        from mlip_cli.export.check import check_open_clip
        from mlip_cli.export.open_clip import write_open_clip

        return Written(write_open_clip(loaded, folder), check_open_clip(loaded, folder), "OpenCLIP")
    if format == "huggingface":
        from mlip_cli.export.check import check_transformers
        from mlip_cli.export.transformers import write_transformers

        return Written(write_transformers(loaded, folder), check_transformers(loaded, folder), "transformers")
    from mlip_cli.export.safetensors import check_safetensors, write_safetensors

    return Written(write_safetensors(loaded, folder), check_safetensors(loaded, folder), "mlip")
