"""Where the time of a training step goes: the step of training itself, with clocks around its parts.

The clocks are hooks on modules and wrappers around functions. They are there only while a step is timed with them, and
change nothing in what is computed; what they cost is measured against the same step without them.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from itertools import pairwise
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn

from mlip_cli.devices import synchronize
from mlip_cli.losses.features import Features
from mlip_cli.losses.objective import Objective, is_over_batch
from mlip_cli.model.clip import CLIP
from mlip_cli.recipe.config import LOSS_NAMES, Recipe
from mlip_cli.train.gradients import BACKWARD, Precision
from mlip_cli.train.gradients import FORWARD_WITHOUT_GRAPH as FIRST_PASS
from mlip_cli.train.optim import Schedule, build_optimizer, set_learning_rate
from mlip_cli.train.state import Training
from mlip_cli.train.step import COPY, OPTIMIZER, Stepper, StepSettings
from mlip_cli.types import Batch, Encoded

MERGING = "token merging"
TEXT = "text tower"
FREQUENCY = "frequency branch"
HEADS = "token heads"
REST = "masks and pooling"


@dataclass(frozen=True)
class TimedStep:
    """Seconds of one step with clocks."""

    whole_s: float
    """From its start to its end, by one more clock."""
    parts: dict[str, float]


class RepeatedStep:
    """One step as `train` takes it, on one batch again and again, with a learning rate of 0.

    Args:
        batch: where the loader leaves it: in main memory, pinned for CUDA.
    """

    def __init__(self, model: CLIP, recipe: Recipe, batch: Batch, device: torch.device) -> None:
        self.model, self.device, self.batch, self.losses = model, device, batch, recipe.losses
        size = recipe.train.given_micro_batch_size
        self.micro_batch_size = size if size is not None and size < len(batch.images) else None
        """None too where the recipe's are no smaller than this batch."""
        self.precision = Precision.named(recipe.train.precision, device)
        training = Training(model, build_optimizer(model, recipe.optim), self.precision, device)
        set_learning_rate(training.optimizer, 0.0)  # for pieces that only update
        at_rest = Schedule(peak=0.0, warmup_steps=0, total_steps=1)
        settings = StepSettings(at_rest, recipe.optim.clip_grad_norm, len(batch.images), self.micro_batch_size)
        self.stepper = Stepper(training, Objective(recipe.losses), settings)

    def __call__(self) -> None:
        self.stepper.take(self.batch, 1, None)

    def parts_of_step(self, batch: Batch) -> dict[str, Callable[[], None]]:
        """Pieces of the step that can run alone, each with all that it needs at hand; holds one gradient."""
        stepper, optimizer = self.stepper, self.stepper.training.optimizer
        size = self.micro_batch_size or len(batch.images)
        micro_batches = [
            Batch(images, token_ids, keys=())
            for images, token_ids in zip(batch.images.split(size), batch.token_ids.split(size), strict=True)
        ]
        stepper.add_gradients(batch, None)
        gradients = [(parameter, parameter.grad) for parameter in self.model.parameters()]
        optimizer.zero_grad(set_to_none=True)

        def forward() -> None:
            for micro_batch in micro_batches:
                with self.precision.autocast(self.device):
                    self.model(micro_batch)

        def forward_and_backward() -> None:
            stepper.add_gradients(batch, None)
            optimizer.zero_grad(set_to_none=True)

        def update() -> None:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            stepper.update(1)

        return {"training forward": forward, "training forward and backward": forward_and_backward, OPTIMIZER: update}


class StepRecorder:
    """Takes the step with clocks around its parts, again and again."""

    def __init__(self, step: RepeatedStep) -> None:
        self.step = step
        self.clock = PartClock(step.device, undivided=(FIRST_PASS, BACKWARD))
        stepper = step.stepper
        self.stepper = Stepper(stepper.training, TimedObjective(step, self.clock), stepper.settings)
        self.steps: list[TimedStep] = []

    def __call__(self) -> None:
        whole = PartClock(self.step.device)
        with timed_parts(self.step.model, self.clock), whole.part("step"):
            self.stepper.take(self.step.batch, 1, None, self._part)
        self.steps.append(TimedStep(whole.take()["step"], self.clock.take()))

    def _part(self, name: str) -> AbstractContextManager[None]:
        """Copy and optimiser; the parts of the rest have clocks of their own."""
        return self.clock.part(name) if name in (COPY, OPTIMIZER) else nullcontext()


class PartClock:
    """Where the seconds of one call go: every moment counts for the innermost part that is open, and for it alone.

    The device is waited for at every border, so that a part's seconds hold its work and not its queueing.

    Args:
        now: the clock in seconds; `time.thread_time` counts the CPU alone.
        undivided: parts that keep what is opened inside them.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        now: Callable[[], float] = time.perf_counter,
        undivided: Sequence[str] = (),
    ) -> None:
        self.device, self.now, self.undivided = torch.device(device), now, frozenset(undivided)
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    def enter(self, name: str) -> None:
        """Open a part; the one around it stands still."""
        self._border()
        keeps = self._open and self._open[-1] in self.undivided
        self._open.append(self._open[-1] if keeps else name)

    def leave(self) -> None:
        """Close the innermost part; the one around it goes on."""
        self._border()
        self._open.pop()

    def switch(self, name: str) -> None:
        """From now on the innermost part is another one."""
        self._border()
        if self._open[-1] not in self.undivided:
            self._open[-1] = name

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block for a part."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose calls count for a part."""

        @wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            with self.part(name):
                return function(*arguments, **named)

        return call

    def take(self) -> dict[str, float]:
        """Seconds by part since the last time; starts from nothing again."""
        assert not self._open, self._open
        seconds, self.seconds = self.seconds, {}
        return seconds

    def _border(self) -> None:
        synchronize(self.device)
        moment = self.now()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + moment - self._since
        self._since = moment


class TimedObjective:
    """The step's objective, each loss under its own name.

    Every loss is computed by an objective that knows no other, so what the global losses share in training (normalising
    the captions' features, the gather over ranks) is done and counted for each of them: the time of a name is what
    training would take for this loss alone. Values and gradients are those of the whole objective.
    """

    def __init__(self, step: RepeatedStep, clock: PartClock) -> None:
        self.whole, self.clock = step.stepper.objective, clock
        self.batch_token_losses = self.whole.batch_token_losses
        terms = {name: term for name in LOSS_NAMES if (term := getattr(step.losses, name)) is not None}
        alone = {
            name: Objective(step.losses.model_copy(update={other: None for other in LOSS_NAMES if other != name}))
            for name in terms
        }
        self.over_batch = {name: one for name, one in alone.items() if is_over_batch(terms[name])}
        self.inside_pairs = {name: one for name, one in alone.items() if name not in self.over_batch}

    def batch_terms(self, features: Features) -> dict[str, Tensor]:
        """As `Objective.batch_terms`."""
        terms: dict[str, Tensor] = {}
        for name, one in self.over_batch.items():
            with self.clock.part(name):
                terms |= one.batch_terms(features)
        return terms

    def sample_terms(self, encoded: Encoded, num_captions: Tensor) -> dict[str, Tensor]:
        """As `Objective.sample_terms`."""
        terms: dict[str, Tensor] = {}
        for name, one in self.inside_pairs.items():
            with self.clock.part(name):
                terms |= one.sample_terms(encoded, num_captions)
        return terms

    def count_captions(self, text_mask: Tensor) -> Tensor:
        """As `Objective.count_captions`."""
        return self.whole.count_captions(text_mask)

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """As `Objective.total`."""
        return self.whole.total(terms)


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
        groups[FIRST_PASS] = "forward"
    for block, name in enumerate(stage_names(model), start=1):
        if block in model.training_plan.merges:
            groups[MERGING] = "forward"
        groups[name] = "forward"
    groups |= {FREQUENCY: "forward"} if model.frequency is not None else {}
    groups[TEXT] = "forward"
    groups |= {HEADS: "forward"} if len(model.token_projections) else {}
    groups[REST] = "forward"
    groups |= {name: "losses" for name in LOSS_NAMES if getattr(step.losses, name) is not None}
    return groups | {BACKWARD: "backward", OPTIMIZER: "optimizer"}


@contextmanager
def timed_parts(model: CLIP, clock: PartClock) -> Iterator[None]:
    """Clocks around the parts of the forward and the backward pass inside the block; none afterwards.

    The first stage has normalising and embedding of the pixels, the last one norm, pooling and projection. A merge is
    what happens between two blocks, and before the first one where the guidance is made ready; showing keys and
    attention to it belongs to the block that shows them. A forward pass without graph is one part. What is between all
    these (word masks, pooling of texts, logit scales) is `masks and pooling`.
    """
    stages = stage_names(model)
    with ExitStack() as stack:

        def time_module(module: nn.Module | None, enter: Callable[[], None], leave: Callable[[], None]) -> None:
            if module is not None:
                before = module.register_forward_pre_hook(lambda module, arguments: enter())
                after = module.register_forward_hook(lambda module, arguments, result: leave(), always_call=True)
                stack.callback(before.remove)
                stack.callback(after.remove)

        def time_as(name: str, *modules: nn.Module | None) -> None:
            for module in modules:
                time_module(module, lambda: clock.enter(name), clock.leave)

        time_module(model, lambda: clock.enter(REST if torch.is_grad_enabled() else FIRST_PASS), clock.leave)
        _time_image_tower(model, clock, stages, time_module)
        time_as(stages[0], model.vision.trunk.norm_pre)
        time_as(stages[-1], model.image_projection)
        time_as(TEXT, model.text, model.text_projection)
        time_as(FREQUENCY, model.frequency, model.frequency_projection)
        time_as(HEADS, *model.token_projections.values())
        for owner, method in ((model, "normalize"), (model.vision, "embed")):
            stack.enter_context(replaced(owner, method, clock.timed(stages[0], getattr(owner, method))))
        for function in ("backward", "grad"):
            timed = clock.timed(BACKWARD, getattr(torch.autograd, function))
            stack.enter_context(replaced(torch.autograd, function, timed))
        yield


def _time_image_tower(
    model: CLIP,
    clock: PartClock,
    stages: list[str],
    time_module: Callable[[nn.Module, Callable[[], None], Callable[[], None]], None],
) -> None:
    """Blocks by stage, and what is between them."""
    merges = model.training_plan.merges

    def after_block(block: int) -> str:
        """What comes next in the tower."""
        return MERGING if block + 1 in merges else stages[min(block, len(stages) - 1)]

    def leave(block: int) -> None:
        clock.leave()
        clock.switch(after_block(block))

    time_module(model.vision, lambda: clock.enter(MERGING if merges else stages[0]), clock.leave)
    for block, module in enumerate(cast(nn.ModuleList, model.vision.trunk.blocks), start=1):
        time_module(
            module,
            lambda block=block: clock.enter(stages[block - 1]),  # type: ignore[misc]
            lambda block=block: leave(block),  # type: ignore[misc]
        )


def breakdown(
    steps: Sequence[TimedStep],
    groups: Mapping[str, str],
    *,
    loader_s: Mapping[str, float] | None,
    loader_is_apart: bool,
) -> dict[str, Any]:
    """Seconds of each part, its share of the whole step, and what no part accounts for.

    The whole is the median over steps, a part its median share of a step times the whole: what slows a step down as a
    whole (a busy machine) then moves no part against the others. With `unaccounted` the parts add up exactly. It holds
    what is outside of all parts (the calls between them, freeing what the step held: `outside_s`, by its median share
    too), and that medians do not add up, for which it can be negative.

    Args:
        groups: the parts of the step, in order, and the group of each.
        loader_s: seconds by part that making one batch takes; None without data.
        loader_is_apart: other processes make the batches while the step runs, so that their parts add nothing to it;
            their shares say how much of the step's time they are busy.
    """
    compute_s = median(step.whole_s for step in steps)
    whole_s = compute_s + (0.0 if loader_is_apart else sum((loader_s or {}).values()))

    def typical(seconds: Iterable[float]) -> float:
        """Median share of a step, in seconds of the median step; one value a step comes in."""
        return compute_s * median(value / step.whole_s for value, step in zip(seconds, steps, strict=True))

    def row(part: str, group: str, seconds: float, in_step: bool) -> dict[str, Any]:
        return {"part": part, "group": group, "seconds": seconds, "share": seconds / whole_s, "in_step": in_step}

    rows = [row(part, "data", seconds, not loader_is_apart) for part, seconds in (loader_s or {}).items()]
    rows += [row(part, group, typical(s.parts.get(part, 0.0) for s in steps), True) for part, group in groups.items()]
    left_s = whole_s - sum(line["seconds"] for line in rows if line["in_step"])
    return {
        "whole_s": whole_s,
        "breakdown": rows,
        "unaccounted": {
            "seconds": left_s,
            "share": left_s / whole_s,
            "outside_s": typical(step.whole_s - sum(step.parts.values()) for step in steps),
        },
    }


def limit(
    rows: Sequence[Mapping[str, Any]], *, step_per_s: float, loader_per_s: float | None, num_workers: int
) -> dict[str, str]:
    """Which part the training waits for, and why: data, or the largest part of the computation.

    Args:
        rows: of `breakdown`.
        step_per_s: images a second of the step without clocks and without data.
        loader_per_s: images a second that the loader makes; None without data.
        num_workers: loader processes; with 0 the step waits for every batch, so the larger of both is the limit.
    """
    largest = max((row for row in rows if row["group"] != "data"), key=lambda row: row["seconds"])
    takes = f"{largest['share']:.0%} of the step"
    if loader_per_s is None:
        return {"part": largest["part"], "why": f"{takes}; there is no data to compare with"}
    data = [row for row in rows if row["group"] == "data" and row["part"] != COPY]
    most = max(data, key=lambda row: row["seconds"])
    share = most["seconds"] / sum(row["seconds"] for row in data)
    who = {0: "the training process itself", 1: "1 loader process"}.get(num_workers, f"{num_workers} loader processes")
    verb, whose = ("makes", "its") if num_workers < 2 else ("make", "their")
    speeds = f"{who} {verb} {loader_per_s:,.0f} images/s, the step takes {step_per_s:,.0f}"
    if loader_per_s < step_per_s:
        return {"part": "data", "why": f"{speeds}; {most['part']} is {share:.0%} of {whose} time"}
    return {"part": largest["part"], "why": f"{takes}; {speeds}"}


@contextmanager
def replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """`owner.name` is `function` inside the block, and afterwards exactly what it was: nothing of its own, say."""
    is_own = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
