"""Operations by formula against counted ones; statistics of timing; peak memory."""

import math
import mmap
import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from reference_for_tests import convolve_by_fft
from torch.utils.flop_counter import FlopCounterMode

from mlip_cli.model import frequency
from mlip_cli.model.blocks import set_fused_attention
from mlip_cli.model.clip import CLIP
from mlip_cli.profiling import flops, timing
from mlip_cli.profiling.flops import merge_macs
from mlip_cli.profiling.timing import measure_interleaved, peak_memory, square_matmul
from mlip_cli.recipe import config
from mlip_cli.recipe.merge_plan import GUIDANCE, MergePlan

LOSSES = {name: "infonce" if name.endswith("global") else "sparc" for name in config.LOSS_NAMES}


def build(vision: dict[str, Any], *, image_size: int, **changes: Any) -> CLIP:
    text = config.Text(width=24, depth=2, num_heads=2, context_length=16)
    model = config.Model(embed_dim=20, token_dim=12, vision=config.Vision(**vision), text=text, **changes)
    losses = LOSSES if "frequency" in changes else {"spatial_global": "infonce"}
    with torch.device("meta"):  # without random weights: the counter reads shapes alone
        built = (
            CLIP(model, data=config.Data(train=(), image_size=image_size), losses=losses, global_batch_size=4)
            .eval()
            .requires_grad_(False)
        )
    set_fused_attention(built, False)  # the counter sees matrix products, not fused kernels
    return built.to_empty(device="cpu")  # merges need autocast, which the device meta has not


TINY = {"patch_size": 4, "width": 32, "depth": 5, "num_heads": 2}


@pytest.fixture(scope="module")
def tiny() -> CLIP:
    return build(TINY, image_size=32, frequency=config.Frequency(placement="branch", input="dct", width=16, depth=2))


def filter_gflops_of(h: int, w: int, width: int) -> float:
    """Two real FFTs a channel, 2.5 n log2 n each, and h * (w/2 + 1) complex products of 6 operations."""
    n = h * w
    return 1e-9 * width * (2 * 2.5 * n * math.log2(n) + 6 * h * (w // 2 + 1))


def by_fft(layer: frequency.GlobalFilter, x: torch.Tensor) -> torch.Tensor:
    return convolve_by_fft(x, layer.kernel)


def counted_gflops(function: Any, *arguments: Any) -> float:
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops() / 1e9


@pytest.mark.parametrize("method", ["mixed", "spatial", "frequency", "inverse", "tome", "random_drop"])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.5])
def test_image_tower_equals_a_count_of_its_products(tiny: CLIP, rate: float, method: str) -> None:
    plan = tiny.merge_plan(rate, "guided" if method in GUIDANCE else method)
    plan = replace(plan, guidance=method if method in GUIDANCE else "mixed")
    images = torch.rand(3, 3, 32, 32)
    counted = counted_gflops(tiny.encode_image, images, plan) / 3
    assert sum(flops.image_gflops(tiny, plan).values()) == pytest.approx(counted, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vision", "image_size"),
    [
        ({"timm": "deit_tiny_distilled_patch16_224"}, 48),  # two prefix tokens, an odd number of patches
        ({"timm": "vit_base_patch16_siglip_224"}, 32),  # no class token, pooled by attention
        ({"timm": "vit_small_patch16_18x2_224"}, 32),  # two attentions and two MLPs side by side
        ({"timm": "vit_dlittle_patch16_reg1_gap_256"}, 32),  # two maps a head
    ],
)
def test_towers_of_timm_equal_a_count_of_their_products(vision: dict[str, Any], image_size: int) -> None:
    model = build(vision, image_size=image_size)
    for rate in (0.0, 0.5):
        plan = model.merge_plan(rate, "tome")
        counted = counted_gflops(model.encode_image, torch.rand(1, 3, image_size, image_size), plan)
        assert sum(flops.image_gflops(model, plan).values()) == pytest.approx(counted, rel=1e-9)


def test_text_tower_equals_a_count_of_its_products(tiny: CLIP) -> None:
    for length in (7, 16):
        counted = counted_gflops(tiny.encode_text, torch.randint(1, 100, (2, length))) / 2
        assert flops.text_gflops(tiny, length) == pytest.approx(counted, rel=1e-9)


def test_text_tower_in_groups_equals_a_count_of_its_products(tiny: CLIP) -> None:
    ids, lengths = torch.randint(1, 100, (32, 16)), (5,) * 20 + (8,) * 3 + (16,) * 9

    def encode() -> torch.Tensor:
        packing = tiny.text.packing(ids, lengths)
        return tiny.text_projection(tiny.text.pool(tiny.text(ids, packing), ids, packing))

    groups = flops.groups_of_captions(tiny, 32, width=16, lengths=lengths)
    assert groups == ((22, 8), (10, 16))  # 23 rows fit into the first one, and rows come by twos
    expected = sum(rows * flops.text_gflops(tiny, width) for rows, width in groups)
    assert counted_gflops(encode) == pytest.approx(expected, rel=1e-9)
    assert flops.mean_tokens(groups) == (22 * 8 + 10 * 16) / 32
    assert flops.groups_of_captions(tiny, 32, width=16, lengths=None) == ((32, 16),)
    tiny.requires_grad_(True)
    step = partial(flops.step_gflops, tiny, tiny.plan, batch_size=32, num_text_tokens=16)
    saved = 22 * (
        flops.text_gflops(tiny, 16)
        - flops.text_gflops(tiny, 8)
        + flops.token_head_gflops(tiny, tiny.plan, 16)
        - flops.token_head_gflops(tiny, tiny.plan, 8)
    )
    assert step() - step(text_lengths=lengths) == pytest.approx(3 * saved)


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("input", ["tokens", "dct"])
def test_frequency_branch_is_products_as_counted_and_filters_by_formula(
    input: str, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frequency.GlobalFilter, "forward", by_fft)  # the formula is that of the FFT
    model = build(TINY, image_size=32, frequency=config.Frequency(placement="branch", input=input, width=16, depth=2))
    plan, images = model.merge_plan(rate), torch.rand(1, 3, 32, 32)
    both = counted_gflops(model.image_features, images, plan)
    alone = counted_gflops(model.encode_image, images, plan)
    filters = 2 * filter_gflops_of(8, 8, 16)
    assert flops.frequency_gflops(model, plan) - filters == pytest.approx(both - alone, rel=1e-9)
    assert sum(flops.image_gflops(model, plan).values()) == pytest.approx(alone, rel=1e-9)


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_a_stem_is_products_as_counted_and_filters_by_formula(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frequency.GlobalFilter, "forward", by_fft)
    stem = config.Frequency(placement="stem", width=32, depth=2)
    model = build(TINY, image_size=32, frequency=stem)
    plan, images = model.merge_plan(rate), torch.rand(1, 3, 32, 32)
    parts = flops.image_gflops(model, plan)
    assert parts.pop("global filters") == pytest.approx(2 * filter_gflops_of(8, 8, 32))
    counted = counted_gflops(model.encode_image, images, plan)
    assert sum(parts.values()) == pytest.approx(counted, rel=1e-9)
    both = counted_gflops(model.image_features, images, plan)
    assert flops.frequency_gflops(model, plan) == pytest.approx(both - counted, rel=1e-9)
    assert flops.parameters(model)["frequency branch"] == 2 * 32 + 32 * 20


def test_vit_b_16_takes_the_published_number_of_operations() -> None:
    model = build({"timm": "vit_base_patch16_224"}, image_size=224)
    parts = flops.image_gflops(model, model.merge_plan(0.0))
    assert sum(parts.values()) == pytest.approx(35.1, abs=0.05)
    # fvcore, which published 17.58 GMACs, counts 5 operations for each number that one of 25 layer norms passes
    macs = sum(parts.values()) / 2 + 25 * 5 * 197 * 768 / 1e9
    assert macs == pytest.approx(17.58, abs=0.005)


def test_the_block_before_a_merge_runs_on_all_tokens(tiny: CLIP) -> None:
    plan = MergePlan((64, 64, 40, 40, 40), num_patches=64, method="tome", at=(3,))
    expected = 2e-9 * 8 * 32**2 * (2 * 65 + 3 * 41)
    assert flops.image_gflops(tiny, plan)["MLP"] == pytest.approx(expected)


def test_a_merge_of_an_odd_number_compares_two_unequal_halves() -> None:
    assert merge_macs(49, metric_width=4) == 25 * 24 * 4


def test_parts_of_the_parameters_add_up(tiny: CLIP) -> None:
    parts = flops.parameters(tiny)
    assert sum(parts.values()) == sum(p.numel() for p in tiny.parameters())
    assert parts["word embeddings"] == 49408 * 24
    assert "frequency branch" not in flops.parameters(build(TINY, image_size=32))


def test_token_heads_count_every_token_they_read(tiny: CLIP) -> None:
    plan = tiny.merge_plan(0.5, "tome")
    expected = 2e-9 * (12 * (plan.tokens[-1] * 32 + 64 * 16 + 10 * 24) + 24 * (32 + 16))
    assert flops.token_head_gflops(tiny, plan, 10) == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_square_product_takes_2_n_cubed_operations(dtype: torch.dtype) -> None:
    matmul = square_matmul(dtype, device=torch.device("cpu"), least_s=0)
    assert matmul.n == 256
    assert matmul.flops == 2 * 256**3
    assert counted_gflops(matmul.run) == matmul.flops / 1e9


def test_the_square_product_is_as_large_as_it_must_be_to_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([3, 1, 3, 7, 4, 9])  # of 256 rows, then of 512
    monkeypatch.setattr(timing, "_seconds", lambda function, device: next(seconds))
    assert square_matmul(torch.float32, device=torch.device("cpu"), least_s=2).n == 512


def test_a_step_is_three_times_the_forward_pass_with_all_that_training_adds(tiny: CLIP) -> None:
    plan = tiny.merge_plan(0.5, "guided")
    forward = sum(flops.image_gflops(tiny, plan).values()) + flops.text_gflops(tiny, 10)
    added = flops.frequency_gflops(tiny, plan) + flops.token_head_gflops(tiny, plan, 10)
    step = partial(flops.step_gflops, tiny, plan, batch_size=5, num_text_tokens=10)
    tiny.requires_grad_(True)
    assert step() == pytest.approx(3 * 5 * (forward + added))
    three = partial(step, captions_per_image=3)
    assert three() - step() == pytest.approx(
        3
        * 5
        * (
            2 * flops.text_gflops(tiny, 10)
            + flops.token_head_gflops(tiny, plan, 30)
            - flops.token_head_gflops(tiny, plan, 10)
        )
    )
    tiny.freeze("text")  # forward alone
    assert step() == pytest.approx(5 * (3 * (forward + added) - 2 * flops.text_gflops(tiny, 10)))


class Clock:
    """A machine whose noise is known: every call takes `seconds`, times a factor that changes from round to round."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, factors: list[float]) -> None:
        self.now, self.calls, self.factors = 0.0, [], factors
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def function(self, name: str, seconds: float) -> Any:
        def call() -> None:
            done = self.calls.count(name)
            self.calls.append(name)
            self.now += seconds * ([1.0, *self.factors][done])

        return call


def test_interleaving_takes_the_machine_s_noise_out_of_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, factors=[1, 5, 1, 30, 1, 2, 1])
    timings = measure_interleaved({"a": clock.function("a", 3.0), "b": clock.function("b", 2.0)}, rounds=7)
    assert timings["a"].speedup == 1
    assert timings["b"].speedup == pytest.approx(1.5)
    assert timings["b"].speedup_interval == pytest.approx((1.5, 1.5))
    assert timings["b"].median_s == pytest.approx(2.0)
    assert "".join(clock.calls) == "ab" + "abba" * 3 + "ab"


def test_the_interval_covers_most_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, factors=[1.0] * 9)
    slower = Clock.function(clock, "b", 1.0)
    noise = iter([0.0, 0.5, -0.2, 0.1, 0.3, 0.0, -0.1, 0.2, 0.05, 0.15])

    def noisy() -> None:
        slower()
        clock.now += next(noise)

    timed = measure_interleaved({"a": clock.function("a", 1.0), "b": noisy}, rounds=9)["b"]
    low, high = timed.speedup_interval
    assert low < timed.speedup < high
    assert min(1 / s for s in timed.seconds) <= low
    assert high <= max(1 / s for s in timed.seconds)


def test_every_timed_call_is_reported(tiny: CLIP) -> None:
    told = []
    measure_interleaved({"a": lambda: None, "b": lambda: None}, 3, after_call=lambda: told.append(1))
    assert len(told) == 6


@pytest.mark.slow
def test_peak_memory_includes_what_was_held_for_a_moment() -> None:
    def hold() -> None:
        """256 MiB of the system's own pages: no allocator keeps them for later."""
        with mmap.mmap(-1, 2**28) as held:
            np.frombuffer(held, np.uint8)[:: mmap.PAGESIZE] = 1

    peaks = [peak_memory(function, device="cpu") for function in (lambda: None, hold, lambda: None)]
    small, large, again = (peak.gib for peak in peaks)
    assert large - small == pytest.approx(0.25, abs=0.01)
    if "since its start" not in peaks[0].measured:
        assert again - small == pytest.approx(0, abs=0.01)
