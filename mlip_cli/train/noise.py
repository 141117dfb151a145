"""Batches of noise with the shapes of a recipe's, to find out what a step costs."""

from collections.abc import Sequence

import torch

from mlip_cli.recipe.config import Recipe
from mlip_cli.types import Batch


def noise_batch(
    recipe: Recipe, *, batch_size: int, num_tokens: int, device: torch.device, lengths: Sequence[int] | None = None
) -> Batch:
    """Pictures of noise, captions of `num_tokens` words drawn from the whole vocabulary.

    So losses over words meet more words than in a batch of captions, which share most of theirs. With `lengths` the
    captions have so many tokens and are padded to `num_tokens`.
    """
    generator = torch.Generator().manual_seed(0)
    side, captions = recipe.data.image_size, recipe.data.captions_per_image * batch_size

    def pictures() -> torch.Tensor:
        return torch.randint(256, (batch_size, 3, side, side), dtype=torch.uint8, generator=generator)

    text = recipe.model.text
    token_ids = torch.randint(1, text.vocab_size - 2, (captions, num_tokens), generator=generator)
    token_ids[:, 0] = text.vocab_size - 2  # BOS of CLIP
    ends = torch.tensor(lengths or [num_tokens] * captions)[:, None] - 1
    token_ids.scatter_(1, ends, text.vocab_size - 1 if text.eos_id is None else text.eos_id)
    token_ids[torch.arange(num_tokens) > ends] = 0
    return Batch(
        pictures(),
        token_ids,
        keys=("",) * batch_size,
        labels=torch.arange(batch_size) if recipe.losses.read_labels else None,
        other_images=pictures() if recipe.losses.read_other_crop else None,
        text_lengths=None if lengths is None else tuple(lengths),
    ).to(device)
