"""What merging gains where the image tower is large: ViT-B/16 at 224 px, forward, side by side.

    make bench                    or, alone:    python tests/benchmarks/bench_merging.py

Four tables: speed-ups at each rate beside those of the operations (aims: 0.92 of them, and 1.5x at rate 0.5), both
kinds of attention, where the time of the merges goes, and the matching alone by both rules (aim: guided within 10 % of
ToMe's). All settings of a table run in turn in every round of one process; speed-ups are medians of ratios inside
rounds. Random weights: no kernel is faster or slower for them.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from statistics import median
from unittest.mock import patch

import torch

from mlip_cli.devices import device_name
from mlip_cli.model import merge_pass
from mlip_cli.model.blocks import set_fused_attention
from mlip_cli.model.clip import CLIP
from mlip_cli.model.merging import cosine_cost, index_halves, match, ward_cost
from mlip_cli.profiling.clock import PartClock
from mlip_cli.profiling.flops import image_gflops
from mlip_cli.profiling.timing import measure_interleaved
from mlip_cli.recipe.config import Data, Model, Text, Vision
from mlip_cli.recipe.merge_plan import DEFAULT, MergePlan
from mlip_cli.terminal.output import print_lines, print_table

SETTINGS = (("guided", 0.3), ("guided", 0.5), ("tome", 0.3), ("tome", 0.5), ("random_drop", 0.5))
BATCH_SIZE, ROUNDS = 4, 5
MATCHED_TOKENS, MATCHED_BATCH, MATCHED_ROUNDS = (64, 196, 256, 576), 32, 41
KEY_WIDTH = 64
PARTS = {
    "matching": ("cosine_cost", "ward_cost", "match"),
    "guidance": ("frequency_guidance", "mid_ranks", "mix_guidance", "group_mean"),
    "merging": ("merge_tokens", "group_sizes", "size_mask", "compose"),
}


def vit_b_16() -> CLIP:
    """The image tower of the recipe baselines/clip_tome, beside a text tower that is not used."""
    config = Model(vision=Vision(timm="vit_base_patch16_clip_224"), text=Text(width=64, depth=1, num_heads=1))
    model = CLIP(config, data=Data(train=(), image_size=224), losses={"spatial_global": "infonce"}, global_batch_size=2)
    set_fused_attention(model, False)
    return model.eval().requires_grad_(False)


def pictures() -> torch.Tensor:
    return torch.randint(256, (BATCH_SIZE, 3, 224, 224), dtype=torch.uint8)


def forward(model: CLIP, images: torch.Tensor, plan: MergePlan, dtype: torch.dtype) -> None:
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        model.encode_image(images, plan)


def fused(model: CLIP, images: torch.Tensor, plan: MergePlan, dtype: torch.dtype) -> None:
    set_fused_attention(model, True)
    forward(model, images, plan, dtype)
    set_fused_attention(model, False)


def speedups(model: CLIP, dtype: torch.dtype) -> list[list[str]]:
    """Rows of the first table for one precision."""
    images = pictures()
    plans = {("none", 0.0): model.merge_plan(0.0)}
    plans |= {(method, rate): model.merge_plan(rate, method) for method, rate in SETTINGS}
    functions: dict[str, Callable[[], None]] = {
        str(name): partial(forward, model, images, plan, dtype) for name, plan in plans.items()
    }
    timings = measure_interleaved(functions, ROUNDS)
    whole = sum(image_gflops(model, plans["none", 0.0]).values())
    rows = []
    for ((name, _), plan), timing in zip(plans.items(), timings.values(), strict=True):
        cost = sum(image_gflops(model, plan).values())
        low, high = timing.speedup_interval
        rows.append(
            [
                str(dtype).removeprefix("torch."),
                name,
                f"{plan.rate:.2f}",
                f"{cost:.1f}",
                f"{BATCH_SIZE / timing.median_s:.2f}",
                f"{timing.speedup:.2f} ({low:.2f}-{high:.2f})",
                f"{whole / cost:.2f}",
                f"{timing.speedup * cost / whole:.2f}",
            ]
        )
    return rows


def attentions(model: CLIP, dtype: torch.dtype) -> list[list[str]]:
    """Rows of the second table: one fused kernel against plain products."""
    images = pictures()
    rows = []
    for plan in (model.merge_plan(0.0), model.merge_plan(0.5, "guided")):
        functions = {kind.__name__: partial(kind, model, images, plan, dtype) for kind in (forward, fused)}
        plain, one_kernel = measure_interleaved(functions, ROUNDS).values()
        low, high = one_kernel.speedup_interval
        rows.append(
            [
                str(dtype).removeprefix("torch."),
                f"{plan.rate:.2f}",
                f"{BATCH_SIZE / plain.median_s:.2f}",
                f"{BATCH_SIZE / one_kernel.median_s:.2f}",
                f"{one_kernel.speedup:.2f} ({low:.2f}-{high:.2f})",
            ]
        )
    return rows


def shares(model: CLIP, dtype: torch.dtype) -> list[list[str]]:
    """Rows of the third table: seconds of the parts of all merges in one forward pass."""
    images, clock = pictures(), PartClock()
    plan = model.merge_plan(0.5, "guided")
    taken = []
    with ExitStack() as stack:
        for part, names in PARTS.items():
            for name in names:
                timed = clock.part(part)(getattr(merge_pass, name))
                stack.enter_context(patch.object(merge_pass, name, timed))
        for _ in range(ROUNDS + 1):
            with clock.part("tower"):
                forward(model, images, plan, dtype)
            taken.append(clock.take())
    rows = []
    for part in PARTS:
        share = median(seconds[part] / sum(seconds.values()) for seconds in taken[1:])
        milliseconds = 1000 * median(seconds[part] for seconds in taken[1:]) / len(plan.at)
        rows.append([str(dtype).removeprefix("torch."), part, f"{milliseconds:.2f}", f"{share:.2%}"])
    return rows


def matchings(num_tokens: int) -> list[str]:
    """A row of the fourth table: CPU time of matchings that remove a fifth, of single patches and of merged tokens."""
    keys = torch.randn(MATCHED_BATCH, num_tokens, KEY_WIDTH)
    guidance, sizes = torch.rand(MATCHED_BATCH, num_tokens), torch.randint(1, 6, (MATCHED_BATCH, num_tokens)).float()
    even, odd = index_halves(num_tokens)
    costs: list[Callable[[], torch.Tensor]] = [
        lambda: cosine_cost(keys, even, odd),
        lambda: ward_cost(keys, None, guidance, even, odd, strength=DEFAULT.strength),
        lambda: ward_cost(keys, sizes, guidance, even, odd, strength=DEFAULT.strength),
    ]
    repeats = max(1, 2000 // num_tokens)

    def milliseconds(cost: Callable[[], torch.Tensor]) -> float:
        start = time.process_time()
        for _ in range(repeats):
            match(cost(), even, odd, num_tokens - num_tokens // 5)
        return 1000 * (time.process_time() - start) / repeats

    tome, patches, merged = zip(*([milliseconds(cost) for cost in costs] for _ in range(MATCHED_ROUNDS)), strict=True)
    ratios = [median(own / base for own, base in zip(guided, tome, strict=True)) for guided in (patches, merged)]
    return [str(num_tokens), f"{median(tome):.2f}", *(f"{ratio:.2f}" for ratio in ratios)]


def test_speed_of_merging() -> None:
    torch.manual_seed(0)
    model, dtypes = vit_b_16(), (torch.float32, torch.bfloat16)
    columns = ["precision", "method", "rate", "GFLOPs", "images/s", "x rate 0 (95 %)", "by FLOPs", "measured/FLOPs"]
    print_table(columns, [row for dtype in dtypes for row in speedups(model, dtype)])
    columns = ["precision", "rate", "images/s, plain", "images/s, fused", "x plain (95 %)"]
    print_table(columns, [row for dtype in dtypes for row in attentions(model, dtype)], title="attention")
    columns = ["precision", "part", "ms a merge", "share of the tower"]
    rows = [row for dtype in dtypes for row in shares(model, dtype)]
    print_table(columns, rows, title="guided merges at rate 0.5")
    columns = ["tokens", "ToMe's rule, CPU ms", "guided / ToMe's, patches", "guided / ToMe's, merged tokens"]
    print_table(columns, [matchings(n) for n in MATCHED_TOKENS], title=f"matching, batch of {MATCHED_BATCH}")
    print_lines(f"batch of {BATCH_SIZE}, {device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    test_speed_of_merging()
