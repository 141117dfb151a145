"""Losses over words: which of the words of the global batch are in the captions of a picture.

Source: a softmax over the vocabulary whose target is spread over the words of the caption by their inverse document
frequency ("SuperCLIP: CLIP with Simple Classification Supervision", Zhao et al., NeurIPS 2025). Here the candidates are
the words of the global batch, as the other losses take their negatives from it. So the loss needs no pass over the data
beforehand, and its cost follows the batch and not the vocabulary. The weights of the classes are the embeddings that
the text tower reads.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mlip_cli.devices import fetched
from mlip_cli.distributed import all_sum
from mlip_cli.losses.token_alignment import is_valid
from mlip_cli.recipe.config import VOCAB_SIZE


@dataclass(frozen=True)
class CaptionCounts:
    """What the losses inside pairs need of the captions of the global batch, on all ranks alike."""

    word_ids: Tensor
    """(V,) int64, ascending: the words of the global batch."""
    word_weights: Tensor
    """(V,): log((1 + captions) / captions with the word), above 0; fp64 where the device has it."""
    with_words: Tensor
    """0-d: captions with at least one word."""
    valid: Tensor
    """0-d: captions that losses of words against patches can use."""


def count_captions(token_ids: Tensor, text_mask: Tensor) -> CaptionCounts:
    """Count the captions of all ranks: (B, L) int64, (B, L) bool with every word of a caption once."""
    return begin_count(token_ids, text_mask)()


def begin_count(token_ids: Tensor, text_mask: Tensor) -> Callable[[], CaptionCounts]:
    """Start `count_captions` on the device. What is returned waits for the number of words, and for no later work."""
    of_words = text_mask.flatten().long()
    words = of_words.new_zeros(VOCAB_SIZE).index_add_(0, token_ids.flatten(), of_words)
    with_words = text_mask.any(1)
    captions = torch.stack([torch.ones_like(with_words).sum(), with_words.sum(), is_valid(text_mask).sum()])
    words, captions = all_sum(torch.cat([words, captions])).split([VOCAB_SIZE, len(captions)])
    num_words = fetched(words.count_nonzero())

    def counts() -> CaptionCounts:
        # `nonzero` would wait for all that the GPU has to do
        is_cuda = words.device.type == "cuda"
        word_ids = (torch.nonzero_static(words, size=num_words()) if is_cuda else words.nonzero())[:, 0]
        dtype = torch.float32 if words.device.type == "mps" else torch.float64
        weights = ((1 + captions[0]) / words[word_ids].to(dtype)).log()
        return CaptionCounts(word_ids, weights, captions[1], captions[2])

    return counts


def words_sum(
    features: Tensor, vocabulary: Tensor, token_ids: Tensor, text_mask: Tensor, scale: Tensor, counts: CaptionCounts
) -> Tensor:
    """Cross-entropy between the softmax over the batch's words and the words of a caption, SUM over captions: 0-d.

    The logits are `scale` times the cosines of pictures and words. A word of the caption has its share of the caption's
    weights as target. The caller divides by the number of captions with words in the global batch.

    Args:
        features: (B, W), not normalised. vocabulary: (V, W) of the words in `counts`, likewise.
        token_ids, text_mask: (B*C, L), C captions a picture.
    """
    if not len(vocabulary):
        return 0.0 * (scale * features).sum()  # all ranks have a gradient for both
    dtype = torch.promote_types(features.dtype, torch.float32)
    features, vocabulary = F.normalize(features.to(dtype), dim=-1), F.normalize(vocabulary.to(dtype), dim=-1)
    log_probabilities = (scale * features @ vocabulary.T).log_softmax(-1)
    words = torch.searchsorted(counts.word_ids, token_ids.contiguous()).clamp(max=len(vocabulary) - 1)
    weights = torch.where(text_mask, counts.word_weights[words], 0).to(dtype)
    targets = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    rows = len(features), -1
    return -(targets.view(rows) * log_probabilities.gather(1, words.view(rows))).sum()
