"""The result of `mlip profile` as tables for people: 80 columns are enough. No torch: a result may come from a file."""

import sys
import textwrap
from typing import Any

from mlip_cli.evaluate.words import per_second
from mlip_cli.output import plural, print_lines, print_table

Result = dict[str, Any]

WIDTH = 80
BAR_WIDTH = 24
"""Characters of a bar over the whole step."""
EIGHTHS = " ▏▎▍▌▋▊▉"


def show(result: Result) -> None:
    """Parameters, operations, speeds, the parts of the step, the limit."""
    print_table(["part", "parameters"], [[name, f"{count:,}"] for name, count in result["parameters"].items()])
    print_lines("")
    _show_operations(result)
    print_lines("")
    _show_speeds(result)
    print_lines("")
    _show_breakdown(result)
    print_lines("")
    print_lines("\n".join(_facts(result)))


def _show_operations(result: Result) -> None:
    flops, merging = result["gflops"], result["merging"]
    parts, whole = flops["image_tower_by_part"], flops["image_tower_unmerged_by_part"]
    decimals = 2 if flops["image_tower_unmerged"] >= 1 else 4
    columns = ["GFLOPs an image", "rate 0"] + ([f"rate {merging['rate']:.2f}"] if merging else [])
    rows = [[name, *(f"{g:.{decimals}f}" for g in (whole[name], parts[name])[: len(columns) - 1])] for name in parts]
    totals = (flops["image_tower_unmerged"], flops["image_tower"])[: len(columns) - 1]
    print_table(columns, [*rows, ["image tower", *(f"{g:.{decimals}f}" for g in totals)]])
    beside = [
        ("frequency branch, in training", flops["frequency_branch"]),
        ("token heads, in training", flops["token_heads"]),
        (f"text tower, {result['caption_tokens']} tokens", flops["text_tower"]),
    ]
    if result["caption_tokens"] < result["context_length"]:
        beside.append((f"text tower, {result['context_length']} tokens", flops["text_tower_at_context_length"]))
    print_lines("")
    print_table(["beside the image tower", "GFLOPs"], [[name, f"{g:.{decimals}f}"] for name, g in beside if g])
    print_lines("\npatch tokens in each block: " + " ".join(map(str, result["tokens_per_block"])))
    print_lines(f"tokens of a caption: {result['caption_tokens']} ({result['caption_tokens_from']})")


def _show_speeds(result: Result) -> None:
    rows = [
        [line["part"], f"{line['per_s']:,.1f}", f"{1000 * line['median_s']:,.1f}", ratio(line)]
        for line in result["speed"]
    ]
    print_table([f"batch of {result['batch_size']}, {result['precision']}", "per s", "ms", "x rate 0 (95 %)"], rows)


def _show_breakdown(result: Result) -> None:
    """One row a part of the step; what loader processes do meanwhile stands apart, since it adds nothing to it."""
    inside = [line for line in result["breakdown"] if line["in_step"]]
    apart = [line for line in result["breakdown"] if not line["in_step"]]
    left = {"part": "unaccounted", **result["unaccounted"]}
    whole = {"part": "whole step", "seconds": result["whole_s"], "share": 1.0}
    rows = [_row(line) for line in (*inside, left)] + [[*_row(whole)[:3], None]]
    print_table(["part of a training step", "ms", "%", "share"], rows)
    if apart:
        who = plural(result["data"]["loader_processes"], "loader process", "loader processes")
        print_lines("")
        print_table([f"a batch, by {who}", "ms", "%", "of the step's time"], [_row(line) for line in apart])


def _row(line: Result) -> list[Any]:
    return [line["part"], f"{1000 * line['seconds']:,.2f}", f"{100 * line['share']:.1f}", bar(line["share"])]


def bar(share: float) -> str:
    """A share of the step as a bar of block characters, or of # where stdout cannot show them; at most the whole."""
    width = min(max(share, 0.0), 1.0) * BAR_WIDTH
    if not _shows_blocks():
        return "#" * round(width)
    full, eighth = divmod(round(8 * width), 8)
    return ("█" * full + EIGHTHS[eighth]).rstrip()


def _shows_blocks() -> bool:
    return (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"


def _facts(result: Result) -> list[str]:
    matmul = next(line for line in result["matmul"] if line["precision"] == result["precision"])
    memory, limit = result["peak_memory"], result["limit"]
    micro = result["micro_batch_size"]
    return [
        *textwrap.wrap(f"limit: {limit['part']}, {limit['why']}", WIDTH, subsequent_indent="  "),
        f"unaccounted: {1000 * result['unaccounted']['outside_s']:,.2f} ms lie outside of all parts, "
        "the rest between medians",
        f"cost of the clocks: {100 * result['clocks_cost']:.1f} %; without them the step takes "
        f"{1000 * result['step_s']:,.1f} ms",
        *([f"micro-batches of {micro}: the first forward pass has no graph"] if micro is not None else []),
        f"model FLOPs utilisation {100 * result['mfu']:.1f} %: {per_second(result['step_tflops'])} of "
        f"{per_second(result['matmul_peak_tflops'])}",
        f"(the peak: {result['precision']} products of {matmul['shape'][0]:,} x {matmul['shape'][1]:,} matrices, "
        "measured beside the step)",
        f"peak memory of the training step: {memory['gib']:.2f} GiB",
        f"({memory['measured']})",
        f"on {result['device']}, {result['device_name']}, {plural(result['threads'], 'thread')}, "
        f"torch {result['torch']}",
    ]


def ratio(line: Result) -> str | None:
    """1.52 (1.48-1.55), or None."""
    if line["speedup"] is None:
        return None
    low, high = line["speedup_interval"]
    return f"{line['speedup']:.2f} ({low:.2f}-{high:.2f})"
