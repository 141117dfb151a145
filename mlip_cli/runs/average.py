"""Averages of weights: between a start and what was tuned from it, or of several runs (soups).

Wortsman et al. (CVPR 2022, "Robust fine-tuning of zero-shot models"; ICML 2022, "Model soups"): on the way from the
start to the tuned weights there are models that keep most of what tuning gained and lose little of what the start knew.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlip_cli.errors import UsageError
from mlip_cli.files import full_disk_named, temporary_path, write_bytes, write_json
from mlip_cli.runs.checkpoint import load_weights, save_checkpoint
from mlip_cli.runs.folder import RUNS, Run, now, remember_latest
from mlip_cli.runs.loading import LoadedRun, MergedEncoder, load_run
from mlip_cli.runs.recording import made_with
from mlip_cli.runs.start import command_line
from mlip_cli.types import ImageFeatures

Weights = Mapping[str, Tensor]


def check_same_tensors(weights: Mapping[str, Weights]) -> None:
    """Check that all have the same finite tensors, and that whole numbers among them are equal.

    Args:
        weights: by what messages call the run.

    Raises:
        UsageError: they cannot be averaged; the message names run and tensor.
    """
    (first, own), *others = weights.items()
    for run, tensors in weights.items():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise UsageError(f"{run}: {name} is not finite: the weights are damaged; name an earlier checkpoint")
    for other, tensors in others:
        lone = sorted(own.keys() ^ tensors.keys())
        if lone:
            where = first if lone[0] in own else other
            raise UsageError(
                f"{other}: other tensors than {first}: {len(lone)} are in one of them alone, such as {lone[0]} in "
                f"{where}; average runs whose recipes have the same model and losses"
            )
        for name, tensor in tensors.items():
            if tensor.shape != own[name].shape:
                shapes = " x ".join(map(str, tensor.shape)), " x ".join(map(str, own[name].shape))
                raise UsageError(
                    f"{other}: {name} is {shapes[0]}, and {shapes[1]} in {first}; average runs of one architecture"
                )
            if not tensor.is_floating_point() and not torch.equal(tensor, own[name]):
                raise UsageError(
                    f"{other}: {name} holds whole numbers that differ from those in {first}, and whole numbers have no "
                    "average; average runs that agree in them"
                )


def averaged(weights: Sequence[Weights], coefficients: tuple[float, ...]) -> dict[str, Tensor]:
    """The weighted sum, tensor by tensor, in fp32. One run alone comes back to the bit, and so does what all share.

    Logit scales are averaged like the rest, as the logarithms that training learns. The tensors have passed
    `check_same_tensors`.

    Args:
        coefficients: one a run; their sum is 1.
    """
    alone = [own for own, share in zip(weights, coefficients, strict=True) if share == 1]
    if alone:
        return {name: tensor.clone() for name, tensor in alone[0].items()}
    return {name: _mean([own[name] for own in weights], coefficients) for name in weights[0]}


def _mean(tensors: Sequence[Tensor], coefficients: tuple[float, ...]) -> Tensor:
    """The first tensor plus its share of the way to each other one."""
    first, *others = tensors
    if not first.is_floating_point():
        return first.clone()
    mean = first.float()
    for other, share in zip(others, coefficients[1:], strict=True):
        if share:
            mean = mean + share * (other.float() - first.float())
    return mean.clone() if mean is first else mean


@dataclass
class Mixture:
    """A model that takes the weights of an average when an encoder of it is used: one model for many averages."""

    encoder: MergedEncoder
    weights: Sequence[Weights]
    """Of the runs, on the model's device."""
    _current: tuple[float, ...] | None = field(default=None, init=False)

    @torch.no_grad()
    def become(self, coefficients: tuple[float, ...]) -> MergedEncoder:
        """The encoder with these weights."""
        if coefficients != self._current:
            own = self.encoder.model.state_dict()
            for name, tensor in averaged(self.weights, coefficients).items():
                own[name].copy_(tensor)
            self._current = coefficients
        return self.encoder


def load_mixture(
    checkpoints: Mapping[str, Path], *, device: str, precision: str | None = None
) -> tuple[LoadedRun, Mixture]:
    """The model of the last checkpoint, and the weights of all: those to evaluate, averaged over steps if they are.

    Args:
        checkpoints: folders by what messages call them.
        precision: see `load_run`.

    Raises:
        UsageError: a checkpoint is damaged, or the weights have no average (see `check_same_tensors`).
    """
    weights = {label: load_weights(folder) for label, folder in checkpoints.items()}
    check_same_tensors(weights)
    loaded = load_run(str(list(checkpoints.values())[-1]), device=device, precision=precision)
    moved = [{name: tensor.to(loaded.device) for name, tensor in own.items()} for own in weights.values()]
    return loaded, Mixture(loaded.at_rate(None), moved)


@dataclass(frozen=True)
class AveragedEncoder:
    """An encoder with the weights of one average. Several of a mixture may take turns on each batch."""

    mixture: Mixture
    coefficients: tuple[float, ...]

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 or normalised -> (B, E) spatial features."""
        return self.mixture.become(self.coefficients).encode_image(images)

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """(B, L) -> (B, E)"""
        return self.mixture.become(self.coefficients).encode_text(token_ids)

    def image_features(self, images: Tensor) -> ImageFeatures:
        """Features of both domains."""
        return self.mixture.become(self.coefficients).image_features(images)


def write_averaged_run(out: Path, like: Run, *, step: int, weights: dict[str, Tensor], origin: dict[str, Any]) -> None:
    """Write a run folder that holds an average: whole, or not at all.

    Args:
        like: the run whose recipe and data cards it takes.
        step: of the checkpoint, which gives it its name.
        origin: the runs and their shares.

    Raises:
        UsageError: the folder has been made meanwhile.
        RunError: the disk is full.
    """
    temporary = temporary_path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with full_disk_named(out, "make room and repeat the command: what was measured is kept"):
            temporary.mkdir()
            run = Run(temporary)
            run.evals.mkdir()
            for path in (like.recipe, like.tokenizer, like.data_cards):
                if path.is_file():
                    write_bytes(temporary / path.name, path.read_bytes())
            session = {"command": command_line(), "started": now()}
            stamp = like.read_stamp()
            made = {"seed": stamp.seed, "data": stamp.data, "started": session["started"], "ended": now()}
            write_json(run.stamp, {**made_with(), **made, "end_reason": "averaged", "sessions": [session]})
            save_checkpoint(run.checkpoints, step=step, weights=weights, origin=origin)
        if out.exists():
            raise UsageError(f"--out {out}: exists already; name another folder")
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if out.absolute().parent == RUNS.absolute():
        remember_latest(Run(out))
