"""Tiny CLIPs of OpenCLIP, recipes of the same form, and the comparison of features."""

from typing import Any

import open_clip
import torch
from models_for_tests import small_recipe
from torch import Tensor, nn

from mlip_cli.recipe.config import Recipe

TEXTS = ["a dog", "!!! wow !", "a red balloon with quite a long string over the roofs", "x"]


def config(*, quick_gelu: bool = False, vision: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    """OpenCLIP's configuration of a tiny CLIP with a class token, 4 x 4 patches and 16 text tokens."""
    sizes = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 4, "head_width": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    return {"embed_dim": 16, "quick_gelu": quick_gelu, "vision_cfg": sizes | (vision or {}), "text_cfg": text, **top}


def randomised(model: nn.Module, seed: int = 0) -> Any:
    """The model with every parameter random, biases and LayerNorms included, so that no exchange goes unseen."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        size = 0.5 if parameter.ndim < 2 else 1.5 * parameter.shape[-1] ** -0.5
        parameter.data = size * noise + (1 if "ln_" in name and name.endswith("weight") else 0)
    return model.eval()


TOWER = {"patch_size": 8, "width": 32, "depth": 4, "num_heads": 2, "pre_norm": True, "norm_eps": 1e-5}
"""The image tower of `config`, as a recipe has it."""


def recipe_for(*, activation: str = "gelu", **changes: Any) -> Recipe:
    """A recipe of the form of `config`."""
    recipe = small_recipe(mlip=False, **changes)
    text = recipe.model.text.model_copy(update={"activation": activation})
    vision = recipe.model.vision.model_validate(TOWER | {"activation": activation})
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"vision": vision, "text": text})})


def token_ids(length: int) -> Tensor:
    return open_clip.get_tokenizer("ViT-B-32", context_length=length)(TEXTS)


def assert_same_features(ours: Any, theirs: Any, *, image_size: int = 32, length: int = 16, n: int = 4) -> None:
    """Equal within 1e-5 of normalised features, and not because all pictures or texts give the same."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(n, 3, image_size, image_size, generator=generator)
    ids = token_ids(length)[:n]
    with torch.no_grad():
        texts = theirs.encode_text(ids)
        for mine, other in (
            (ours.encode_image(images, ours.plan), theirs.encode_image(images)),
            (ours.encode_text(ids), texts),
            (ours.encode_text(ids[:, : length - 2]), texts),
        ):
            mine, other = nn.functional.normalize(mine, dim=-1), nn.functional.normalize(other, dim=-1)
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
            assert (other[0] - other[1:]).norm(dim=-1).min() > 0.01
