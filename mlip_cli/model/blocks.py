"""How a transformer block is run: at once, or with its activations computed again for the gradient."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_block(block: nn.Module, x: Tensor, *, again: bool, **named: Any) -> Any:
    """block(x, **named); with `again`, what is inside is not kept for the backward pass but computed a second time
    there, with the same random numbers ("Training deep nets with sublinear memory cost", Chen et al., 2016)."""
    if again and torch.is_grad_enabled():
        return checkpoint(block, x, use_reentrant=False, **named)
    return block(x, **named)
