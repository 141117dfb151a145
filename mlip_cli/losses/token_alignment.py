"""Token losses: patches against words, inside each pair.

Source: sparse fine-grained alignment, "Improving fine-grained understanding in image-text pre-training" (SPARC, Bica et
al., ICML 2024), extended here to tokens that stand for several patches. That MLIP aligns at the token level in both
domains is the paper's; that it does so by SPARC is our choice.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_WORDS = 2
"""A caption needs two words to have something to tell apart."""


def is_valid(text_mask: Tensor) -> Tensor:
    """Whether a caption has enough words: (B, L) bool -> (B,) bool."""
    return text_mask.sum(1) >= LEAST_WORDS


def grouped_patches(patches: Tensor, sizes: Tensor, words: Tensor) -> Tensor:
    """For each word the mean of the patches it attends to: (B, K, T), (B, K), (B, L, T) -> (B, L, T), normalised.

    A word's similarities are stretched to [0, 1] over the patches. Those below 1 / number of patches become 0, and the
    others are weighted by size. If all patches of a picture are alike, sizes alone are the weights.
    """
    similarity = words @ patches.transpose(1, 2)
    least, most = similarity.amin(-1, keepdim=True), similarity.amax(-1, keepdim=True)
    span = most - least
    flat = span < 1e-6
    stretched = torch.where(flat, 1.0, (similarity - least) / span.masked_fill(flat, 1))
    threshold = 1 / sizes.sum(1)[:, None, None]
    weights = torch.where(stretched < threshold, 0.0, stretched) * sizes[:, None]
    return F.normalize((weights / weights.sum(-1, keepdim=True)) @ patches, dim=-1)


def sparc_sum(patches: Tensor, sizes: Tensor, words: Tensor, text_mask: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross-entropy between words and their patches, mean over the words of a caption, SUM over captions.

    The caller divides by the number of valid captions of the global batch. A local mean would be wrong, because ranks
    have different numbers of them.

    Args:
        patches: (B, K, T), not normalised. words: (B, L, T), likewise.
        sizes: (B, K) patches per token. text_mask: (B, L) words. scale: (1,).
    """
    dtype = torch.promote_types(patches.dtype, torch.float32)
    patches, words = F.normalize(patches.to(dtype), dim=-1), F.normalize(words.to(dtype), dim=-1)
    groups = grouped_patches(patches, sizes.to(dtype), words)
    logits = scale * groups @ words.transpose(1, 2)
    length = words.shape[1]
    labels = torch.arange(length, device=words.device).expand(len(words), length)
    never = torch.finfo(dtype).min

    def cross_entropy(logits: Tensor) -> Tensor:
        logits = logits.masked_fill(~text_mask[:, None], never)
        return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")

    per_word = (cross_entropy(logits) + cross_entropy(logits.transpose(1, 2))) / 2
    # `where` and not a product: padded rows may be huge, and 0 * inf is NaN
    per_word = torch.where(text_mask, per_word, 0.0)
    per_caption = per_word.sum(1) / text_mask.sum(1).clamp(min=1)
    return torch.where(is_valid(text_mask), per_caption, 0.0).sum()
