"""What a training changes: the model, its optimiser and random numbers, and how far it is."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mlip_cli.distributed import unwrap, whole
from mlip_cli.runs.loading import MergedEncoder, at_rate
from mlip_cli.train.average import WeightAverage
from mlip_cli.train.gradients import Precision


@dataclass(frozen=True)
class Training:
    """What changes while training, apart from the progress."""

    model: nn.Module
    """On `device`, wrapped for several ranks; gives `Encoded` for a `Batch`."""
    optimizer: torch.optim.AdamW
    precision: Precision
    device: torch.device
    average: WeightAverage | None = None
    """The running average of the weights, if the recipe asks for one."""
    decoder: str = ""
    """The decoder of JPEGs, with its version."""

    @property
    def plain(self) -> Any:
        """The model without the wrapper for several ranks."""
        return unwrap(self.model)

    @contextmanager
    def as_measured(self) -> Iterator[MergedEncoder]:
        """The plain model in evaluation mode and at the merge rate of evaluation: whole on every rank, with averaged
        weights if there are any, in the precision of the training.

        All ranks enter and leave together. Inside, each may run the model as often as it likes.
        """
        # the last batch of every data set has a size of its own, for which blocks would be compiled again
        as_written = torch.compiler.set_stance("force_eager")
        with as_written, self.average.applied() if self.average is not None else nullcontext(), whole(self.model):
            yield at_rate(self.plain.eval(), None, dtype=self.precision.dtype)


@dataclass
class Progress:
    """How far the run is; saved with every checkpoint."""

    step: int = 0
    skipped_steps: int = 0
    bad_samples: int = 0
    measured_step: int = -1
    """The last step after which the model was evaluated; 0: the weights that it started from."""
    best: list[tuple[float, int]] = field(default_factory=list)
    """(measure, step) of the best checkpoints, the best one first."""
    best_metric: str | None = None
    """Name of that measure."""
    micro_batch_size: int | None = None
    """The size that was found to fit, if the recipe says auto."""

    @property
    def is_best(self) -> bool:
        """Whether the newest step is one of the best."""
        return any(step == self.step for _, step in self.best)

    def note_best(self, metric: str, value: float, *, keep: int) -> None:
        """Note the newest step's measure if it is one of the `keep` best so far.

        Of equal measures the earlier one is kept. Another metric than before starts a new list.
        """
        if metric != self.best_metric:
            self.best, self.best_metric = [], metric
        ranked = sorted([*self.best, (value, self.step)], key=lambda found: (-found[0], found[1]))
        self.best = ranked[:keep]
