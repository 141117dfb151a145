"""Global losses: one vector a picture against one vector a caption, over the global batch.

Each rank computes the rows of its own pairs; the mean over ranks is the loss over the global batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(
    images: Tensor, texts: Tensor, all_images: Tensor, all_texts: Tensor, scale: Tensor, *, offset: int
) -> Tensor:
    """Symmetric cross-entropy over cosine similarities ("CLIP", Radford et al., ICML 2021).

    Args:
        images, texts: normalised features of this rank (B, E), at least fp32.
        all_images, all_texts: those of all ranks (W*B, E).
        scale: factor of the similarities (1,).
        offset: place of this rank's first pair among all.
    """
    labels = torch.arange(len(images), device=images.device) + offset
    image_to_text = F.cross_entropy(scale * images @ all_texts.T, labels)
    text_to_image = F.cross_entropy(scale * texts @ all_images.T, labels)
    return (image_to_text + text_to_image) / 2


def sigmoid_loss(images: Tensor, all_texts: Tensor, scale: Tensor, bias: Tensor, *, offset: int) -> Tensor:
    """Every pair a yes/no question, summed over texts, mean over images ("SigLIP", Zhai et al., ICCV 2023).

    Shapes as in `info_nce`; `bias` (1,) is added to the logits.
    """
    logits = scale * images @ all_texts.T + bias
    rows = torch.arange(len(images), device=images.device)
    signs = -torch.ones_like(logits)
    signs[rows, rows + offset] = 1
    return -F.logsigmoid(signs * logits).sum() / len(images)
