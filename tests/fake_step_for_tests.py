"""One whole rank of eight on fake CUDA tensors: what makes the host wait for the device.

A program of its own: it reads a JSON list of [RECIPE, micro-batch size], and prints one of what waited in each. Fake
tensors know shape, type and device and compute nothing, so no driver is needed. The fake process group answers
collectives at once. PyTorch's engine for gradients does need a driver, so the backward pass is left out.
"""

import json
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from fake_cuda_for_tests import CUDA, autocast_rules_of_cuda, move_without_storage
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from mlip_cli.losses import words
from mlip_cli.losses.objective import Objective
from mlip_cli.model.blocks import set_fused_attention
from mlip_cli.model.clip import build_model
from mlip_cli.recipe.config import Recipe
from mlip_cli.recipe.load import load_recipe
from mlip_cli.train import gradients, signals
from mlip_cli.train.ahead import ReadyBatch
from mlip_cli.train.average import WeightAverage
from mlip_cli.train.gradients import Precision, RandomState, begin_counting
from mlip_cli.train.noise import noise_batch
from mlip_cli.train.optim import Schedule, build_optimizer
from mlip_cli.train.setup import plan_by_step
from mlip_cli.train.signals import StopRequest
from mlip_cli.train.state import Training
from mlip_cli.train.step import Stepper, StepSettings

aten = torch.ops.aten
RANKS = 8
WORDS = 100
"""The number of words that a batch is said to have; the device counts them, and the host reads it a step later."""


class Waits(TorchDispatchMode):
    """Counts the operations for which the host waits until the device is done, by operation and line."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if waits(operation, args, kwargs or {}):
            frame = [frame for frame in traceback.extract_stack() if "mlip_cli" in frame.filename][-1]
            self.found[f"{operation} {Path(frame.filename).name}: {frame.line}"] += 1
        return operation(*args, **(kwargs or {}))


def waits(operation: Any, args: Sequence[Any], named: Mapping[str, Any]) -> bool:
    """Whether an operation copies between the host and the device at once, or has an output whose size is data."""
    if operation is aten._to_copy.default:
        to = named.get("device")
        return to is not None and torch.device(to).type != args[0].device.type and not named.get("non_blocking")
    if operation is aten.copy_.default:
        return args[0].device.type != args[1].device.type and not any(args[2:])
    sized_by_data = (aten.nonzero.default, aten.bincount.default, aten._unique2.default, aten.masked_select.default)
    return operation in (aten._local_scalar_dense.default, *sized_by_data)


def fake_fetched(x: Tensor) -> Callable[[], int]:
    """What the host reads a step later; pinned memory and events need a driver."""
    return lambda: WORDS if x.shape == () and x.dtype == torch.int64 else 0


def waits_of(recipe: Recipe, micro_batch_size: int | None) -> dict[str, int]:
    """What made the host wait in one step and the vote after it."""
    objective = Objective(recipe.losses)
    model = build_model(recipe)
    with FakeTensorMode(allow_non_fake_inputs=True):
        move_without_storage(model)
        set_fused_attention(model, True)
        average = WeightAverage(model, horizon=10_000)
        precision = Precision(torch.bfloat16, torch.amp.GradScaler("cuda", enabled=False))
        training = Training(model, build_optimizer(model, recipe.optim), precision, CUDA, average)
        settings = StepSettings(Schedule(1e-3, 2, 10), 1.0, 8 * RANKS, micro_batch_size)
        stepper = Stepper(training, objective, settings)
        batch = noise_batch(recipe, batch_size=8, num_tokens=48, device=CUDA, lengths=(4, 9, 9, 15, 20, 30, 44, 48))
        plan = plan_by_step(recipe.model.merging, model, 10)(5)
        stop = StopRequest(CUDA)
        with Waits() as waits_found:
            stepper.take(ReadyBatch(batch, begin_counting(objective, batch)), 5, plan)
            stop.agreed(save=False)
    return dict(waits_found.found)


def main() -> None:
    """Answer what stands on standard input."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(RANKS)}
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    state = RandomState(torch.get_rng_state(), None)
    found = []
    for name, micro_batch_size in json.load(sys.stdin):
        recipe = load_recipe(name, ["model.vision.timm=vit_tiny_patch16_224", "model.text.depth=2"]).recipe
        with (
            patch.object(torch.Tensor, "backward", lambda *_, **__: None),
            patch.object(torch.autograd, "grad", lambda loss, leaves, **_: [torch.empty_like(leaf) for leaf in leaves]),
            patch.object(Precision, "autocast", lambda *_: autocast_rules_of_cuda()),
            patch.object(gradients.RandomState, "read", lambda _: state),
            patch.object(signals, "fetched", fake_fetched),
            patch.object(words, "fetched", fake_fetched),
            patch("mlip_cli.train.step.Copier", lambda *_: None),  # it makes a stream
        ):
            found.append(waits_of(recipe, micro_batch_size))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
