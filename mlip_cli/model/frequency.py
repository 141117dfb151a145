"""The frequency domain of the image side: spectral blocks over the patch grid, beside the tower or as its stem.

Sources: global filters, "Global Filter Networks for Image Classification" (Rao et al., NeurIPS 2021); supervision in
the frequency domain, MLIP (Zhang et al., ICML 2024). The place of the blocks and their input are our reading of it.
"""

import math

import torch
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mlip_cli.errors import UsageError
from mlip_cli.recipe.config import Frequency
from mlip_cli.recipe.merge_plan import wrong_stem


def local_kernel(h: int, w: int, width: int) -> Tensor:
    """Initial kernels (h, w, width): 0.02 * normal noise, fading with the circular distance from the centre."""
    rows, columns = torch.arange(h), torch.arange(w)
    rows, columns = torch.minimum(rows, h - rows), torch.minimum(columns, w - columns)
    squared_distance = rows[:, None] ** 2 + columns[None] ** 2
    return 0.02 * torch.randn(h, w, width) * torch.exp(-squared_distance / 2)[..., None]


def convolve_by_fft(x: Tensor, kernel: Tensor) -> Tensor:
    """Depthwise circular convolution over the whole grid: (B, h, w, D), (h, w, D), fp32 or fp64 -> (B, h, w, D)."""
    spectrum = torch.fft.rfft2(x, dim=(1, 2)) * torch.fft.rfft2(kernel, dim=(0, 1))
    return torch.fft.irfft2(spectrum, s=x.shape[1:3], dim=(1, 2))


def convolve_by_products(x: Tensor, kernel: Tensor) -> Tensor:
    """The same as `convolve_by_fft` by products of real matrices: the DFT of one axis, then of the other.

    No axis moves: the spectrum is (B, 2, h, m, D), real and imaginary parts of m = w//2 + 1 columns.
    """
    h, w, width = kernel.shape
    along_row, back_along_row = real_dft(w, like=x)
    along_column = complex_dft(h, like=x)

    def spectrum(values: Tensor) -> Tensor:
        rows = (along_row @ values).view(-1, 2 * h, (w // 2 + 1) * width)
        return (along_column @ rows).view(-1, 2, h, w // 2 + 1, width)

    (x_real, x_imag), (k_real, k_imag) = spectrum(x).unbind(1), spectrum(kernel[None]).unbind(1)
    product = torch.stack([x_real * k_real - x_imag * k_imag, x_real * k_imag + x_imag * k_real], dim=1)
    rows = (along_column.T / h) @ product.flatten(1, 2).flatten(2)
    return back_along_row @ rows.view(-1, h, 2 * (w // 2 + 1), width)


def real_dft(n: int, *, like: Tensor) -> tuple[Tensor, Tensor]:
    """DFT of n real numbers as a real matrix (2m, n), m = n//2 + 1: real parts, then imaginary; and back, (n, 2m)."""
    cos, sin = _waves(n, n // 2 + 1, device=like.device)
    forward = torch.cat([cos, -sin])
    times = torch.full_like(cos[:, :1], 2)  # each counts for its mirror too, but the first, and the last of an even n
    times[0] = 1
    if n % 2 == 0:
        times[-1] = 1
    return forward.to(like.dtype), (forward * times.repeat(2, 1) / n).T.to(like.dtype)


def complex_dft(n: int, *, like: Tensor) -> Tensor:
    """DFT of n complex numbers as a real matrix (2n, 2n), n times orthogonal: (number, part) -> (part, frequency)."""
    cos, sin = _waves(n, n, device=like.device)
    return (
        torch.stack([cos, sin, -sin, cos], dim=-1)
        .unflatten(-1, (2, 2))
        .permute(2, 0, 1, 3)
        .reshape(2 * n, -1)
        .to(like.dtype)
    )


def _waves(n: int, num_frequencies: int, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles 2 pi u y / n: (num_frequencies, n), fp64."""
    turns = torch.arange(num_frequencies, device=device)[:, None] * torch.arange(n, device=device) % n
    angles = turns.double() * (2 * math.pi / n)
    return angles.cos(), angles.sin()


def takes_products(device: torch.device) -> bool:
    """Whether to convolve by products of matrices instead of by the FFT.

    On a CPU products were 1.1 to 2 times as fast, forward and backward, on grids of 8 x 8 to 24 x 24 (medians of
    tests/benchmarks/bench_frequency.py). Compilers generate code for them but none for complex numbers. On GPUs we
    have not measured, so the FFT runs there, which takes the fewest operations.
    """
    return device.type == "cpu" or torch.compiler.is_compiling()


@torch.no_grad()
def regrid_kernel(kernel: Tensor, grid: tuple[int, int]) -> tuple[Tensor, float]:
    """Carry a kernel to another grid: (h, w, D) -> (h2, w2, D), and the share of its energy that is lost.

    Every tap keeps its offset in patches. A larger grid pads the kernel with zeros, a smaller one crops it; only the
    taps outside the new grid are lost. On an even grid the offsets n/2 and -n/2 are one tap: padding puts half of it at
    either end, so that a symmetric kernel stays symmetric, and cropping to an even grid adds the two ends. Padded
    kernels therefore filter repeated pictures exactly as before, and cropping undoes padding.
    """
    rows, columns = (_moved_taps(n, to, like=kernel) for n, to in zip(kernel.shape[:2], grid, strict=True))
    kept = rows.sum(0)[:, None] * columns.sum(0)
    energy = kernel.double().square().sum(-1)
    whole = energy.sum().item()
    lost_share = (energy * (1 - kept)).sum().item() / whole if whole else 0.0
    return torch.einsum("ya,xb,abd->yxd", rows, columns, kernel), lost_share


def _moved_taps(n: int, to: int, *, like: Tensor) -> Tensor:
    """The new place of each tap of one axis: (to, n). A column sums to 1, or to 0 for a tap outside the new grid."""
    taps = torch.zeros(to, n, dtype=like.dtype, device=like.device)
    for tap in range(n):
        offsets = {tap, tap - n} if 2 * tap == n else {tap if 2 * tap < n else tap - n}
        for offset in offsets:
            if 2 * abs(offset) <= to:
                taps[offset % to, tap] += 1 / len(offsets)
    return taps


class GlobalFilter(nn.Module):
    """Depthwise circular convolution over the whole grid by the convolution theorem: (B, h, w, D) -> (B, h, w, D).

    The parameter is the real kernel and not its spectrum. Half of a complex spectrum is redundant, and real weights
    work with fused optimisers and every storage type.
    """

    def __init__(self, h: int, w: int, width: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(local_kernel(h, w, width))

    def forward(self, x: Tensor) -> Tensor:
        convolve = convolve_by_products if takes_products(x.device) else convolve_by_fft
        with torch.autocast(x.device.type, enabled=False):
            # half precision has too few digits for sums over the grid, and an FFT for powers of two only
            dtype = torch.promote_types(x.dtype, torch.float32)
            return convolve(x.to(dtype), self.kernel.to(dtype)).to(x.dtype)


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


class StemBlock(SpectralBlock):
    """A spectral block that replaces an attention block of a tower; prefix tokens pass through unchanged."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Prefix and patch tokens (B, P+N, D) -> the same. There is no mask before the first merge."""
        assert attn_mask is None, "a spectral block needs the whole grid"
        h, w, _ = self.filter.kernel.shape
        prefix, patches = x.split([x.shape[1] - h * w, h * w], dim=1)
        return torch.cat([prefix, super().forward(patches.unflatten(1, (h, w))).flatten(1, 2)], dim=1)


def place_stem(trunk: VisionTransformer, config: Frequency) -> None:
    """Replace the first attention blocks of a trunk by spectral blocks.

    Raises:
        UsageError: blocks of another width than the trunk's, or so many that no attention block is left.
    """
    for key, wrong in wrong_stem(config, width=trunk.embed_dim, depth=len(trunk.blocks)):
        raise UsageError(f"model.frequency.{key}: {wrong}")
    h, w = trunk.patch_embed.grid_size
    for place in range(config.depth):
        trunk.blocks[place] = StemBlock(h, w, trunk.embed_dim)


class FrequencyBranch(nn.Module):
    """Frequency tokens of an image, one per patch, beside the spatial tower."""

    def __init__(self, config: Frequency, *, grid: tuple[int, int], patch_size: int, tower_width: int) -> None:
        super().__init__()
        self.grid = grid
        self.reads_pixels = config.input == "dct"
        width = config.width or tower_width
        inputs = 3 * patch_size**2 if self.reads_pixels else tower_width
        self.input = nn.Linear(inputs, width) if inputs != width or self.reads_pixels else nn.Identity()
        self.blocks = nn.ModuleList(SpectralBlock(*grid, width) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """DCT coefficients (B, N, 3*p*p) or embedded patches (B, N, D) -> normalised tokens (B, N, width)."""
        x = self.input(x).unflatten(1, self.grid)
        for block in self.blocks:
            x = block(x)
        return self.norm(x.flatten(1, 2))
