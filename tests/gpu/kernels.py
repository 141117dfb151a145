"""Rows about single operations: attention by backend, the filter over the patch grid, packed texts, FILIP."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from benchmarks.bench_losses import exact
from benchmarks.bench_text import caption_lengths
from gpu.exact import relative
from gpu.rows import Found, Scale, milliseconds
from gpu.trainings import EAGER, recipe_of, web_batch
from reference_for_tests import convolve_by_fft
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mlip_cli.devices import DTYPES, autocast, pick_device
from mlip_cli.model.blocks import set_fused_attention
from mlip_cli.model.frequency import GlobalFilter
from mlip_cli.model.text import TextTower
from mlip_cli.profiling.timing import measure_interleaved, peak_memory

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
HEAD_WIDTH = 64
REPEATS = 5
"""Calls that are timed together: one takes a fraction of a millisecond."""
MOST_FILTER_ERROR = {"fp32": 1e-5, "bf16": 2e-2}
TEXTS_AIM = 1.6


def again(function: Callable[[], object]) -> Callable[[], None]:
    """Calls it `REPEATS` times."""

    def run() -> None:
        for _ in range(REPEATS):
            function()

    return run


def attend(backend: SDPBackend, qkv: Sequence[Tensor], mask: Tensor | None, *, is_causal: bool) -> None:
    """Forward and backward by one backend: qkv 3 x (B, heads, N, d)."""
    with sdpa_kernel([backend]):
        result = F.scaled_dot_product_attention(*qkv, attn_mask=mask, is_causal=is_causal)
        torch.autograd.grad(result, qkv, result.detach())


def attention(scale: Scale) -> Found:
    """Milliseconds of attention in bf16 by sequence length, mask and backend."""
    device, lines, fastest = pick_device(scale.device_type), [], {}
    cases = [(n, False, masked) for n in scale.tokens for masked in (False, True)]
    for n, is_causal, masked in [*cases, (scale.text_tokens, True, False)]:
        shape = (3, scale.batch_size, n, scale.heads, HEAD_WIDTH)
        drawn = torch.randn(shape, device=device, dtype=torch.bfloat16).transpose(2, 3)  # the layout inside a block
        qkv = [own.detach().requires_grad_() for own in drawn]
        mask = torch.rand(scale.batch_size, 1, 1, n, device=device, dtype=torch.bfloat16) if masked else None
        works, line = {}, {"tokens": n, "mask": "causal" if is_causal else "float" if masked else None}
        for name, backend in BACKENDS.items():
            run = partial(attend, backend, qkv, mask, is_causal=is_causal)
            try:
                run()
            except RuntimeError:  # this backend has no kernel for it
                continue
            works[name] = again(run)
        timings = measure_interleaved(works, scale.rounds, device=device) if works else {}
        times = {name: own.median_s / REPEATS for name, own in timings.items()}
        lines.append(line | {f"{name} ms": milliseconds(times[name]) if name in times else None for name in BACKENDS})
        if times:
            fastest[f"{n} {line['mask'] or 'no mask'}"] = min(times, key=times.__getitem__)
    return Found(
        "fastest: " + (", ".join(f"{case} {name}" for case, name in fastest.items()) or "none runs here"),
        figures={"fastest": fastest},
        lines=lines,
    )


def train_filter(filtered: Callable[[Tensor], Tensor], x: Tensor, kernel: Tensor, dtype: torch.dtype) -> None:
    """Forward and backward."""
    with autocast(x.device, dtype):
        result = filtered(x)
    torch.autograd.grad(result, (x, kernel), result.detach())


def patch_filter(scale: Scale) -> Found:
    """The filter of a spectral block as products with the real DFT, against the FFT."""
    device, side, width = pick_device(scale.device_type), scale.grid, scale.width
    layer = GlobalFilter(side, side, width).to(device)
    x = torch.randn(scale.batch_size, side, side, width, device=device, requires_grad=True)
    few = x[:8].detach()
    expected = convolve_by_fft(few.double().cpu(), layer.kernel.detach().double().cpu())
    ways, errors = {"FFT, fp32": partial(train_filter, partial(_by_fft, layer), x, layer.kernel, torch.float32)}, {}
    for name in ("fp32", "bf16"):
        dtype = DTYPES[name]
        ways[f"products, {name}"] = partial(train_filter, layer, x, layer.kernel, dtype)
        with torch.no_grad(), autocast(device, dtype):
            errors[name] = relative(layer(few), expected)
    timings = measure_interleaved({name: again(own) for name, own in ways.items()}, scale.rounds, device=device)
    speedup = timings["products, bf16"].speedup
    lines = [
        {"way": name, "ms": milliseconds(own.median_s / REPEATS), "x FFT": round(own.speedup, 2)}
        for name, own in timings.items()
    ]
    return Found(
        f"products in bf16 {speedup:.2f}x the FFT; error fp32 {errors['fp32']:.1e}, bf16 {errors['bf16']:.1e}",
        statements={
            f"the error in {name} is below {most:g}": errors[name] < most for name, most in MOST_FILTER_ERROR.items()
        },
        speeds={"products in bf16 are faster than the FFT in fp32": speedup > 1},
        figures={"speedup": speedup, "errors": errors},
        lines=lines,
    )


def _by_fft(layer: GlobalFilter, x: Tensor) -> Tensor:
    return convolve_by_fft(x, layer.kernel)


def packed_texts(scale: Scale) -> Found:
    """The text tower on captions at their own lengths, against captions padded to the longest."""
    device = pick_device(scale.device_type)
    recipe = recipe_of("cc12m", scale, EAGER)
    tower = TextTower(recipe.model.text).to(device)
    set_fused_attention(tower, device.type != "cpu")
    batch = web_batch(recipe, device, batch_size=scale.batch_size).to(device)

    def features(lengths: tuple[int, ...] | None, dtype: torch.dtype) -> Tensor:
        with autocast(device, dtype):
            packing = tower.packing(batch.token_ids, lengths)
            return tower.pool(tower(batch.token_ids, packing), batch.token_ids, packing)

    def train(lengths: tuple[int, ...] | None) -> None:
        features(lengths, torch.bfloat16).float().square().sum().backward()
        tower.zero_grad(set_to_none=True)

    with torch.no_grad():
        error = relative(*(features(own, torch.float32) for own in (batch.text_lengths, None)))
    ways = {"padded": partial(train, None), "packed": partial(train, batch.text_lengths)}
    timings = measure_interleaved(ways, scale.rounds, device=device)
    speedup = timings["packed"].speedup
    over = sum(length > 48 for length in caption_lengths(scale.batch_size)) / scale.batch_size
    return Found(
        f"packed {speedup:.2f}x padded ({milliseconds(timings['packed'].median_s):g} ms), difference {error:.1e}",
        statements={"features in fp32 are the same within 1e-5": error < 1e-5},
        speeds={f"packed texts train {TEXTS_AIM:g} times as fast or faster": speedup >= TEXTS_AIM},
        figures={"speedup": speedup, "error": error, "share_over_48": over, "batch_size": scale.batch_size},
    )


def filip(scale: Scale) -> Found:
    """FILIP of a rank's pictures and all ranks' captions, forward and backward, by the type of its tokens."""
    device, (b, c, k, length) = pick_device(scale.device_type), scale.filip
    lines, width = [], 256
    mask = torch.arange(length, device=device) < torch.randint(3, length + 1, (c, 1), device=device)
    sizes = torch.ones(b, k, device=device)
    ways = {}
    for name in ("fp32", "bf16"):
        dtype = DTYPES[name]
        patches = torch.randn(b, k, width, device=device).to(dtype).requires_grad_()
        words = torch.randn(c, length, width, device=device).to(dtype).requires_grad_()
        ways[name] = partial(exact, patches, sizes, words, mask)
    timings = measure_interleaved(ways, max(1, scale.rounds // 2), device=device)
    for name, timing in timings.items():
        memory = peak_memory(ways[name], device=device)
        speedup = round(timing.speedup, 2)
        lines.append(
            {"tokens in": name, "ms": milliseconds(timing.median_s), "x fp32": speedup, "peak GiB": memory.gib}
        )
    speedup = timings["bf16"].speedup
    return Found(
        f"{b} x {c:,}: bf16 {milliseconds(timings['bf16'].median_s):g} ms, {speedup:.2f}x fp32",
        speeds={"FILIP is faster on tokens in bf16 than in fp32": speedup > 1},
        figures={"pictures": b, "captions": c, "patches": k, "words": length, "speedup": speedup},
        lines=lines,
    )
