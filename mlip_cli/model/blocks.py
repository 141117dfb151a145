"""Ways to run transformer blocks: with recomputed activations, with fused attention, compiled."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from timm.layers.activations import QuickGELU
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.utils.checkpoint import checkpoint

from mlip_cli.recipe.config import Activation
from mlip_cli.terminal.output import warn

ACTIVATIONS: dict[Activation, Callable[..., nn.Module]] = {
    "gelu": nn.GELU,
    "quick_gelu": QuickGELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
}
"""Activations of the MLPs. quick_gelu is x * sigmoid(1.702 x), which approximates gelu, as gelu_tanh does."""


def run_block(block: nn.Module, x: Tensor, *, again: bool, **named: Any) -> Any:
    """block(x, **named). With `again` the backward pass recomputes what is inside, with the same random numbers.

    Source: "Training deep nets with sublinear memory cost" (Chen et al., 2016).
    """
    if again and torch.is_grad_enabled():
        return checkpoint(block, x, use_reentrant=False, **named)
    return block(x, **named)


def set_fused_attention(model: nn.Module, fused: bool) -> None:
    """Use one fused kernel, or plain matrix products, in every attention of timm.

    On CPUs plain products train 1.3 to 1.8 times faster in bf16. On GPUs the fused kernel is faster.
    """
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", fused)  # noqa: B010 - nn.Module declares no such attribute


MOST_COMPILED_FORMS = 128
"""Limit of compiled forms per kind of block: token counts, with and without gradient, sizes of micro-batches."""


class Compiled:
    """The blocks of a model, each compiled on its own and in place, so that the work grows with the kinds of blocks and
    not with depth.

    Where a block cannot be compiled, or there are more forms than `MOST_COMPILED_FORMS`, all of them go on as they were
    written, with one warning. Each rate of drop path makes a kind of its own, because compiled code holds the rate as a
    number.

    Args:
        fixed: blocks whose numbers of tokens are few and known, as those of pictures: a form for each number.
        varying: blocks of texts, whose lengths share one form.
    """

    def __init__(
        self, *, fixed: Iterable[nn.Module], varying: Iterable[nn.Module] = (), backend: str = "inductor"
    ) -> None:
        self.failure: str | None = None
        """Why nothing is compiled any more."""
        rates = set()
        for dynamic, blocks in ((False, fixed), (None, varying)):
            for block in blocks:
                rates |= {getattr(module, "drop_prob", 0.0) for module in block.modules()}
                # compile the method, not the module: hooks (those of a sharded block gather it) stay outside
                compiled = torch.compile(block.forward, backend=backend, dynamic=dynamic)
                setattr(block, "forward", self._or_plain(compiled, block.forward))  # noqa: B010 - mypy takes no method
        config = torch._dynamo.config
        config.recompile_limit = MOST_COMPILED_FORMS * len(rates)
        config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, config.recompile_limit)
        config.fail_on_recompile_limit_hit = True  # caught here; torch alone would say it in words of its own
        if hasattr(torch._functorch.config, "force_non_lazy_backward_lowering"):
            # compile the backward pass with the forward pass, where its errors are caught
            torch._functorch.config.force_non_lazy_backward_lowering = True
        config.optimize_ddp = False  # else a graph ends at every bucket of gradients, and a block is as large as one

    def _or_plain(self, compiled: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **named: Any) -> Any:
            if self.failure is None:
                try:
                    return compiled(*args, **named)
                except FailOnRecompileLimitHit:
                    self.failure = f"a kind of block has more than {MOST_COMPILED_FORMS} forms"
                except TorchDynamoException as error:
                    cause = getattr(error, "inner_exception", error)
                    self.failure = f"{type(cause).__name__}: {cause}".strip().partition("\n")[0]
                warn(f"train.compile: the blocks run without compiling from here on: {self.failure}")
            return plain(*args, **named)

        return forward
