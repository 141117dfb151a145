"""Batches of noise with the shapes of a recipe's, to find out what a step costs."""

import torch

from mlip_cli.recipe.config import Recipe
from mlip_cli.types import Batch


def noise_batch(recipe: Recipe, *, batch_size: int, num_tokens: int, device: torch.device) -> Batch:
    """Pictures of noise, captions of `num_tokens` words drawn from the whole vocabulary.

    So losses over words meet more words than in a batch of captions, which share most of theirs.
    """
    generator = torch.Generator().manual_seed(0)
    side, captions = recipe.data.image_size, recipe.data.captions_per_image * batch_size

    def pictures() -> torch.Tensor:
        return torch.randint(256, (batch_size, 3, side, side), dtype=torch.uint8, generator=generator)

    text = recipe.model.text
    token_ids = torch.randint(1, text.vocab_size - 2, (captions, num_tokens), generator=generator)
    token_ids[:, 0] = text.vocab_size - 2  # BOS of CLIP
    token_ids[:, -1] = text.vocab_size - 1 if text.eos_id is None else text.eos_id
    return Batch(
        pictures(),
        token_ids,
        keys=("",) * batch_size,
        labels=torch.arange(batch_size) if recipe.losses.read_labels else None,
        other_images=pictures() if recipe.losses.read_other_crop else None,
    ).to(device)
