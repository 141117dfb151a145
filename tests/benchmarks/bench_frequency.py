"""What convolving over the patch grid costs: a DFT by products against the FFT, spectral against attention blocks.

    make bench                    or, alone:    python tests/benchmarks/bench_frequency.py

All candidates run in turn in every round of one process, forward and backward; ratios are medians over rounds.
"""

from collections.abc import Callable
from functools import partial

import torch
from reference_for_tests import convolve_by_fft
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mlip_cli.devices import device_name
from mlip_cli.model.frequency import GlobalFilter, SpectralBlock
from mlip_cli.profiling.flops import attention_macs, filter_gflops, gflops, mlp_macs
from mlip_cli.profiling.timing import Timing, measure_interleaved
from mlip_cli.terminal.output import print_lines, print_table

GRIDS = ((7, 7), (8, 8), (14, 14), (24, 24))
WIDTHS = (256, 768)
PRECISIONS = (torch.float32, torch.bfloat16)
NUMBERS = 2**19
"""About so many in a batch of tokens, on every grid."""
HEAD_WIDTH = 64
ROUNDS = 9


def batch_size(grid: tuple[int, int], width: int) -> int:
    return max(1, NUMBERS // (grid[0] * grid[1] * width))


def train_filter(filtered: Callable[[Tensor], Tensor], x: Tensor, kernel: Tensor, dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        result = filtered(x)
    torch.autograd.grad(result, (x, kernel), result.detach())


def train_block(block: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        result = block(x)
    torch.autograd.grad(result, (x, *block.parameters()), result.detach())


def ratio(timing: Timing) -> str:
    low, high = timing.speedup_interval
    return f"{timing.speedup:.2f} ({low:.2f}-{high:.2f})"


def filters(grid: tuple[int, int], width: int, dtype: torch.dtype) -> list[str]:
    """Row of the first table."""
    x, layer = torch.randn(batch_size(grid, width), *grid, width, requires_grad=True), GlobalFilter(*grid, width)
    ways = {"fft": lambda given: convolve_by_fft(given, layer.kernel).to(dtype), "products": layer}
    timings = measure_interleaved(
        {name: partial(train_filter, way, x, layer.kernel, dtype) for name, way in ways.items()}, ROUNDS
    )
    milliseconds = [f"{1000 * timing.median_s:.1f}" for timing in timings.values()]
    return [*described(grid, width, dtype), *milliseconds, ratio(timings["products"])]


def blocks(grid: tuple[int, int], width: int, dtype: torch.dtype) -> list[str]:
    """Row of the second table."""
    (h, w), num_tokens = grid, grid[0] * grid[1]
    attention, spectral = Block(width, width // HEAD_WIDTH, qkv_bias=True), SpectralBlock(h, w, width)
    attention.attn.fused_attn = False
    on_grid = torch.randn(batch_size(grid, width), h, w, width, requires_grad=True)
    flat = on_grid.detach().flatten(1, 2).requires_grad_()
    timings = measure_interleaved(
        {
            "attention": partial(train_block, attention, flat, dtype),
            "spectral": partial(train_block, spectral, on_grid, dtype),
        },
        ROUNDS,
    )
    milliseconds = [f"{1000 * timing.median_s:.1f}" for timing in timings.values()]
    attention_cost = gflops(attention_macs(attention, num_tokens, width=width) + mlp_macs(attention, num_tokens))
    by_flops = attention_cost / (filter_gflops(spectral) + gflops(mlp_macs(spectral, num_tokens)))
    return [*described(grid, width, dtype), *milliseconds, ratio(timings["spectral"]), f"{by_flops:.2f}"]


def described(grid: tuple[int, int], width: int, dtype: torch.dtype) -> list[str]:
    return [f"{grid[0]}x{grid[1]}", str(width), str(dtype).removeprefix("torch."), str(batch_size(grid, width))]


def test_speed_of_spectral_blocks() -> None:
    torch.manual_seed(0)
    cases = [(grid, width, dtype) for grid in GRIDS for width in WIDTHS for dtype in PRECISIONS]
    given = ["grid", "width", "tokens in", "batch"]
    print_table([*given, "FFT ms", "products ms", "x FFT (95 %)"], [filters(*case) for case in cases])
    columns = ["attention ms", "spectral ms", "x attention (95 %)", "by FLOPs"]
    print_table([*given, *columns], [blocks(*case) for case in cases])
    print_lines(f"forward and backward, {device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    test_speed_of_spectral_blocks()
