"""A GPU that is not there: tensors that know shape, type and device and compute nothing, under CUDA's rules."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

CUDA = torch.device("cuda", 0)


@contextmanager
def autocast_rules_of_cuda() -> Iterator[None]:
    """`torch.autocast("cuda")` refuses where there is no device."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


def move_without_storage(model: nn.Module) -> None:
    """Under fake tensors: parameters, each with a gradient, and buffers of the same shapes on a GPU."""
    for module in model.modules():
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            empty = torch.empty(value.shape, dtype=value.dtype, device=CUDA)
            if isinstance(value, nn.Parameter):
                module._parameters[name] = parameter = nn.Parameter(empty, requires_grad=value.requires_grad)
                parameter.grad = torch.empty_like(empty)
            else:
                module._buffers[name] = empty
