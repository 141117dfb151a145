"""AdamW, its parameter groups, and the learning rate as a function of the step."""

import math

import torch
from torch import nn

from mlip_cli.config import Optim

NOT_DECAYED = ("cls_token", "reg_token", "pos_embed", "positional_embedding", "kernel", "latent")
"""Last parts of parameter names that are no matrices of a linear map: tokens, positions, global filters."""

LARGEST_LOG_SCALE = math.log(100)
"""Logit scales are clamped here after every step (CLIP)."""


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up, then a cosine to zero; `step` counts from 1 and the last step still moves."""
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = (step - 1 - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """True for matrices of linear maps, convolutions and embeddings."""
    return parameter.ndim > 1 and name.rsplit(".", 1)[-1] not in NOT_DECAYED


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """Fused AdamW with two groups: decayed and not decayed; the caller sets `lr` each step."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if is_decayed(name, p)], "weight_decay": optim.weight_decay},
        {"params": [p for name, p in named if not is_decayed(name, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The same rate for all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def clamp_scales(model: nn.Module) -> None:
    """Keep every logit scale at 100 or below."""
    log_scales: nn.ParameterDict = model.log_scales  # type: ignore[assignment]
    for log_scale in log_scales.values():
        log_scale.clamp_(max=LARGEST_LOG_SCALE)
