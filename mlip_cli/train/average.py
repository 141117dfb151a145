"""A running average of the weights, which is often better than the last weights (Polyak and Juditsky, 1992)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mlip_cli.distributed import full_on_main, local, sharded_like


class WeightAverage:
    """Average of what trains in `model` over the last `horizon` samples or so.

    After n samples the newest weights count with batch / min(n, horizon): until n reaches the horizon this is the mean
    of the weights after every step, later an exponential average that forgets over `horizon` samples.
    """

    def __init__(self, model: nn.Module, *, horizon: int) -> None:
        self.horizon = horizon
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._averages = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, *, samples_seen: int, batch_size: int) -> None:
        """Take in the weights after a step, the last of `samples_seen`, over `batch_size`."""
        newest = batch_size / min(max(self.horizon, batch_size), samples_seen)
        averages, weights = ([local(t) for t in tensors] for tensors in (self._averages.values(), self._own()))
        get_ema_multi_avg_fn(1 - newest)(averages, weights, samples_seen)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """For the block, the model has the averaged weights; afterwards its own again, to the bit."""
        own = [local(p).detach().clone() for p in self._own()]
        self._set([local(average) for average in self._averages.values()])
        try:
            yield
        finally:
            self._set(own)

    def weights(self) -> dict[str, Tensor]:
        """The averages by the names of their parameters, whole on rank 0 (see `full_on_main`)."""
        return full_on_main(self._averages)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Go on from `weights()`."""
        for name, average in self._averages.items():
            average.copy_(sharded_like(weights[name], average))

    def _own(self) -> list[nn.Parameter]:
        return list(self._parameters.values())

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._own(), values, strict=True):
            local(parameter).copy_(value)
