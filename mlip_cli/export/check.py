"""An exported model against the one that it was made of."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mlip_cli.errors import RunError
from mlip_cli.export.open_clip import loaded_by_open_clip
from mlip_cli.export.transformers import loaded_by_transformers
from mlip_cli.runs.loading import LoadedRun

TEXTS = ("a photo of a cat", "Two red balloons, over the roofs of the town!", "x", "  émigré café: 100 % naïve  ")
BOUND = 1e-4
"""Largest difference of unit vectors; rounding of fp32 gives about 1e-6."""


def check_open_clip(loaded: LoadedRun, folder: Path) -> float:
    """Largest difference of the features that OpenCLIP computes of a folder; raises as `_compared`."""
    model, tokenizer = loaded_by_open_clip(folder)
    ids = tokenizer(list(TEXTS), context_length=loaded.tokenizer.context_length)
    return _compared(loaded, model.encode_image, model.encode_text, ids, by="OpenCLIP")


def check_transformers(loaded: LoadedRun, folder: Path) -> float:
    """Largest difference of the features that transformers computes of a folder; raises as `_compared`."""
    model, tokenizer = loaded_by_transformers(folder)

    def images(pixels: Tensor) -> Tensor:
        return _pooled(model.get_image_features(pixel_values=pixels))

    def texts(ids: Tensor) -> Tensor:
        return _pooled(model.get_text_features(input_ids=ids))

    length = loaded.tokenizer.context_length
    ids = tokenizer(
        list(TEXTS), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    ).input_ids
    return _compared(loaded, images, texts, ids, by="transformers")


def _pooled(output: Any) -> Tensor:
    """The features, which some versions of transformers wrap."""
    return output if isinstance(output, Tensor) else output.pooler_output


@torch.no_grad()
def _compared(
    loaded: LoadedRun,
    encode_image: Callable[[Tensor], Tensor],
    encode_text: Callable[[Tensor], Tensor],
    their_ids: Tensor,
    *,
    by: str,
) -> float:
    """Largest difference of unit vectors of random pictures and some texts, with their own tokens.

    Raises:
        RunError: it is more than rounding makes, so that the copy is another model.
    """
    size = loaded.model.image_size
    pictures = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    model = loaded.model
    pairs = (
        (model.encode_image(pictures, model.merge_plan(0.0)), encode_image(pictures)),
        (model.encode_text(loaded.tokenizer.encode(list(TEXTS))), encode_text(their_ids)),
    )
    largest = max(
        (normalize(own.float(), dim=-1) - normalize(other.float(), dim=-1)).abs().max().item() for own, other in pairs
    )
    if not largest <= BOUND:
        raise RunError(f"{by} computes other features of the exported model: they differ by {largest:.2g}")
    return largest
