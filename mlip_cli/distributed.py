"""Several ranks: start and stop, a differentiable gather, means. One process alone communicates nothing."""

import ctypes
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from mlip_cli.errors import RunError, Stopped
from mlip_cli.meetings import MeetingPlace

START_TIMEOUT = timedelta(minutes=30)
"""The longest wait for ranks at the start: starting Python on a busy shared disk takes minutes."""
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""The longest wait of a collective, on every backend: rank 0 may be saving on a slow disk meanwhile."""

OF_GLOO = "/gloo/transport/"
"""In the text of gloo's errors, which have no class of their own: the file that they come from."""


def rank() -> int:
    """This process's number, 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes that train together, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the other ranks (nccl on CUDA, gloo elsewhere) for the time of the block.

    Raises:
        RunError: a rank did not come, or ended while others waited for it.
    """
    if world_size() == 1:
        yield
        return
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.set_device(device)
    try:
        store, _, _ = next(iter(dist.rendezvous("env://", timeout=START_TIMEOUT)))
    except dist.DistError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RunError(f"the {world_size()} ranks did not find each other at {address}: {error}") from error
    place = MeetingPlace(store, rank(), world_size(), START_TIMEOUT)
    token = _meeting_place.set(place)
    try:
        dist.init_process_group(
            "nccl" if is_cuda else "gloo",
            store=dist.PrefixStore("collectives", place.store),
            rank=rank(),
            world_size=world_size(),
            timeout=COLLECTIVE_TIMEOUT,
            device_id=device if is_cuda else None,
        )
        try:
            yield
        except Stopped:
            leave()
            raise
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and OF_GLOO not in str(error):
                raise
            why = str(error).rpartition("] ")[2].partition("\n")[0].partition(". ")[0]
            raise RunError(
                f"rank {rank()} of {world_size()} lost another one ({why}); look at what the others printed, whether "
                "one was killed for memory, and whether its node is up"
            ) from error
        leave()
    finally:
        _meeting_place.reset(token)


def leave() -> None:
    """End the collectives, when all ranks are here: rank 0 may still be writing its report, and torchrun kills the rest
    when one rank fails. After errors other than `Stopped`, which comes to every rank, nobody waits."""
    wait_for_ranks(COLLECTIVE_TIMEOUT)
    dist.destroy_process_group()


_meeting_place: ContextVar[MeetingPlace] = ContextVar("meeting_place")


def wait_for_ranks(most: timedelta = timedelta(days=1)) -> None:
    """Return when all ranks have called it. Ranks may be late by `most`: one may have copied data over a network.

    Ordinary collectives fail after `COLLECTIVE_TIMEOUT`.

    Raises:
        RunError: a rank did not come.
    """
    if world_size() > 1:
        _meeting_place.get().wait(most)


def wrap(
    model: nn.Module,
    device: torch.device,
    *,
    parallel: str = "ddp",
    units: Sequence[nn.Module] = (),
    methods: Sequence[str] = (),
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The model for several ranks: gradients become the mean over ranks. One rank gets the model itself.

    Args:
        parallel: `ddp`: every rank holds everything. `fsdp`: every rank holds its part of parameters, gradients and
            optimiser state; the model stays the same object, its parameters become `DTensor`s.
        units: for `fsdp`, the parts of the model that are gathered one after another.
        methods: for `fsdp`, methods of the model that are called beside its forward, perhaps before it.
        dtype: for `fsdp`, the type in which the parameters of `units` are gathered, which must be that of autocast: it
            halves what is sent, and the backward pass keeps no copies in that type. The weights of their norms are
            rounded to it too. None: as they are. The parameters themselves, and sums of gradients, stay fp32.
    """
    if world_size() == 1:
        return model
    if parallel == "ddp":
        # buffers are constants, equal on all ranks: there is nothing to send before each forward pass
        constants = [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, constants)
        return DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if dtype is not None:
        # inputs stay as they are: the sum of residuals is fp32, as without sharding
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    for name in methods:
        register_fsdp_forward_method(model, name)
    return model


def unwrap(model: nn.Module) -> nn.Module:
    """The model that `wrap` was given."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def parallel(model: nn.Module) -> str:
    """How `wrap` made ranks work together: `ddp`, `fsdp`, or `none` for one rank."""
    if isinstance(model, DistributedDataParallel):
        return "ddp"
    return "fsdp" if isinstance(model, FSDPModule) else "none"


@contextmanager
def gradients_kept_back(model: nn.Module) -> Iterator[None]:
    """For the block, backward passes add to this rank's gradients alone; a later one exchanges their sum."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)
    else:
        yield


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """For the block, all parameters of a sharded model lie on every rank, so that a forward pass needs no other rank.

    For evaluation: the parameters must not change meanwhile. A model that is not sharded stays as it is.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        if unit is not model:  # the outermost stays whole after a forward pass by itself
            unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            if unit is not model:
                unit.set_reshard_after_forward(True, recurse=False)


def full(tensor: Tensor) -> Tensor:
    """A sharded tensor whole, on all ranks, which take part in the same order; any other tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_on_main(tree: Any) -> Any:
    """Nested dicts, lists and tuples with every sharded tensor whole in the main memory of rank 0, elsewhere None.

    All ranks take part, in the same order. No device holds more than one whole tensor at a time.
    """
    if isinstance(tree, DTensor):
        whole = tree.full_tensor()
        return whole.cpu() if rank() == 0 else None
    if isinstance(tree, dict):
        return {key: full_on_main(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(full_on_main(value) for value in tree)
    return tree


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that every rank has, in the form of `like`: this rank's part of it, or itself."""
    if isinstance(like, DTensor) and tensor.shape == like.shape:
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return tensor


def signal_at_death_of_parent(number: signal.Signals) -> None:
    """Get a signal when the process that started this one dies; only Linux has it."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        set_death_signal = 1  # PR_SET_PDEATHSIG
        libc.prctl(set_death_signal, ctypes.c_ulong(number))


def from_main(value: str) -> str:
    """Rank 0's text, on every rank."""
    first: str = from_all(value)[0]
    return first


# names since PyTorch 2.14, which warns of the older ones
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        gathered = x.new_empty(world_size() * x.shape[0], *x.shape[1:])
        _all_gather(gathered, x.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        own = grad.new_empty(grad.shape[0] // world_size(), *grad.shape[1:])
        _reduce_scatter(own, grad.contiguous())
        return own


_exchanges: ContextVar[bool] = ContextVar("exchanges", default=True)


@contextmanager
def without_exchange() -> Iterator[None]:
    """For the block, `gather` repeats this rank's rows, and `all_sum` returns them: a trial of one rank alone."""
    token = _exchanges.set(False)
    try:
        yield
    finally:
        _exchanges.reset(token)


def gather(x: Tensor) -> Tensor:
    """(B, ...) of every rank -> (W*B, ...), in rank order, with the sum of all ranks' gradients on the way back."""
    if not _exchanges.get():
        return x.repeat(world_size(), *[1] * (x.ndim - 1))
    return _Gather.apply(x) if world_size() > 1 else x


def all_sum(x: Tensor) -> Tensor:
    """Sum over ranks, without gradient."""
    if world_size() > 1 and _exchanges.get():
        x = x.clone()
        dist.all_reduce(x)
    return x


def all_max(x: Tensor) -> Tensor:
    """Largest over ranks, without gradient."""
    if world_size() > 1:
        x = x.clone()
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def from_all(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, value)
    return everyone
