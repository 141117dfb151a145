"""Token losses over the batch: each caption against the patches that it attends to, for all pairs of the global batch.

Source: pooling of patches that a text conditions, with every other picture pooled by the same text as its negatives
("FLAIR: VLM with Fine-grained Language-informed Image Representations", Xiao et al., CVPR 2025). Keys, values and the
space of the comparison are one here, so the pooled similarity is the attention-weighted mean of the similarities.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mlip_cli.losses.filip import similarities_at_once


def caption_queries(text_tokens: Tensor, caption_mask: Tensor) -> Tensor:
    """The token at EOS of each caption, normalised: (B, L, T), (B, L) bool -> (B, T), at least fp32."""
    last = caption_mask.shape[1] - 1 - caption_mask.flip(1).int().argmax(1)
    queries = text_tokens[torch.arange(len(text_tokens), device=text_tokens.device), last]
    return F.normalize(queries.to(torch.promote_types(queries.dtype, torch.float32)), dim=-1)


def pooled_scores(
    patches: Tensor, sizes: Tensor, queries: Tensor, scale: Tensor, *, chunk_similarities: int | None = None
) -> Tensor:
    """How well B images and C captions fit: the mean cosine of the patches, weighted by attention to them: (B, C).

    The attention of a caption is the softmax over patches of `scale` times the cosine, by size. With several chunks of
    captions the backward pass recomputes each one and keeps none.

    Args:
        patches: (B, K, T), not normalised. sizes: (B, K) patches per token, without gradient.
        queries: (C, T), from `caption_queries`. scale: (1,).
        chunk_similarities: most similarities at one time; None: the number for the device.
    """
    patches = F.normalize(patches.to(queries.dtype), dim=-1)
    log_sizes = sizes.to(queries.dtype).log()
    most = chunk_similarities or similarities_at_once(patches.device)
    chunks = queries.split(max(1, most // log_sizes.numel()))
    if len(chunks) == 1:
        return _scores(patches, log_sizes, queries, scale)
    scores = [
        checkpoint(_scores, patches, log_sizes, some, scale, use_reentrant=False, preserve_rng_state=False)
        for some in chunks
    ]
    return torch.cat(scores, dim=1)


def _scores(patches: Tensor, log_sizes: Tensor, queries: Tensor, scale: Tensor) -> Tensor:
    similarity = queries @ patches.mT
    attention = (scale * similarity + log_sizes[:, None]).softmax(-1)
    return (attention * similarity).sum(-1)
