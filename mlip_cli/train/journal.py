"""Where a training writes what it finds: metrics.jsonl, the panel, TensorBoard and Weights & Biases."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from mlip_cli.terminal.output import warn
from mlip_cli.terminal.panel import TrainingPanel
from mlip_cli.train.metrics import MetricsFile
from mlip_cli.train.trackers import Trackers


@dataclass(frozen=True)
class Journal:
    """Takes the lines of a training; ranks other than 0 have a file without a path and no trackers."""

    file: MetricsFile
    panel: TrainingPanel
    trackers: Trackers
    stall: "StallWarning | None" = None

    def line(self, line: Mapping[str, float]) -> None:
        """The losses, scales and speeds of a step."""
        self.trackers.append(self.file.append(line))
        self.panel.update(line)
        if self.stall is not None:
            self.stall.check(line)

    def glance(self, line: Mapping[str, float]) -> None:
        """Show a line on the panel alone, as that of the first step."""
        self.panel.glance(line)

    def step_done(self, step: int) -> None:
        """Tell the panel that a step is done. Called after every step."""
        self.panel.step_done(step)

    def measures(self, line: Mapping[str, float]) -> None:
        """What the evaluators found after a step; they show it on the panel themselves."""
        self.trackers.append(self.file.append(line))

    @contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Show that a checkpoint is being saved, and then how long it took: a SIGTERM leaves little time for it."""
        self.panel.doing(f"saving the checkpoint of step {step}")
        start_s = time.monotonic()
        yield
        self.panel.doing(None)
        self.panel.measured(step, "checkpoint", f"saved in {time.monotonic() - start_s:.1f} s")


@dataclass(frozen=True)
class StallWarning:
    """Warns once if the contrastive loss is still that of guessing after `patience` steps."""

    global_batch_size: int
    patience: int
    log_every: int

    def check(self, line: Mapping[str, float]) -> None:
        """Look at the line of a step."""
        step, guess = int(line["step"]), math.log(self.global_batch_size)
        is_first = step >= self.patience > step - self.log_every
        if is_first and line["spatial_global"] > 0.99 * guess:
            warn(
                f"step {step}: spatial_global {line['spatial_global']:.3f} is still that of guessing "
                f"(ln {self.global_batch_size} = {guess:.3f}); look at captions, optim.lr and warm-up"
            )
