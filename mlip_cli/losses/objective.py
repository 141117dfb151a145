"""The weighted sum of named losses, split into what needs the whole batch and what needs single pairs."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mlip_cli.config import LOSS_NAMES, GlobalLoss, Losses, TokenLoss
from mlip_cli.distributed import gather, rank, world_size
from mlip_cli.losses.contrastive import info_nce, sigmoid_loss
from mlip_cli.losses.token_alignment import is_valid, sparc_sum
from mlip_cli.types import Encoded, Features

TOKEN_LOSSES: dict[str, Callable[..., Tensor]] = {"sparc": sparc_sum}


class Objective:
    """Named losses and their weights; the mean over ranks of `total` is the loss of the global batch.

    Mixed precision ends here: logits are at least fp32 whatever the towers computed in.
    """

    def __init__(self, losses: Losses) -> None:
        self.terms: dict[str, GlobalLoss | TokenLoss] = {
            name: term for name in LOSS_NAMES if (term := getattr(losses, name)) is not None
        }

    def batch_terms(self, features: Features) -> dict[str, Tensor]:
        """Losses between all pairs of the global batch: one 0-d tensor each, not weighted."""
        names = [name for name, term in self.terms.items() if isinstance(term, GlobalLoss)]
        if not names:
            return {}
        with torch.autocast(features.image.device.type, enabled=False):
            dtype = torch.promote_types(features.image.dtype, torch.float32)
            image_side = {"spatial_global": features.image, "frequency_global": features.frequency}
            local = [F.normalize(image_side[name].to(dtype), dim=-1) for name in names]  # type: ignore[union-attr]
            local.append(F.normalize(features.text.to(dtype), dim=-1))
            everyone = gather(torch.cat(local, dim=1)).split([x.shape[1] for x in local], dim=1)
            texts, all_texts = local[-1], everyone[-1]
            offset = rank() * len(texts)
            terms = {}
            for name, images, all_images in zip(names, local, everyone, strict=False):
                scale = features.scales[name]
                if self.terms[name].kind == "sigmoid":
                    terms[name] = sigmoid_loss(images, all_texts, scale, features.biases[name], offset=offset)
                else:
                    terms[name] = info_nce(images, texts, all_images, all_texts, scale, offset=offset)
            return terms

    def sample_terms(self, encoded: Encoded, num_captions: Tensor) -> dict[str, Tensor]:
        """Losses inside pairs: one 0-d tensor each, not weighted; `num_captions` is
        the sum of `count_captions` over the global batch."""
        image_side = {
            "spatial_token": (encoded.image_tokens, encoded.token_sizes),
            "frequency_token": (encoded.frequency_tokens, None),
        }
        terms = {}
        with torch.autocast(encoded.image_features.device.type, enabled=False):
            for name, term in self.terms.items():
                if isinstance(term, TokenLoss):
                    tokens, sizes = image_side[name]
                    assert tokens is not None
                    assert encoded.text_tokens is not None
                    sizes = torch.ones_like(tokens[..., 0]) if sizes is None else sizes
                    loss_sum = TOKEN_LOSSES[term.kind](
                        tokens, sizes, encoded.text_tokens, encoded.text_mask, encoded.scales[name]
                    )
                    terms[name] = loss_sum * world_size() / num_captions.clamp(min=1)
        return terms

    def count_captions(self, text_mask: Tensor) -> Tensor:
        """Captions of this share that token losses can use: (B, L) bool -> 0-d."""
        return is_valid(text_mask).sum()

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """Weighted sum of `terms`: 0-d."""
        return torch.stack([self.terms[name].weight * value for name, value in terms.items()]).sum()
