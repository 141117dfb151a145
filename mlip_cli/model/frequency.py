"""The frequency domain of the image side: spectral blocks over the patch grid, beside the tower or as its stem.

Sources: global filters, "Global Filter Networks for Image Classification" (Rao et al., NeurIPS 2021); supervision in
the frequency domain, MLIP (Zhang et al., ICML 2024). The place of the blocks and their input are our reading of it.
"""

import math
from functools import partial

import torch
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mlip_cli.errors import UsageError
from mlip_cli.model.fixed import FixedMatrix
from mlip_cli.recipe.config import Frequency
from mlip_cli.recipe.merge_plan import wrong_stem


def local_kernel(h: int, w: int, width: int) -> Tensor:
    """Initial kernels (h, w, width): 0.02 * normal noise, fading with the circular distance from the centre.

    Far taps are 0 and not almost 0: CPUs multiply numbers below 1e-38 ten times slower.
    """
    rows, columns = torch.arange(h), torch.arange(w)
    rows, columns = torch.minimum(rows, h - rows), torch.minimum(columns, w - columns)
    squared_distance = rows[:, None] ** 2 + columns[None] ** 2
    fading = torch.exp(-squared_distance / 2)
    return 0.02 * torch.randn(h, w, width) * fading.where(fading > 1e-20, 0)[..., None]


def grid_waves(h: int, w: int) -> Tensor:
    """Orthonormal waves of the patch grid, the real form of its DFT: (2m, h*w), m cosines and their m sines, fp64.

    Of a frequency and its mirror, which has the same waves, one is left: m = (h*w + self-mirrored ones) / 2. Sines of
    the self-mirrored ones are 0.
    """
    (u, v), times = _grid_frequencies(h, w)
    rows, columns = torch.arange(h)[:, None], torch.arange(w)
    turns = (u[:, None, None] * rows % h).double() / h + (v[:, None, None] * columns % w).double() / w
    angles = 2 * math.pi * turns.flatten(1)
    return torch.cat([angles.cos(), -angles.sin()]) * (times / (h * w)).sqrt().repeat(2)[:, None]


def response_waves(h: int, w: int) -> Tensor:
    """What carries a kernel to its factors in `convolve`: (4m, h*w), fp64.

    The first 2m rows give the real part of its spectrum for cosines and for sines, the others the imaginary part, with
    the sign that it has in either.
    """
    _, times = _grid_frequencies(h, w)
    cosines, sines = (grid_waves(h, w) * (h * w / times).sqrt().repeat(2)[:, None]).chunk(2)
    return torch.cat([cosines, cosines, -sines, sines])


def _grid_frequencies(h: int, w: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Rows and columns of the m frequencies, one of each mirrored pair, and how many they stand for: 3 x (m,)."""
    u, v = torch.arange(h).repeat_interleave(w), torch.arange(w).repeat(h)
    number, mirror = u * w + v, -u % h * w + -v % w
    one = number <= mirror
    return (u[one], v[one]), torch.where(number == mirror, 1.0, 2.0)[one].double()


def convolve(x: Tensor, kernel: Tensor, waves: Tensor, response: Tensor) -> Tensor:
    """Depthwise circular convolution over the whole grid: (B, N, D), (N, D), N = h*w -> (B, N, D).

    It is the product of both spectra, (a + ib)(c + id), whose parts stand one below the other in 2m rows.

    Args:
        waves: (2m, N) of `grid_waves`. response: (4m, N) of `response_waves`.
    """
    own, other = (response @ kernel).chunk(2)
    waves = waves.to(own.dtype)  # under autocast once, and not for either product
    spectrum = waves @ x
    swapped = spectrum.roll(len(waves) // 2, 1)
    return waves.T @ torch.addcmul(spectrum * own, swapped, other)


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
    work with fused optimisers and every storage type. The DFT is one product with a matrix, in the type of the other
    products of the model. In bf16 that is off by 0.5 %, as a linear map is; an FFT has no such types, its numbers pass
    memory several times, and compilers cannot join it with its neighbours.
    """

    def __init__(self, h: int, w: int, width: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(local_kernel(h, w, width))
        self.waves = FixedMatrix(partial(grid_waves, h, w))
        self.response = FixedMatrix(partial(response_waves, h, w))

    def forward(self, x: Tensor) -> Tensor:
        flat = convolve(x.flatten(1, 2), self.kernel.flatten(0, 1), self.waves.matrix, self.response.matrix)
        return flat.unflatten(1, x.shape[1:3])


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
