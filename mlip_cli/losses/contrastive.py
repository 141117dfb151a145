"""Global losses: one vector per picture against one vector per caption, over the global batch.

Each rank computes the rows of its own pairs; the mean over ranks is the loss over the global batch. `labels` (W*B,) are
those of all W ranks: pairs of the same label are positives of each other. Without labels each pair has only itself.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 2**22
"""The most logits of the sigmoid loss at one time: 16 MiB of fp32."""


def cross_entropy(logits: Tensor, *, offset: int, label_smoothing: float = 0.0, labels: Tensor | None = None) -> Tensor:
    """Mean over rows of the cross-entropy with each row's positives, which share the target evenly: (B, W*B) -> 0-d.

    With labels, row i adds z_ii - mean of z_ij over its positives j to the loss of its own column. This term is exactly
    0 for a row with one positive.
    """
    rows = torch.arange(len(logits), device=logits.device)
    loss = F.cross_entropy(logits, rows + offset, label_smoothing=label_smoothing)
    if labels is None:
        return loss
    shares = (labels[rows + offset, None] == labels).to(logits.dtype)
    shares = shares / shares.sum(1, keepdim=True)
    shares[rows, rows + offset] -= 1
    return loss - (1 - label_smoothing) * (shares * logits).sum(1).mean()


def info_nce(
    images: Tensor,
    texts: Tensor,
    all_images: Tensor,
    all_texts: Tensor,
    scale: Tensor,
    *,
    offset: int,
    label_smoothing: float = 0.0,
    labels: Tensor | None = None,
) -> Tensor:
    """Symmetric cross-entropy over cosine similarities ("CLIP", Radford et al., ICML 2021).

    Args:
        images, texts: normalised features of this rank (B, E), at least fp32.
        all_images, all_texts: those of all ranks (W*B, E).
        scale: factor of the similarities (1,).
        offset: index of this rank's first pair in the global batch.
        label_smoothing: share of the target to spread evenly over the global batch.
    """
    image_to_text, text_to_image = (
        cross_entropy(logits, offset=offset, label_smoothing=label_smoothing, labels=labels)
        for logits in (scale * images @ all_texts.T, scale * texts @ all_images.T)
    )
    return (image_to_text + text_to_image) / 2


def sigmoid_loss(
    images: Tensor,
    all_texts: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    offset: int,
    labels: Tensor | None = None,
    chunk_logits: int = CHUNK_LOGITS,
) -> Tensor:
    """A yes/no question for every pair; sum over texts, mean over images ("SigLIP", Zhai et al., ICCV 2023).

    Texts go in chunks of at most `chunk_logits` logits. With several chunks the backward pass recomputes each one and
    keeps none. Shapes are those of `info_nce`; `bias` (1,) is added to the logits.
    """
    labels = torch.arange(len(all_texts), device=images.device) if labels is None else labels
    own = labels[offset : offset + len(images)]
    size = max(1, chunk_logits // len(images))
    chunks = list(zip(all_texts.split(size), labels.split(size), strict=True))
    if len(chunks) == 1:
        return _sigmoid_sum(images, all_texts, scale, bias, own, labels) / len(images)
    sums = [
        checkpoint(_sigmoid_sum, images, texts, scale, bias, own, others, use_reentrant=False, preserve_rng_state=False)
        for texts, others in chunks
    ]
    return torch.stack(sums).sum() / len(images)


def _sigmoid_sum(
    images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, image_labels: Tensor, text_labels: Tensor
) -> Tensor:
    """Sum of -log sigmoid(+-logit) over all pairs of (B, E) and (C, E): 0-d."""
    logits = scale * images @ texts.T + bias
    return -F.logsigmoid(torch.where(image_labels[:, None] == text_labels, logits, -logits)).sum()
