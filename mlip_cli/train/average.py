"""A running average of the weights; it is often better than the last weights (Polyak and Juditsky, 1992)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mlip_cli.distributed import full_on_main, local, sharded_like


class WeightAverage:
    """Average of the trained parameters of `model` over about the last `horizon` samples.

    After n samples the newest weights have the share batch / min(n, horizon). Until n reaches the horizon this is the
    mean of the weights after every step; later it is an exponential average over about `horizon` samples.
    """

    def __init__(self, model: nn.Module, *, horizon: int) -> None:
        self.horizon = horizon
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._averages = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, *, samples_seen: int, batch_size: int) -> None:
        """Add the weights after a step of `batch_size` samples, the last ones of `samples_seen`."""
        newest = batch_size / min(max(self.horizon, batch_size), samples_seen)
        averages, weights = ([local(t) for t in tensors] for tensors in (self._averages.values(), self._own()))
        get_ema_multi_avg_fn(1 - newest)(averages, weights, samples_seen)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """In the block the model has the averaged weights; afterwards it has its own again, to the bit."""
        own = [local(p).detach().clone() for p in self._own()]
        self._set([local(average) for average in self._averages.values()])
        try:
            yield
        finally:
            self._set(own)

    def weights(self) -> dict[str, Tensor]:
        """The averages by the names of the parameters, whole on rank 0 (see `full_on_main`)."""
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
