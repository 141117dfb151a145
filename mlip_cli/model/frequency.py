"""The frequency branch: spectral blocks over the patch grid.

Sources: global filters, "Global Filter Networks for Image Classification" (Rao et al., NeurIPS 2021); that MLIP (Zhang
et al., ICML 2024) supervises in the frequency domain. Where the branch stands and what it reads is our reading.
"""

import torch
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from mlip_cli.config import Frequency
from mlip_cli.model.merging import patch_dct


def local_kernel(h: int, w: int, width: int) -> Tensor:
    """Initial kernels (h, w, width): 0.02 * normal noise, fading with the circular distance from the centre."""
    rows, columns = torch.arange(h), torch.arange(w)
    rows, columns = torch.minimum(rows, h - rows), torch.minimum(columns, w - columns)
    squared_distance = rows[:, None] ** 2 + columns[None] ** 2
    return 0.02 * torch.randn(h, w, width) * torch.exp(-squared_distance / 2)[..., None]


class GlobalFilter(nn.Module):
    """Depthwise circular convolution over the whole grid by the convolution theorem: (B, h, w, D) -> (B, h, w, D).

    The parameter is the real kernel, not its spectrum: half of a complex spectrum is redundant, and real weights work
    with fused optimisers and every storage type.
    """

    def __init__(self, h: int, w: int, width: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(local_kernel(h, w, width))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            # half precision has no FFT for sizes that are no power of two
            values = x.to(torch.promote_types(x.dtype, torch.float32))
            spectrum = torch.fft.rfft2(values, dim=(1, 2)) * torch.fft.rfft2(self.kernel, dim=(0, 1))
            return torch.fft.irfft2(spectrum, s=x.shape[1:3], dim=(1, 2)).to(x.dtype)


class SpectralBlock(nn.Module):
    """x + filter(LN(x)), then x + MLP(LN(x)): (B, h, w, D) -> (B, h, w, D)."""

    def __init__(self, h: int, w: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.filter = GlobalFilter(h, w, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.filter(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class FrequencyBranch(nn.Module):
    """Frequency tokens of an image, one a patch, beside the spatial tower."""

    def __init__(self, config: Frequency, *, grid: tuple[int, int], patch_size: int, tower_width: int) -> None:
        super().__init__()
        self.grid = grid
        self.patch_size = patch_size
        self.reads_pixels = config.input == "dct"
        inputs = 3 * patch_size**2 if self.reads_pixels else tower_width
        self.input = nn.Linear(inputs, config.width) if inputs != config.width or self.reads_pixels else nn.Identity()
        self.blocks = nn.ModuleList(SpectralBlock(*grid, config.width) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, images: Tensor, patch_tokens: Tensor) -> Tensor:
        """Normalised pixels (B, 3, H, W) and embedded patches (B, N, D) -> normalised tokens (B, N, width)."""
        x = patch_dct(images, self.patch_size).flatten(2) if self.reads_pixels else patch_tokens
        x = self.input(x).unflatten(1, self.grid)
        for block in self.blocks:
            x = block(x)
        return self.norm(x.flatten(1, 2))
