"""What the text tower costs on captions at their own lengths, against captions padded to the longest of the batch.

    make bench                    or, alone:    python tests/benchmarks/bench_text.py

Lengths are log-normal, as those of web captions are: median about 14 tokens, 4 % over 48, and one caption as long
as the tower reads. Both ways run in turn in every round of one process, forward and backward with a feature of each
caption. The clock is CPU time, which a busy machine changes less; ratios are medians over rounds. Aim: 1.6 times.
"""

import time
from statistics import median

import numpy as np
import torch

from mlip_cli.devices import device_name
from mlip_cli.model.blocks import set_fused_attention
from mlip_cli.model.text import TextTower
from mlip_cli.profiling.flops import attention_macs, mlp_macs
from mlip_cli.recipe.config import Text
from mlip_cli.terminal.output import print_lines, print_table

CAPTIONS = 512
WIDTH, DEPTH, HEADS = 512, 2, 8
"""CLIP's text tower has 12 such blocks; all cost the same."""
MEDIAN, SPREAD = 14, 0.75
ROUNDS = 5
AIM = 1.6
WAYS = ("padded", "in groups")


def caption_lengths(n: int = CAPTIONS) -> list[int]:
    draws = np.random.default_rng(0).normal(np.log(MEDIAN), SPREAD, n)
    longest = Text().context_length
    return [longest, *np.exp(draws[1:]).round().clip(3, longest).astype(int).tolist()]


def captions(lengths: list[int]) -> torch.Tensor:
    text = Text()
    ids = torch.randint(1, text.vocab_size - 2, (len(lengths), text.context_length))
    for row, length in zip(ids, lengths, strict=True):
        row[length - 1], row[length:] = text.vocab_size - 1, 0
    return ids


def train(tower: TextTower, ids: torch.Tensor, lengths: list[int] | None, dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        packing = tower.packing(ids, lengths)
        features = tower.pool(tower(ids, packing), ids, packing)
    features.float().square().sum().backward()
    tower.zero_grad(set_to_none=True)


def block_macs(tower: TextTower, lengths: list[int] | None) -> int:
    """Multiply-adds of the blocks, forward."""
    groups = tower.groups(lengths, tower.context_length) or ((CAPTIONS, tower.context_length),)
    return sum(
        rows * (attention_macs(block, width, width=WIDTH) + mlp_macs(block, width))
        for block in tower.blocks
        for rows, width in groups
    )


def compare(dtype: torch.dtype) -> list[list[str]]:
    """Two rows of the table."""
    tower, lengths = TextTower(Text(width=WIDTH, depth=DEPTH, num_heads=HEADS)).train(), caption_lengths()
    set_fused_attention(tower, False)
    ids = captions(lengths)
    given = dict(zip(WAYS, (None, lengths), strict=True))
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(ROUNDS + 1):
        for name in WAYS if number % 2 == 0 else reversed(WAYS):
            start = time.process_time()
            train(tower, ids, given[name], dtype)
            seconds[name].append(time.process_time() - start)
    taken = {name: own[1:] for name, own in seconds.items()}  # the first round warms up
    ratio = median(padded / own for padded, own in zip(*taken.values(), strict=True))
    by_flops = block_macs(tower, None) / block_macs(tower, lengths)
    precision = str(dtype).removeprefix("torch.")
    ratios = {"padded": ["1", "1"], "in groups": [f"{ratio:.2f}", f"{by_flops:.2f}"]}
    return [[precision, name, f"{median(taken[name]):.2f}", *ratios[name]] for name in WAYS]


def test_speed_of_the_text_tower() -> None:
    torch.manual_seed(0)
    lengths = caption_lengths()
    over = sum(length > 48 for length in lengths) / CAPTIONS
    rows = [row for dtype in (torch.float32, torch.bfloat16) for row in compare(dtype)]
    print_table(["numbers", "captions", "CPU s", f"x padded (aim {AIM:g})", "by FLOPs"], rows)
    print_lines(
        f"{CAPTIONS} captions: median {median(lengths):g} tokens, {over:.1%} over 48; width {WIDTH}, {DEPTH} blocks, "
        f"forward and backward, {device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    test_speed_of_the_text_tower()
