"""Token losses over the batch: each patch's best word and each word's best patch, for all pairs of the global batch.

Source: "FILIP: Fine-grained Interactive Language-Image Pre-Training" (Yao et al., ICLR 2022), extended here to tokens
that stand for several patches.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_SIMILARITIES = {"cuda": 2**26}
"""Device -> most similarities of patches and words at one time: 256 MiB of fp32 on GPUs, where chunks cost launches."""
CHUNK_SIMILARITIES_ELSEWHERE = 2**22
"""16 MiB, which stay in the cache of a core."""


def similarities_at_once(device: torch.device) -> int:
    """The most similarities of patches and words, or captions, to hold at one time on a device."""
    return CHUNK_SIMILARITIES.get(device.type, CHUNK_SIMILARITIES_ELSEWHERE)


@contextmanager
def half_units(used: bool) -> Iterator[None]:
    """Let products of fp32 matrices run on the units for half precision: bf16 factors on CPUs, TF32 on GPUs.

    Sums stay fp32. A CPU without such units ignores it.
    """
    before = torch.get_float32_matmul_precision()
    if used:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def in_parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two numbers of 8 digits whose sum has 16 of the digits of x."""
    high = x.to(torch.bfloat16).to(x.dtype)
    return high, x - high


def word_factors(words: Tensor) -> Tensor:
    """(..., T) -> (..., 3T): its products with `patch_factors` on the units for half precision have 16 digits.

    Of the four products of parts the one of both low parts is left out.
    """
    high, low = in_parts(words)
    return torch.cat([high, low, high], dim=-1)


def patch_factors(patches: Tensor) -> Tensor:
    """The other side of `word_factors`."""
    high, low = in_parts(patches)
    return torch.cat([high, high, low], dim=-1)


def filip_words(words: Tensor, caption_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised words for `filip_scores`, and their weights: (B, L, T), (B, L) bool -> (B, L, T), (B, L).

    A masked word becomes a copy of the caption's first word and has weight 0, so it changes neither maxima nor means.
    A caption without words becomes zeros, and all of its scores are 0.
    """
    words = F.normalize(words.to(torch.promote_types(words.dtype, torch.float32)), dim=-1)
    first = words[torch.arange(len(words), device=words.device), caption_mask.int().argmax(1)]
    words = torch.where(caption_mask[..., None], words, first[:, None])
    words = torch.where(caption_mask.any(1)[:, None, None], words, 0.0)
    return words, caption_mask.to(words.dtype) / caption_mask.sum(1, keepdim=True).clamp(min=1)


def filip_scores(
    patches: Tensor, sizes: Tensor, words: Tensor, word_weights: Tensor, *, chunk_similarities: int | None = None
) -> tuple[Tensor, Tensor]:
    """How well B images and C texts fit, from both sides: 2 x (B, C).

    The first is the mean over patches, by size, of the similarity of the best word. The second is the mean over words
    of the similarity of the best patch.

    Patches of half precision come from training in mixed precision. Similarities then come from the units for half
    precision too, with 16 digits, and so with the maxima of fp32. Gradients have the digits of the patches. To look
    for maxima with fewer digits and to compute the similarities at their places again in fp32 would be slower: reading
    two vectors for each of B*C*(K+L) places takes longer than all products.

    Args:
        patches: (B, K, T), not normalised. sizes: (B, K) patches per token, without gradient.
        words: (C, L, T) and word_weights: (C, L), from `filip_words`.
        chunk_similarities: most similarities at one time; None: the number for the device.
    """
    dtype = torch.promote_types(patches.dtype, torch.float32)
    most = chunk_similarities or similarities_at_once(patches.device)
    sizes = sizes.to(dtype)
    num_texts = max(1, most // (patches.shape[0] * patches.shape[1] * words.shape[1]))
    patch_weights = sizes / sizes.sum(1, keepdim=True)
    is_half = patches.dtype != dtype
    return _Scores.apply(F.normalize(patches.to(dtype), dim=-1), words, patch_weights, word_weights, num_texts, is_half)


def index_dtype(size: int) -> torch.dtype:
    """The smallest integer type that holds `size` - 1."""
    return next(
        dtype for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64) if size - 1 <= torch.iinfo(dtype).max
    )


class _Scores(torch.autograd.Function):
    """Scores by chunks of texts. Of the B x K x C x L similarities only the places of the maxima are kept.

    The gradient of a maximum goes to the one place that was found. The backward pass writes these gradients into a
    matrix of the size of a chunk's similarities; its products with words and patches are the gradients of both.
    """

    @staticmethod
    def forward(
        ctx: Any,
        patches: Tensor,
        words: Tensor,
        patch_weights: Tensor,
        word_weights: Tensor,
        num_texts: int,
        is_half: bool,
    ) -> tuple[Tensor, Tensor]:
        (b, k, _), (c, length, _) = patches.shape, words.shape
        image_scores, text_scores = patches.new_empty(2, c, b)
        best_words = torch.empty(c, b, k, dtype=index_dtype(length), device=words.device)
        best_patches = torch.empty(c, length, b, dtype=index_dtype(k), device=words.device)
        all_patches = (patch_factors(patches) if is_half else patches).flatten(0, 1).T
        for start in range(0, c, num_texts):
            some = slice(start, start + num_texts)
            chunk = (word_factors(words[some]) if is_half else words[some]).flatten(0, 1)
            with half_units(is_half):
                similarity = (chunk @ all_patches).view(-1, length, b, k)
            values, best_words[some] = similarity.max(1)
            image_scores[some] = (values * patch_weights).sum(-1)
            values, best_patches[some] = similarity.max(3)
            text_scores[some] = (values * word_weights[some, :, None]).sum(1)
        ctx.save_for_backward(patches, words, patch_weights, word_weights, best_words, best_patches)
        ctx.num_texts, ctx.is_half = num_texts, is_half
        return image_scores.T, text_scores.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, image_grads: Tensor, text_grads: Tensor) -> tuple[Tensor | None, ...]:
        patches, words, patch_weights, word_weights, best_words, best_patches = ctx.saved_tensors
        (b, k, _), length = patches.shape, words.shape[1]
        patch_grads, word_grads = torch.zeros_like(patches), torch.empty_like(words)
        for start in range(0, len(words), ctx.num_texts):
            some = slice(start, start + ctx.num_texts)
            chunk = words[some]
            to_words = image_grads.T[some, :, None] * patch_weights
            to_patches = text_grads.T[some, None] * word_weights[some, :, None]
            coefficients = words.new_zeros(len(chunk), length, b, k)
            coefficients.scatter_(1, best_words[some, None].long(), to_words[:, None])
            coefficients.scatter_add_(3, best_patches[some, ..., None].long(), to_patches[..., None])
            coefficients = coefficients.view(-1, b * k)
            with half_units(ctx.is_half):
                patch_grads += (coefficients.T @ chunk.flatten(0, 1)).view_as(patches)
                word_grads[some] = (coefficients @ patches.flatten(0, 1)).view_as(chunk)
        return patch_grads, word_grads, None, None, None, None
