"""The gradient of one global batch, in one pass or by micro-batches with the same result."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mlip_cli.devices import DTYPES, autocast
from mlip_cli.distributed import gradients_kept_back, unwrap
from mlip_cli.losses.features import Features, features_of
from mlip_cli.losses.objective import Objective
from mlip_cli.losses.words import CaptionCounts, begin_count
from mlip_cli.model.text import word_mask
from mlip_cli.recipe.merge_plan import MergePlan
from mlip_cli.types import Batch, Encoded, PartOf

FORWARD = "forward"
FORWARD_WITHOUT_GRAPH = "forward without graph"
LOSSES = "losses"
BACKWARD = "backward"


@dataclass(frozen=True)
class Precision:
    """The number type of the towers; losses compute in at least fp32."""

    dtype: torch.dtype
    scaler: torch.amp.GradScaler
    """Scales the loss for fp16 and does nothing otherwise."""

    @classmethod
    def named(cls, name: str, device: torch.device) -> "Precision":
        """`bf16`, `fp32` or `fp16`."""
        return cls(DTYPES[name], torch.amp.GradScaler(device.type, enabled=name == "fp16"))

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """Mixed precision for the block; nothing for fp32."""
        return autocast(device, self.dtype)


@dataclass(frozen=True)
class RandomState:
    """The state of the generators that dropout and drop path draw from."""

    cpu: Tensor
    cuda: Tensor | None
    mps: Tensor | None = None

    @classmethod
    def read(cls, device: torch.device) -> "RandomState":
        """The current state."""
        return cls(
            cpu=torch.get_rng_state(),
            cuda=torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            mps=torch.mps.get_rng_state() if device.type == "mps" else None,
        )

    def restore(self, device: torch.device) -> None:
        """Go back to the state, so that the same numbers are drawn again."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)
        if self.mps is not None and device.type == "mps":
            torch.mps.set_rng_state(self.mps)


Counting = Callable[[], CaptionCounts | None]
"""Gives the counts of a batch's captions, None if no loss needs them. It may wait for the device."""


def add_gradients(
    model: nn.Module,
    objective: Objective,
    batch: Batch,
    *,
    precision: Precision,
    micro_batch_size: int | None,
    plan: MergePlan,
    part: PartOf = nullcontext,
    counts: Counting | None = None,
) -> dict[str, Tensor]:
    """Add the gradient of the global batch to the parameters; return the terms of this rank, detached.

    Args:
        model: returns `Encoded` for a `Batch`; if it is wrapped for several ranks, gradients become the mean over them.
        batch: this rank's share, on the model's device.
        micro_batch_size: samples per forward pass; None: the whole share.
        plan: merges of this step.
        part: opens a context by name around each part of the work, for a clock.
        counts: what `begin_counting` returned for this batch; None: the captions are counted here.
    """
    batch, counted = captions_counted(objective, batch, counts)
    if micro_batch_size is None or micro_batch_size >= len(batch.images):
        terms = _at_once(model, objective, batch, counted, precision, plan, part)
    else:
        micro_batches = batch.split(micro_batch_size)
        terms = _by_micro_batches(model, objective, micro_batches, counted, precision, plan, part)
    return {name: value.detach() for name, value in terms.items()}


def begin_counting(objective: Objective, batch: Batch) -> Counting:
    """Start to count the captions of the global batch, if a loss needs that."""
    if not objective.counts_captions:
        return lambda: None
    return begin_count(batch.token_ids, word_mask(batch.token_ids))


def captions_counted(
    objective: Objective, batch: Batch, counts: Counting | None = None
) -> tuple[Batch, CaptionCounts | None]:
    """The batch with the words of the global batch if a loss reads them, and the counts of its captions."""
    counted = (counts or begin_counting(objective, batch))()
    if counted is None or not objective.reads_words:
        return batch, counted
    return replace(batch, word_ids=counted.word_ids), counted


def _at_once(
    model: nn.Module,
    objective: Objective,
    batch: Batch,
    counts: CaptionCounts | None,
    precision: Precision,
    plan: MergePlan,
    part: PartOf,
) -> dict[str, Tensor]:
    with part(FORWARD), precision.autocast(batch.images.device):
        encoded: Encoded = model(batch, plan=plan)
    with part(LOSSES):
        terms = objective.batch_terms(_features(objective, encoded, batch), part)
        terms = {**terms, **objective.sample_terms(encoded, batch.token_ids, counts, part)}
        loss = precision.scaler.scale(objective.total(terms))
    with part(BACKWARD):
        loss.backward()
    return terms


def _by_micro_batches(
    model: nn.Module,
    objective: Objective,
    micro_batches: list[Batch],
    counts: CaptionCounts | None,
    precision: Precision,
    plan: MergePlan,
    part: PartOf,
) -> dict[str, Tensor]:
    """Losses over the batch on features cached without graph, then one pass with graph per micro-batch.

    The idea is GradCache's ("Scaling deep contrastive learning batch size under memory limited setup", Gao et al.,
    2021). The second pass repeats the random numbers and merges of the first. Losses inside pairs need no cache.
    """
    device = micro_batches[0].images.device
    states, features, merges = [], [], []
    with part(FORWARD_WITHOUT_GRAPH):
        for own in micro_batches:
            states.append(RandomState.read(device))
            with torch.no_grad(), precision.autocast(device):
                encoded = unwrap(model)(own, plan=plan)
            features.append(_features(objective, encoded, own))
            merges.append(encoded.assign)
        del encoded  # its tokens take most of a micro-batch's memory
    with part(LOSSES):
        whole = Features.joined(features)
        leaves = whole.leaves()
        terms = objective.batch_terms(whole, part)
    gradients: dict[str, Tensor | None] = {}
    if terms:
        with part(LOSSES):
            loss = precision.scaler.scale(objective.total(terms))
        with part(BACKWARD):
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        gradients = dict(zip(leaves, found, strict=True))

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
                sample_terms = objective.sample_terms(encoded, own.token_ids, counts, part)
                surrogates = []
                if gradients:
                    surrogates.append(_features(objective, encoded, own).surrogate(gradients, rows, share=share))
                if sample_terms:
                    surrogates.append(precision.scaler.scale(objective.total(sample_terms)))
            with part(BACKWARD):
                torch.stack(surrogates).sum().backward()
        for name, value in sample_terms.items():
            terms[name] = terms.get(name, 0) + value.detach()
    return terms


def _features(objective: Objective, encoded: Encoded, batch: Batch) -> Features:
    return features_of(encoded, token_losses=objective.batch_token_losses, labels=batch.labels)
