"""A row about waiting: with the vote on stopping, no step makes this process wait for the device."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from gpu.parallel import one_rank
from gpu.rows import Found, Scale
from gpu.trainings import EAGER, recipe_of, stepper_of, web_batch

from mlip_cli import distributed
from mlip_cli.devices import pick_device
from mlip_cli.train import signals
from mlip_cli.train.ahead import one_ahead
from mlip_cli.train.signals import Asked, StopRequest

STEPS, WARM_UP = 3, 3


@contextmanager
def waits_raise(device: torch.device) -> Iterator[None]:
    """For the block an operation that waits for a CUDA device raises an error, as far as PyTorch notices it."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def steps_without_waiting(scale: Scale) -> Found:
    """Steps of MLIP and the votes after them, in a group of one rank that believes to be one of two when it votes."""
    device = pick_device(scale.device_type)
    recipe = recipe_of("cc12m", scale, EAGER)
    stepper, stop = stepper_of(recipe, device), StopRequest(device)
    plan = stepper.training.plain.training_plan
    batch = web_batch(recipe, device, batch_size=scale.small_batch_size)
    votes: list[Asked] = []

    def vote() -> None:
        with patch.object(distributed, "world_size", lambda: 2), patch.object(signals, "world_size", lambda: 2):
            votes.append(stop.agreed(save=True))

    with one_rank(device):
        ready = one_ahead(iter([batch] * (WARM_UP + STEPS)), stepper.copy)
        for step in range(1, WARM_UP + 1):
            stepper.take(next(ready), step, plan)
            vote()
        with waits_raise(device):
            for step in range(WARM_UP + 1, WARM_UP + STEPS + 1):
                stepper.take(next(ready), step, plan)
                vote()
    skipped = stepper.guard.skipped.item()
    return Found(
        f"{STEPS} steps, none waited",
        statements={
            "no operation of a step or a vote waits": True,
            "the vote of each step is read a step later": [own.save for own in votes[1:4]] == [True, False, True],
            "no step was skipped": skipped == 0,
        },
        figures={"steps": STEPS, "votes_for_saving": [own.save for own in votes]},
    )
