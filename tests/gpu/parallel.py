"""Rows about several ranks, as far as one GPU can show them: DDP and FSDP in a group of one rank."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from gpu.rows import Found, Scale
from gpu.trainings import EAGER, recipe_of, stepper_of, steps_of, web_batch

from mlip_cli import distributed
from mlip_cli.devices import pick_device
from mlip_cli.distributed import COLLECTIVE_TIMEOUT, full_on_main, parallel
from mlip_cli.recipe.config import Recipe
from mlip_cli.runs.folder import checkpoint_name
from mlip_cli.train.resume import Saver, restore
from mlip_cli.train.state import Progress
from mlip_cli.train.step import Stepper
from mlip_cli.types import Batch

STEPS = 3


@contextmanager
def one_rank(device: torch.device) -> Iterator[None]:
    """A group of this process alone, of the backend that training takes on the device."""
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        store=dist.HashStore(),
        rank=0,
        world_size=1,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device if is_cuda else None,
    )
    yield
    dist.destroy_process_group()


def wrapped(recipe: Recipe, device: torch.device) -> Stepper:
    """A training whose model is wrapped as for several ranks; `wrap` leaves that of a single process as it is."""
    with patch.object(distributed, "world_size", lambda: 2):
        return stepper_of(recipe, device)


def features(stepper: Stepper, batch: Batch, device: torch.device) -> torch.Tensor:
    """Of pictures, as an evaluation during training computes them."""
    with torch.no_grad(), stepper.training.as_measured() as encoder:
        found = encoder.encode_image(batch.images.to(device)).float().cpu()
    stepper.training.model.train()
    return found


def wrapped_training(scale: Scale, *, kind: str) -> Found:
    """Steps, a checkpoint, a second training that goes on from it, and an evaluation of both."""
    device = pick_device(scale.device_type)
    recipe = recipe_of("cc12m", scale, EAGER, f"train.parallel={kind}")
    batch = web_batch(recipe, device, batch_size=scale.small_batch_size)
    with one_rank(device), tempfile.TemporaryDirectory() as name:
        first, second = wrapped(recipe, device), wrapped(recipe, device)
        kinds = {parallel(own.training.model) for own in (first, second)}
        steps_of(first, batch, steps=STEPS)()
        Saver(Path(name), recipe.train, first.training, data={}, best_metric=None).save(Progress(step=STEPS))
        progress, _ = restore(Path(name, checkpoint_name(STEPS)), second.training, data={})
        saved, restored = (full_on_main(own.training.plain.state_dict()) for own in (first, second))
        is_same = all(torch.equal(value.cpu(), restored[key].cpu()) for key, value in saved.items())
        seen = [features(own, batch, device) for own in (first, second)]
        difference = (seen[0] - seen[1]).norm() / seen[0].norm()
        skipped = first.guard.skipped.item()
        steps_of(second, batch, steps=1)()
    return Found(
        f"{STEPS} steps, checkpoint restored, features differ by {difference.item():.1e}",
        statements={
            f"the model is wrapped for {kind}": kinds == {kind},
            "a restored training has the same weights": is_same and progress.step == STEPS,
            "it has the same features": difference.item() < 1e-2,
            "no step was skipped": skipped == 0,
        },
        figures={"difference": difference.item()},
    )


ddp_training = partial(wrapped_training, kind="ddp")
fsdp_training = partial(wrapped_training, kind="fsdp")
