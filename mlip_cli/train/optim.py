"""AdamW, its parameter groups, and the learning rate as a function of the step."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from mlip_cli.recipe.config import Optim

NOT_DECAYED = ("cls_token", "reg_token", "dist_token", "pos_embed", "positional_embedding", "kernel", "latent")
"""Last parts of the names of tokens, positions and global filters, which are not matrices of a linear map."""

LARGEST_LOG_SCALE = math.log(100)
"""Logit scales are clamped here after every step (CLIP)."""


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of the step: linear warm-up, then a cosine to zero."""

    peak: float
    warmup_steps: int
    total_steps: int

    def learning_rate(self, step: int) -> float:
        """The rate of a step, counted from 1. That of the last step is above 0."""
        if step <= self.warmup_steps:
            return self.peak * step / self.warmup_steps
        progress = (step - 1 - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.peak * 0.5 * (1 + math.cos(math.pi * progress))


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """True for matrices of linear maps, convolutions and embeddings."""
    return parameter.ndim > 1 and name.rsplit(".", 1)[-1] not in NOT_DECAYED


def layer_scale(blocks_above: int, decay: float) -> float:
    """Factor of the learning rate of a layer with `blocks_above` blocks between it and the top of its tower.

    decay^blocks_above: 1 in the last of d blocks, decay^(d-1) in the first one, decay^d in the embeddings below it.
    "BEiT" (Bao et al., ICLR 2022) starts one earlier: there the last block has the factor `decay`.
    """
    return decay**blocks_above


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """Fused AdamW over the trained parameters; the caller sets `lr` each step.

    Without layer decay there are two groups: with and without weight decay. With layer decay each distance from a
    tower's top (`model.blocks_above()`, 0 outside the towers) has these two, and `lr_scale` is the factor of a group.
    """
    above: dict[str, int] = model.blocks_above() if optim.layer_decay != 1 else {}  # type: ignore[operator]
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = []
    for distance in sorted({above.get(name, 0) for name, _ in named}):
        layer = [(name, p) for name, p in named if above.get(name, 0) == distance]
        scale = layer_scale(distance, optim.layer_decay)
        for weight_decay, decayed in ((optim.weight_decay, True), (0.0, False)):
            parameters = [p for name, p in layer if is_decayed(name, p) == decayed]
            if parameters:
                groups.append({"params": parameters, "weight_decay": weight_decay, "lr_scale": scale})
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate `lr` in all groups, times the `lr_scale` of a group that has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


@torch.no_grad()
def clamp_scales(model: nn.Module) -> None:
    """Keep every logit scale at 100 or below."""
    log_scales: nn.ParameterDict = model.log_scales  # type: ignore[assignment]
    for log_scale in log_scales.values():
        log_scale.clamp_(max=LARGEST_LOG_SCALE)
