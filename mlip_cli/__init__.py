"""Pretrain, merge, evaluate and profile CLIP-style models. `load` opens a trained one.

model = mlip_cli.load("runs/mine")
cosines = model.encode_image(pictures) @ model.encode_text(["a red apple", "a green tree"]).T
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlip_cli.evaluate.encoder import ImageTextEncoder

__version__ = "0.1.0"


def load(
    run: str | Path, device: str = "auto", merge_rate: float | None = None, precision: str | None = None
) -> "ImageTextEncoder":
    """A trained model that encodes pictures and texts. Torch is loaded at this call.

    Args:
        run: a run folder, a checkpoint (RUN/checkpoints/step_NUMBER), or weights of another program:
            open_clip:ARCH:FILE, or a folder of OpenCLIP or Hugging Face.
        device: auto, cuda, mps or cpu.
        merge_rate: the fraction of patch tokens that merge away; None: the recipe's.
        precision: bf16, fp32 or fp16 (CUDA); None: on CUDA that of the training, elsewhere fp32.

    Raises:
        UsageError: no such run, a damaged checkpoint, or a merge rate or precision that cannot be had. It is a
            ValueError.
    """
    from mlip_cli.evaluate.encoder import load_encoder

    return load_encoder(str(run), device=device, merge_rate=merge_rate, precision=precision)
