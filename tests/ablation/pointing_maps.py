"""Similarity of texts to every patch of a picture, from one forward pass."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mlip_cli.model.clip import CLIP
from mlip_cli.model.merging import unmerge_tokens
from mlip_cli.model.text import pool_text, word_mask
from mlip_cli.recipe.merge_plan import MergePlan

HEAD_READINGS = {"spatial": "tokens", "frequency": "frequency_tokens"}
"""Token head -> the reading that it makes possible, beside `feature`."""


def unit(vectors: Tensor) -> Tensor:
    """Unit vectors, at least fp32: (..., D) -> (..., D); zero stays zero."""
    return F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1)


def pointing_queries(model: CLIP, token_ids: Tensor) -> dict[str, Tensor]:
    """What `similarity_maps` compares patches with, by reading: (B, L) -> (B, E) or (B, T).

    `feature`: the unit text feature. Where a token loss trained them, `tokens` and `frequency_tokens`: the mean of the
    caption's unit words, whose product with a patch is the mean of the words' cosines.
    """
    hidden = model.text(token_ids)
    queries = {"feature": unit(model.text_projection(pool_text(hidden, token_ids)))}
    if "text" in model.token_projections:
        mask = word_mask(token_ids)[..., None]
        words = unit(model.token_projections["text"](hidden)).masked_fill(~mask, 0)
        mean = words.sum(1) / mask.sum(1).clamp(min=1)
        queries |= {reading: mean for head, reading in HEAD_READINGS.items() if head in model.token_projections}
    return queries


def similarity_maps(model: CLIP, images: Tensor, queries: Mapping[str, Tensor], plan: MergePlan) -> dict[str, Tensor]:
    """Similarity of Q texts to each original patch: (B, 3, H, W), by reading (B, Q, ·) -> by reading (B, Q, N).

    `feature` sends each patch token through what the pooled one goes through. Similarities are made of merged tokens
    and then given to all patches of a token, so that these are equal to the bit.
    """
    tower = model.image_tower(images, plan, with_branch="frequency_tokens" in queries)
    tokens = {"feature": model.image_projection(pooled_alone(model.vision.trunk, tower.tokens))}
    if "tokens" in queries:
        tokens["tokens"] = model.token_projections["spatial"](tower.tokens)
    maps = {reading: _products(patches, queries[reading]) for reading, patches in tokens.items()}
    if tower.assign:
        maps = {reading: unmerge_tokens(own, tower.assign[-1]) for reading, own in maps.items()}
    if "frequency_tokens" in queries:
        patches = model.frequency_tokens(tower)  # they never merge
        maps["frequency_tokens"] = _products(model.token_projections["frequency"](patches), queries["frequency_tokens"])
    return {reading: own.transpose(1, 2) for reading, own in maps.items()}


def pooled_alone(trunk: VisionTransformer, tokens: Tensor) -> Tensor:
    """What pooling makes of each token if it is the only one: (B, K, D) -> (B, K, D)."""
    if trunk.attn_pool is not None:
        tokens = trunk.attn_pool(tokens.flatten(0, 1)[:, None]).unflatten(0, tokens.shape[:2])
    return trunk.fc_norm(tokens)


def _products(tokens: Tensor, queries: Tensor) -> Tensor:
    """(B, K, D), (B, Q, D) -> (B, K, Q), never in half precision."""
    with torch.autocast(tokens.device.type, enabled=False):
        return unit(tokens) @ queries.transpose(1, 2)
