"""One training step, taken again and again: whole, in pieces that run alone, and with a clock on its parts.

The step marks its own parts, and each loss marks its own. Forward hooks on modules mark the stages of the model; they
are there only while a step runs with the clock. None of them changes what is computed.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import nn

from mlip_cli.devices import synchronize
from mlip_cli.losses.objective import Objective
from mlip_cli.model.clip import CLIP
from mlip_cli.profiling.clock import PartClock
from mlip_cli.recipe.config import Recipe
from mlip_cli.train.ahead import COPY
from mlip_cli.train.gradients import (
    BACKWARD,
    FORWARD,
    FORWARD_WITHOUT_GRAPH,
    LOSSES,
    Precision,
    captions_counted,
)
from mlip_cli.train.optim import Schedule, build_optimizer, set_learning_rate
from mlip_cli.train.state import Training
from mlip_cli.train.step import OPTIMIZER, Stepper, StepSettings
from mlip_cli.types import Batch, PartOf

TOKEN_MERGING = "token merging"
TEXT_TOWER = "text tower"
FREQUENCY_BRANCH = "frequency branch"
TOKEN_HEADS = "token heads"
OTHER_FORWARD = "masks and pooling"
SHARED_BY_LOSSES = "shared by all losses"

REMAINDERS = {FORWARD: OTHER_FORWARD, LOSSES: SHARED_BY_LOSSES}
"""What is left of a part of the step when the parts inside it are taken out."""


class RepeatedStep:
    """One step as `train` takes it, on one batch again and again, with a learning rate of 0.

    Args:
        batch: where the loader leaves it: in main memory, pinned for CUDA.
    """

    def __init__(self, model: CLIP, recipe: Recipe, batch: Batch, device: torch.device) -> None:
        self.model, self.device, self.batch, self.plan = model, device, batch, model.training_plan
        size = recipe.train.given_micro_batch_size
        self.micro_batch_size = size if size is not None and size < len(batch.images) else None
        """None if this batch fits into one micro-batch of the recipe."""
        self.precision = Precision.named(recipe.train.precision, device)
        training = Training(model, build_optimizer(model, recipe.optim), self.precision, device)
        set_learning_rate(training.optimizer, 0.0)  # for the piece that only updates
        at_rest = Schedule(peak=0.0, warmup_steps=0, total_steps=1)
        settings = StepSettings(at_rest, recipe.optim.clip_grad_norm, len(batch.images), self.micro_batch_size)
        self.objective = Objective(recipe.losses)
        self.stepper = Stepper(training, self.objective, settings)

        self._ready = self.stepper.copy(batch)

    def __call__(self, part: PartOf = nullcontext) -> None:
        """One step; as in training the copy of the next batch begins before it. `part` is for a clock."""
        ready, self._ready = self._ready, self.stepper.copy(self.batch, part)
        self.stepper.take(ready, 1, self.plan, part)

    def pieces(self, batch: Batch) -> dict[str, Callable[[], None]]:
        """Functions that run a piece of the step alone, on a batch that lies on the device; they hold a gradient."""
        stepper, optimizer = self.stepper, self.stepper.training.optimizer
        size = self.micro_batch_size or len(batch.images)
        micro_batches = captions_counted(self.objective, batch)[0].split(size)
        stepper.add_gradients(batch, self.plan)
        gradients = [(parameter, parameter.grad) for parameter in self.model.parameters()]
        optimizer.zero_grad(set_to_none=True)

        def forward() -> None:
            for micro_batch in micro_batches:
                with self.precision.autocast(self.device):
                    self.model(micro_batch, self.plan)

        def forward_and_backward() -> None:
            stepper.add_gradients(batch, self.plan)
            optimizer.zero_grad(set_to_none=True)

        def update() -> None:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            stepper.update(1)

        return {"training forward": forward, "training forward and backward": forward_and_backward, OPTIMIZER: update}


@dataclass(frozen=True)
class ClockedSeconds:
    """Seconds of one step with the clock."""

    whole_s: float
    """From its start to its end."""
    parts: dict[str, float]


class ClockedStep:
    """Takes the step with a clock on its parts; every call adds to `seconds`."""

    def __init__(self, step: RepeatedStep) -> None:
        self.step = step
        self.clock = PartClock(step.device, undivided=(FORWARD_WITHOUT_GRAPH, BACKWARD))
        self.seconds: list[ClockedSeconds] = []

    def __call__(self) -> None:
        with stages_marked(self.step.model, self.clock.switch):
            start = self._now()
            self.step(self._part)
            whole_s = self._now() - start
        self.seconds.append(ClockedSeconds(whole_s, self.clock.take()))

    def _part(self, name: str) -> AbstractContextManager[None]:
        return self.clock.part(REMAINDERS.get(name, name))

    def _now(self) -> float:
        synchronize(self.step.device)
        return self.clock.now()


def stage_names(model: CLIP) -> list[str]:
    """Of each block, the stage it is in: `image tower, blocks 1-2`; stages are the blocks between two merges."""
    borders = [1, *model.training_plan.at, model.vision.depth + 1]
    names = []
    for first, end in pairwise(borders):
        blocks = f"blocks {first}-{end - 1}" if end - first > 1 else f"block {first}"
        names += [f"image tower, {blocks}"] * (end - first)
    return names


def step_parts(step: RepeatedStep) -> dict[str, str]:
    """Part of the step -> its group, in the order of the step."""
    model, groups = step.model, {COPY: "data"}
    if step.micro_batch_size is not None:
        groups[FORWARD_WITHOUT_GRAPH] = "forward"
    for block, name in enumerate(stage_names(model), start=1):
        if block in model.training_plan.merges:
            groups[TOKEN_MERGING] = "forward"
        groups[name] = "forward"
    groups |= {FREQUENCY_BRANCH: "forward"} if model.frequency is not None else {}
    groups[TEXT_TOWER] = "forward"
    groups |= {TOKEN_HEADS: "forward"} if len(model.token_projections) else {}
    groups[OTHER_FORWARD] = "forward"
    groups |= dict.fromkeys([*step.objective.terms, SHARED_BY_LOSSES], "losses")
    return groups | {BACKWARD: "backward", OPTIMIZER: "optimizer"}


@contextmanager
def stages_marked(model: CLIP, switch: Callable[[str], None]) -> Iterator[None]:
    """Call `switch` with the name of the part that comes next, at the borders of all stages of a forward pass.

    The first stage includes all work on pixels before the blocks: normalising, embedding, and the block DCT if branch
    and guidance share it. The last one includes norm, pooling and projection. Merging is the time between two blocks,
    and before the first one, where the guidance is made ready; a block that returns keys and attention for a merge does
    so in its own time. `masks and pooling` is the rest: word masks, pooling of texts, logit scales.
    """
    hooks = []
    for module, own, after in _stages(model):
        hooks.append(module.register_forward_pre_hook(partial(_switch, switch, own)))
        hooks.append(module.register_forward_hook(partial(_switch, switch, after)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _switch(switch: Callable[[str], None], name: str, *_: object) -> None:
    switch(name)


def _stages(model: CLIP) -> list[tuple[nn.Module, str, str]]:
    """(module, the part that it belongs to, the part that comes after it), outer modules before inner ones."""
    tower, names, merges = model.vision, stage_names(model), model.training_plan.merges
    found: list[tuple[nn.Module, str, str]] = [(model, names[0], OTHER_FORWARD), (tower, names[0], OTHER_FORWARD)]
    found.append((tower.trunk.norm_pre, names[0], TOKEN_MERGING if merges else names[0]))
    for block, (module, own) in enumerate(zip(tower.trunk.blocks, names, strict=True), start=1):
        found.append((module, own, TOKEN_MERGING if block + 1 in merges else [*names, own][block]))
    found.append((model.image_projection, names[-1], OTHER_FORWARD))
    rest = {
        TEXT_TOWER: (model.text, model.text_projection),
        FREQUENCY_BRANCH: (model.frequency, model.frequency_projection),
        TOKEN_HEADS: model.token_projections.values(),
    }
    return found + [
        (module, own, OTHER_FORWARD) for own, modules in rest.items() for module in modules if module is not None
    ]
