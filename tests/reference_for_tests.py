"""Other ways to compute what a model computes, to compare with."""

import torch
from torch import Tensor

from mlip_cli.model.merge_pass import Patches
from mlip_cli.model.merging import dct_matrix, grid_halves, group_sizes, merge_tokens, patch_dct


def convolve_by_fft(x: Tensor, kernel: Tensor) -> Tensor:
    """Depthwise circular convolution over the whole grid: (B, h, w, D), (h, w, D), fp32 or fp64 -> (B, h, w, D)."""
    spectrum = torch.fft.rfft2(x, dim=(1, 2)) * torch.fft.rfft2(kernel, dim=(0, 1))
    return torch.fft.irfft2(spectrum, s=x.shape[1:3], dim=(1, 2))


def block_dct(images: Tensor, patch_size: int) -> Tensor:
    """`patch_dct` where no tower holds its matrix."""
    return patch_dct(images, dct_matrix(patch_size).to(torch.promote_types(images.dtype, torch.float32)))


def patches_of(grid: tuple[int, int], patch_size: int, num_prefix: int, *, has_class_token: bool) -> Patches:
    """The layout of a tower's tokens where there is no tower."""
    halves, dct = grid_halves(*grid), dct_matrix(patch_size).float()
    return Patches(num_prefix, has_class_token=has_class_token, halves=halves, dct=dct)


def merged(x: Tensor, sizes: Tensor, assign: Tensor, num_groups: int) -> Tensor:
    """`merge_tokens` where nobody knows the sizes of the groups."""
    return merge_tokens(x, sizes, assign, group_sizes(sizes, assign, num_groups))
