"""What merging gains where the image tower is large: ViT-B/16 at 224 px, forward, rates 0, 0.3 and 0.5 side by side.

    make bench                    or, alone:    python tests/benchmarks/bench_merging.py

All rates run in turn in every round of one process; speed-ups are medians of ratios inside rounds. Random weights: no
kernel is faster or slower for them.
"""

from collections.abc import Callable
from functools import partial

import torch

from mlip_cli.commands.costs import image_gflops
from mlip_cli.config import Model, Text, Vision
from mlip_cli.merge_plan import MergePlan
from mlip_cli.model.clip import CLIP, set_fused_attention
from mlip_cli.output import print_lines, print_table
from mlip_cli.profiling import device_name, measure_interleaved

RATES = (0.0, 0.3, 0.5)
METHODS = ("guided", "tome")
BATCH_SIZE, ROUNDS = 2, 7


def vit_b_16() -> CLIP:
    """The image tower of the recipes cc12m and yfcc15m_v1, beside a text tower that is not used."""
    config = Model(vision=Vision(timm="vit_base_patch16_224"), text=Text(width=64, depth=1, num_heads=1))
    model = CLIP(config, image_size=224, losses={"spatial_global": "infonce"}, global_batch_size=2)
    set_fused_attention(model, False)
    return model.eval().requires_grad_(False)


def forward(model: CLIP, images: torch.Tensor, plan: MergePlan, dtype: torch.dtype) -> None:
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        model.encode_image(images, plan)


def measure(model: CLIP, dtype: torch.dtype) -> list[list[str]]:
    """Rows of the table for one precision."""
    images = torch.randint(256, (BATCH_SIZE, 3, 224, 224), dtype=torch.uint8)
    plans = {"none 0.0": model.merge_plan(0.0)}
    plans |= {f"{m} {rate}": model.merge_plan(rate, m) for m in METHODS for rate in RATES if rate}
    functions: dict[str, Callable[[], None]] = {
        name: partial(forward, model, images, plan, dtype) for name, plan in plans.items()
    }
    timings = measure_interleaved(functions, ROUNDS)
    whole = sum(image_gflops(model, plans["none 0.0"]).values())
    rows = []
    for (name, plan), timing in zip(plans.items(), timings.values(), strict=True):
        cost = sum(image_gflops(model, plan).values())
        low, high = timing.speedup_interval
        rows.append(
            [
                str(dtype).removeprefix("torch."),
                name.split()[0],
                f"{plan.rate:.2f}",
                f"{cost:.1f}",
                f"{BATCH_SIZE / timing.median_s:.2f}",
                f"{timing.speedup:.2f} ({low:.2f}-{high:.2f})",
                f"{whole / cost:.2f}",
                f"{timing.speedup * cost / whole:.2f}",
            ]
        )
    return rows


def test_speed_of_merging() -> None:
    torch.manual_seed(0)
    model = vit_b_16()
    rows = [row for dtype in (torch.float32, torch.bfloat16) for row in measure(model, dtype)]
    columns = ["precision", "method", "rate", "GFLOPs", "images/s", "x rate 0 (95 %)", "by FLOPs", "measured/FLOPs"]
    print_table(columns, rows)
    print_lines(f"batch of {BATCH_SIZE}, {device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    test_speed_of_merging()
