"""Ranks and their devices: start and stop, a differentiable gather, means over ranks. One process pays nothing."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mlip_cli.errors import UsageError


def rank() -> int:
    """This process's number, 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes that train together, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def pick_device(name: str) -> torch.device:
    """`auto`, `cuda`, `mps` or `cpu` -> the device of this rank.

    Raises:
        UsageError: PyTorch sees no such device.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(name, True):
        raise UsageError(f"device {name}: PyTorch sees none; use cpu, and ask mlip doctor why")
    if name == "auto":
        name = next((device for device, is_there in present.items() if is_there), "cpu")
    if name == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device(name)


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done all it was given, so that a clock shows the work and not its queueing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the other ranks (nccl on CUDA, gloo elsewhere) for the time of the block."""
    if world_size() == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """DDP for several ranks: gradients become the mean over ranks. One rank gets the model itself."""
    if world_size() == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def unwrap(model: nn.Module) -> nn.Module:
    """The model that `wrap` was given."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def from_main(value: str) -> str:
    """Rank 0's text, on every rank."""
    if world_size() > 1:
        box = [value]
        dist.broadcast_object_list(box)
        value = box[0]
    return value


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        gathered = x.new_empty(world_size() * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(world_size())[rank()]


def gather(x: Tensor) -> Tensor:
    """(B, ...) of every rank -> (W*B, ...), in rank order, with the sum of all ranks' gradients on the way back."""
    return _Gather.apply(x) if world_size() > 1 else x


def all_sum(x: Tensor) -> Tensor:
    """Sum over ranks, without gradient."""
    if world_size() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def all_mean(x: Tensor) -> Tensor:
    """Mean over ranks, without gradient."""
    return all_sum(x) / world_size()
