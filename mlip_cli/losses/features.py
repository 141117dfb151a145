"""What the losses between all pairs of a batch read of it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mlip_cli.types import Encoded

IMAGE, TEXT, FREQUENCY = "image_features", "text_features", "frequency_features"
TEXT_TOKENS, CAPTION_MASK = "text_tokens", "caption_mask"


@dataclass(frozen=True)
class Features:
    """Tensors by name; micro-batches are cached in this form.

    Rows of a batch with C captions a picture: IMAGE (B, E), TEXT (B, C, E) and, with a frequency head, FREQUENCY
    (B, E). For token losses over the whole batch: `tokens.LOSS` (B, K, T), `sizes.LOSS` (B, K), TEXT_TOKENS
    (B, C, L, T) and CAPTION_MASK (B, C, L). Shared by all rows: `scale.LOSS` and, of sigmoid losses, `bias.LOSS` (1,).
    """

    tensors: dict[str, Tensor]
    labels: Tensor | None = None
    """(B,): the labels of `Batch`."""

    @classmethod
    def joined(cls, parts: "Sequence[Features]") -> "Features":
        """The features of micro-batches as leaves over all of their rows, so that each has a gradient of its own."""
        tensors = {}
        for name, first in parts[0].tensors.items():
            whole = first if first.ndim == 1 else torch.cat([part.tensors[name] for part in parts])
            tensors[name] = whole.detach().requires_grad_(whole.is_floating_point())
        labels = [part.labels for part in parts if part.labels is not None]
        return cls(tensors, torch.cat(labels) if labels else None)

    def leaves(self) -> dict[str, Tensor]:
        """The tensors of `joined` that a gradient can be asked for."""
        return {name: tensor for name, tensor in self.tensors.items() if tensor.requires_grad}

    def surrogate(self, gradients: dict[str, Tensor | None], rows: slice, *, share: float) -> Tensor:
        """A scalar whose gradient is the part of a micro-batch in the gradient of the batch-level losses: 0-d.

        Args:
            gradients: those of `leaves`; None where no loss reads the tensor.
            rows: the rows of this micro-batch.
            share: the part in the gradient of scales and biases, which every micro-batch sees.
        """
        products = []
        for name, gradient in gradients.items():
            if gradient is not None:
                own = gradient * share if gradient.ndim == 1 else gradient[rows]
                product = (self.tensors[name] * own).sum()
                products.append(product.to(torch.promote_types(product.dtype, torch.float32)))
        return torch.stack(products).sum()


def image_tokens(encoded: Encoded, loss: str) -> tuple[Tensor, Tensor]:
    """The image tokens that a token loss reads, and how many patches each stands for: (B, K, T), (B, K)."""
    if loss == "spatial_token":
        assert encoded.image_tokens is not None
        return encoded.image_tokens, encoded.token_sizes
    assert encoded.frequency_tokens is not None
    return encoded.frequency_tokens, torch.ones_like(encoded.frequency_tokens[..., 0])


def with_other_pictures(encoded: Encoded) -> Encoded:
    """The same captions, each with the picture of the sample before it; the first with that of the last."""
    own = {"image_features", "frequency_features", "image_tokens", "token_sizes", "frequency_tokens"}
    found = {name: tensor for name in own if (tensor := getattr(encoded, name)) is not None}
    words = {name: features.roll(1, 0) for name, features in encoded.word_features.items()}
    return replace(encoded, word_features=words, **{name: tensor.roll(1, 0) for name, tensor in found.items()})


def features_of(encoded: Encoded, *, token_losses: Collection[str] = (), labels: Tensor | None = None) -> Features:
    """The part of `encoded` that losses between all pairs of a batch read.

    Args:
        token_losses: names of the token losses among them.
        labels: those of the batch.
    """
    by_picture = len(encoded.image_features), -1
    tensors = {IMAGE: encoded.image_features, TEXT: encoded.text_features.unflatten(0, by_picture)}
    if encoded.frequency_features is not None:
        tensors[FREQUENCY] = encoded.frequency_features
    for loss in token_losses:
        assert encoded.text_tokens is not None
        tensors[TEXT_TOKENS] = encoded.text_tokens.unflatten(0, by_picture)
        tensors[CAPTION_MASK] = encoded.caption_mask.unflatten(0, by_picture)
        tensors[f"tokens.{loss}"], tensors[f"sizes.{loss}"] = image_tokens(encoded, loss)
    tensors |= {f"scale.{loss}": scale for loss, scale in encoded.scales.items()}
    tensors |= {f"bias.{loss}": bias for loss, bias in encoded.biases.items()}
    return Features(tensors, labels)
