"""The gradient of one global batch: at once, or by micro-batches with the same result."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mlip_cli.distributed import all_sum, gradients_kept_back, unwrap
from mlip_cli.losses.features import Features, ObjectiveLike, TokenFeatures, features_of
from mlip_cli.recipe.merge_plan import MergePlan
from mlip_cli.types import Batch, Encoded

FORWARD = "forward"
FORWARD_WITHOUT_GRAPH = "forward without graph"
LOSSES = "losses"
BACKWARD = "backward"
PartOf = Callable[[str], AbstractContextManager[object]]
"""Name of a part of the step -> a context that is open while it runs."""


@dataclass(frozen=True)
class Precision:
    """What the towers compute in; losses promote to at least fp32 themselves."""

    dtype: torch.dtype
    scaler: torch.amp.GradScaler
    """Of the loss, for fp16; does nothing otherwise."""

    @classmethod
    def named(cls, name: str, device: torch.device) -> "Precision":
        """`bf16`, `fp32` or `fp16`."""
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[name]
        return cls(dtype, torch.amp.GradScaler(device.type, enabled=name == "fp16"))

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """Mixed precision for the block; nothing for fp32."""
        return torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32)


@dataclass(frozen=True)
class RandomState:
    """Generators that dropout and drop path draw from."""

    cpu: Tensor
    cuda: Tensor | None
    mps: Tensor | None = None

    @classmethod
    def read(cls, device: torch.device) -> "RandomState":
        """The state right now."""
        return cls(
            cpu=torch.get_rng_state(),
            cuda=torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            mps=torch.mps.get_rng_state() if device.type == "mps" else None,
        )

    def restore(self, device: torch.device) -> None:
        """Draw again what was drawn after `read`."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)
        if self.mps is not None and device.type == "mps":
            torch.mps.set_rng_state(self.mps)


def add_gradients(
    model: nn.Module,
    objective: ObjectiveLike,
    batch: Batch,
    *,
    precision: Precision,
    micro_batch_size: int | None,
    plan: MergePlan | None = None,
    part: PartOf = nullcontext,
) -> dict[str, Tensor]:
    """Add the gradient of the global batch to the parameters; return the terms of this rank, detached.

    Args:
        model: gives `Encoded` for a `Batch`; wrapped for several ranks its gradients become the mean over them.
        batch: this rank's share, on the model's device.
        micro_batch_size: samples per forward pass, or None for the whole share.
        plan: merges of this step; None: the model's own.
        part: opens a context by name around each part of the work, for a clock.
    """
    if micro_batch_size is None or micro_batch_size >= len(batch.images):
        terms = _at_once(model, objective, batch, precision, plan, part)
    else:
        micro_batches = _split(batch, micro_batch_size)
        terms = _by_micro_batches(model, objective, micro_batches, precision, plan, part)
    return {name: value.detach() for name, value in terms.items()}


def _at_once(
    model: nn.Module,
    objective: ObjectiveLike,
    batch: Batch,
    precision: Precision,
    plan: MergePlan | None,
    part: PartOf,
) -> dict[str, Tensor]:
    with part(FORWARD), precision.autocast(batch.images.device):
        encoded: Encoded = model(batch, plan=plan)
    with part(LOSSES):
        num_captions = all_sum(objective.count_captions(encoded.text_mask))
        terms = objective.batch_terms(_features(objective, encoded, batch))
        terms = {**terms, **objective.sample_terms(encoded, num_captions)}
        loss = precision.scaler.scale(objective.total(terms))
    with part(BACKWARD):
        loss.backward()
    return terms


def _by_micro_batches(
    model: nn.Module,
    objective: ObjectiveLike,
    micro_batches: list[Batch],
    precision: Precision,
    plan: MergePlan | None,
    part: PartOf,
) -> dict[str, Tensor]:
    """Batch-level losses on features cached without graph, then one pass with graph per micro-batch.

    The idea is GradCache's ("Scaling deep contrastive learning batch size under memory limited setup", Gao et al.,
    2021). The second pass replays random numbers and merges of the first. Losses inside pairs need no cache;
    those between the tokens of all pairs cache tokens too.
    """
    device = micro_batches[0].images.device
    states, features, merges, captions = [], [], [], []
    with part(FORWARD_WITHOUT_GRAPH):
        for own in micro_batches:
            states.append(RandomState.read(device))
            with torch.no_grad(), precision.autocast(device):
                encoded = unwrap(model)(own, plan=plan)
            features.append(_features(objective, encoded, own))
            merges.append(encoded.assign)
            captions.append(objective.count_captions(encoded.text_mask))
        del encoded  # its tokens are most of what a micro-batch keeps
    with part(LOSSES):
        num_captions = all_sum(torch.stack(captions).sum())
        cached = _cache(features)
        leaves = _leaves(cached)
        terms = objective.batch_terms(cached)
    gradients: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if terms:
        loss = precision.scaler.scale(objective.total(terms))
        with part(BACKWARD):
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)

    start, share = 0, 1 / len(micro_batches)
    for i, own in enumerate(micro_batches):
        rows = slice(start, start + len(own.images))
        start = rows.stop
        states[i].restore(device)
        is_last = i == len(micro_batches) - 1
        with nullcontext() if is_last else gradients_kept_back(model):
            with part(FORWARD), precision.autocast(device):
                encoded = model(own, plan=plan, assign=merges[i])
            with part(LOSSES):
                sample_terms = objective.sample_terms(encoded, num_captions)
                surrogate = _surrogate(_leaves(_features(objective, encoded, own)), gradients, rows, share=share)
                if sample_terms:
                    surrogate = surrogate + precision.scaler.scale(objective.total(sample_terms))
            with part(BACKWARD):
                surrogate.backward()
        for name, value in sample_terms.items():
            terms[name] = terms.get(name, 0) + value.detach()
    return terms


def _features(objective: ObjectiveLike, encoded: Encoded, batch: Batch) -> Features:
    return features_of(encoded, token_losses=objective.batch_token_losses, labels=batch.labels)


def _split(batch: Batch, size: int) -> list[Batch]:
    images, token_ids = batch.images.split(size), batch.token_ids.split(size)
    labels = [None] * len(images) if batch.labels is None else batch.labels.split(size)
    return [
        replace(batch, images=i, token_ids=t, labels=own) for i, t, own in zip(images, token_ids, labels, strict=True)
    ]


def _cache(parts: list[Features]) -> Features:
    """One `Features` of leaves over the whole share."""
    first = parts[0]
    return Features(
        image=_leaf([p.image for p in parts]),
        text=_leaf([p.text for p in parts]),
        frequency=None if first.frequency is None else _leaf([p.frequency for p in parts if p.frequency is not None]),
        scales={name: _leaf([value]) for name, value in first.scales.items()},
        biases={name: _leaf([value]) for name, value in first.biases.items()},
        labels=None if first.labels is None else torch.cat([p.labels for p in parts if p.labels is not None]),
        tokens=None if first.tokens is None else _cache_tokens([p.tokens for p in parts if p.tokens is not None]),
    )


def _cache_tokens(parts: list[TokenFeatures]) -> TokenFeatures:
    names = list(parts[0].images)
    return TokenFeatures(
        images={name: _leaf([p.images[name] for p in parts]) for name in names},
        sizes={name: torch.cat([p.sizes[name] for p in parts]) for name in names},
        text=_leaf([p.text for p in parts]),
        caption_mask=torch.cat([p.caption_mask for p in parts]),
    )


def _leaf(tensors: list[Tensor]) -> Tensor:
    return torch.cat(tensors).detach().requires_grad_()


def _leaves(features: Features) -> list[Tensor]:
    rows = [features.image, features.text] + ([features.frequency] if features.frequency is not None else [])
    if features.tokens is not None:
        rows += [*features.tokens.images.values(), features.tokens.text]
    return [*rows, *features.scales.values(), *features.biases.values()]


def _surrogate(tensors: list[Tensor], gradients: tuple[Tensor | None, ...], rows: slice, *, share: float) -> Tensor:
    """A scalar whose gradient is the micro-batch's part of the batch-level losses' gradient.

    Features get their rows of it; scales and biases, which every micro-batch sees, an equal share.
    """
    parts = [
        (tensor * (gradient * share if tensor.ndim == 1 else gradient[rows])).sum()
        for tensor, gradient in zip(tensors, gradients, strict=True)
        if gradient is not None
    ]
    return torch.stack([part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts]).sum()
