"""Other ways to compute what a model computes, to compare with."""

import torch
from torch import Tensor


def convolve_by_fft(x: Tensor, kernel: Tensor) -> Tensor:
    """Depthwise circular convolution over the whole grid: (B, h, w, D), (h, w, D), fp32 or fp64 -> (B, h, w, D)."""
    spectrum = torch.fft.rfft2(x, dim=(1, 2)) * torch.fft.rfft2(kernel, dim=(0, 1))
    return torch.fft.irfft2(spectrum, s=x.shape[1:3], dim=(1, 2))
