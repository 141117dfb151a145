"""Numbers that follow from a size alone."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn


class FixedMatrix(nn.Module):
    """A matrix that never trains and stands in no checkpoint; it has the device and the type of the model.

    Whole numbers keep their type.

    Args:
        make: returns the matrix, in fp64 or int64. It is called again whenever the model moves or changes its type, so
            that rounding happens once, and a model without storage (device "meta") is complete as soon as it has some.
    """

    matrix: Tensor

    def __init__(self, make: Callable[[], Tensor]) -> None:
        super().__init__()
        self.make = make
        self.register_buffer("matrix", torch.empty(0), persistent=False)
        self._fill(self.matrix)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        moved: Any = super()._apply(fn, recurse)
        self._fill(self.matrix)
        return moved

    def _fill(self, like: Tensor) -> None:
        with torch.device("cpu"):
            exact = self.make()
        self.matrix = exact.to(like.device, like.dtype if exact.is_floating_point() else exact.dtype)
