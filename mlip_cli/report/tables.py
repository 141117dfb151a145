"""The results of `mlip eval-zeroshot` as tables for people. No torch: results may all come from files."""

import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from mlip_cli.evaluate.statistics import MANY_CLASSES, paired
from mlip_cli.terminal.output import per_second, percent, plural, print_lines, print_prose, print_table

Result = dict[str, Any]

INTERVALS = "in brackets: 95 % intervals"


def compared(results: Sequence[Result]) -> list[Result]:
    """Results on one data set, each but the first with its paired comparison to the first (McNemar's exact test)."""
    first, *others = results
    return [first, *({**other, "compared_to_first": _comparison(first, other)} for other in others)]


def _comparison(first: Result, other: Result) -> Result:
    return {
        "first": {"run": first["run"], "merge_rate": first["merge_rate"]},
        **{name: paired(first["right"][name], answers) for name, answers in other["right"].items()},
    }


def without_answers(result: Result) -> Result:
    """`result` without the line of single answers, which only its file needs."""
    return {key: value for key, value in result.items() if key not in ("right", "predicted")}


def print_results(groups: Sequence[Sequence[Result]], *, failed: Sequence[str]) -> None:
    """One table of all classification sets, and one a data set with names (openmoji). Each fits 80 columns.

    Runs are numbered where there are several, and named below: their names are longer than any of their numbers.
    """
    named = [group for group in groups if "names" in group[0]]
    plain = [group for group in groups if "names" not in group[0]]
    results = [result for group in groups for result in group]
    checkpoints = checkpoint_words(results)
    numbers = {run: number for number, run in enumerate(checkpoints, start=1)} if len(checkpoints) > 1 else {}
    for group in named:
        _print_named(group, numbers)
    if plain or failed:
        _print_plain(plain, numbers, failed=failed)
    for run, checkpoint in checkpoints.items():
        print_prose(f"run {numbers[run]}: {checkpoint}" if numbers else f"measured: {checkpoint}")
    for line in _speeds(results):
        print_prose(line)


def _print_named(group: Sequence[Result], numbers: Mapping[str, int]) -> None:
    first = group[0]
    names = first["names"]
    rows = [
        [
            *run_cell(result, numbers),
            merge_rate(result),
            score(result, "mean_per_class_recall"),
            score(result["names"], "r1"),
            score(result["names"], "r5"),
            f"{result['images_per_s']:,.0f}",
        ]
        for result in group
    ]
    print_table(
        (*run_column(numbers), "true rate", "group recall %", "name R@1 %", "name R@5 %", "images/s"),
        rows,
        title=f"{first['dataset']}: {plural(first['n'], 'picture')} of concepts that training did not see",
    )
    print_prose(
        f"chance: group recall {percent(first['chance'])} % ({plural(first['num_classes'], 'group')}), "
        f"name R@1 {percent(names['r1_chance'])} %, R@5 {percent(names['r5_chance'])} % "
        f"({plural(names['num_candidates'], 'name')}); {INTERVALS}"
    )
    print_lines("")


def _print_plain(groups: Sequence[Sequence[Result]], numbers: Mapping[str, int], *, failed: Sequence[str]) -> None:
    shows_top5 = any(_has_top5(first) for first, *_ in groups)
    rows: list[list[Any]] = [
        [
            result["dataset"],
            *run_cell(result, numbers),
            merge_rate(result),
            score(result, "acc1"),
            *([percent(result["acc5"]) if _has_top5(result) else None] if shows_top5 else []),
            percent(result["mean_per_class_recall"]),
            f"{result['images_per_s']:,.0f}",
        ]
        for group in groups
        for result in group
    ]
    top5 = ("top-5 %",) if shows_top5 else ()
    columns = ("data set", *run_column(numbers), "rate", "top-1 %", *top5, "recall %", "images/s")
    rows += [[name, *[None] * (len(columns) - 1)] for name in failed]
    print_table(columns, rows)
    for first, *_ in groups:
        print_prose(
            f"{first['dataset']}: {plural(first['n'], 'picture')}, {plural(first['num_classes'], 'class', 'classes')}, "
            f"chance {percent(first['chance'])} %"
            + (f", of top-5 {percent(min(1, 5 / first['num_classes']))} %" if _has_top5(first) else "")
        )
    for name in failed:
        print_prose(f"{name}: not evaluated")
    print_prose(f"rate: the true merge rate; recall: mean over the classes; {INTERVALS}")
    print_lines("")


def _has_top5(result: Result) -> bool:
    return result["num_classes"] >= MANY_CLASSES


def run_column(numbers: Mapping[str, int]) -> tuple[str, ...]:
    """The title of the column of runs, where there are several."""
    return ("run",) if numbers else ()


def run_cell(result: Result, numbers: Mapping[str, int]) -> list[int]:
    """The number of a result's run in that column."""
    return [numbers[result["run"]]] if numbers else []


def merge_rate(result: Result) -> str:
    """The true one."""
    return f"{result['true_merge_rate']:.3f}"


def score(scores: Result, name: str) -> str:
    """A fraction with its interval, in per cent: 31.6 (28.0-35.4)."""
    low, high = scores[f"{name}_interval"]
    return f"{percent(scores[name])} ({percent(low)}-{percent(high)})"


def checkpoint_words(results: Sequence[Result]) -> dict[str, str]:
    """What was measured: run -> its checkpoint in words."""
    which = {True: "last", False: "earlier"}
    return {
        result["run"]: f"{result['run']} at step {result['step']} ({which[result['is_last_checkpoint']]} checkpoint)"
        for result in results
    }


def _speeds(results: Sequence[Result]) -> list[str]:
    """A word of caution when speeds come from several calls, between which the machine may have had other work."""
    calls = {(result["dataset"], result["measured_at"]) for result in results}
    if len(calls) == len({dataset for dataset, _ in calls}):
        return []
    return ["images/s: some rows were measured in an earlier call, so compare speeds with care (measured_at in --json)"]


WIDTH = 80
BAR_WIDTH = 24
"""Characters of a bar over the whole step."""
EIGHTHS = " ▏▎▍▌▋▊▉"


def show_profile(result: Result) -> None:
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


BESIDE = "beside rate 0"
WON = "won, lost: for so many, only this setting, or only rate 0,"
TEST = "p: McNemar's exact test"


def show_sweep(result: dict[str, Any]) -> None:
    """The sweep for a person: first the speed, then the accuracy, in tables that fit 80 columns."""
    points = result["points"]
    print_table(
        ("method", "rate", "true rate", "GFLOPs", "images/s", "x rate 0 (95 %)", "by FLOPs"),
        [
            [
                *names(point),
                f"{point['true_rate']:.3f}",
                f"{point['gflops']:.3g}",
                f"{point['images_per_s']:,.1f}",
                ratio(point),
                f"{point['expected_speedup']:.2f}",
            ]
            for point in points
        ],
    )
    print_prose(
        f"batch of {result['batch_size']}, fp32, on {result['device']}, {result['device_name']}, "
        f"{plural(result['threads'], 'thread')}, torch {result['torch']}"
    )
    scattered = [" ".join(names(point)) for point in points if scatters(*point["speedup_interval"])]
    if scattered:
        print_prose(
            f"the rounds of {', '.join(scattered)} differ much: the machine had other work; repeat, or raise --rounds"
        )
    print_lines("\ntokens in each block:")
    for point in points:
        print_prose(f"  {' '.join(names(point))}: {' '.join(map(str, point['tokens_per_block']))}")
    for dataset in result["datasets"]:
        show_dataset(dataset)
    for failed in result["failed"]:
        print_prose(f"\n{failed['dataset']}: not evaluated")


def show_dataset(dataset: dict[str, Any]) -> None:
    """Accuracy on one data set: each setting alone, then beside rate 0 on the same pictures."""
    print_lines("")
    show_scores = _show_retrieval if dataset["task"] == "retrieval" else _show_zeroshot
    show_scores(dataset, [point for point in dataset["points"] if point["method"]])


def _show_zeroshot(dataset: dict[str, Any], merged: Sequence[dict[str, Any]]) -> None:
    points = dataset["points"]
    has_names = "names" in points[0]
    chance = f"chance {percent(dataset['chance'])} %"
    if has_names:
        chance += f", of name R@5 {percent(points[0]['names']['r5_chance'])} %"
    print_prose(f"{dataset['dataset']}: {plural(dataset['n'], 'picture')}, {chance}; {INTERVALS}")
    print_table(
        ("method", "rate", "mean recall %", "top-1 %", *(["name R@5 %"] if has_names else [])),
        [
            [
                *names(point),
                score(point, "mean_per_class_recall"),
                score(point, "acc1"),
                *([score(point["names"], "r5")] if has_names else []),
            ]
            for point in points
        ],
    )
    if merged:
        print_table(
            ("method", "rate", "same top-1 as rate 0 %", "won", "lost", "p"),
            [[*names(point), percent(point["agreement"]), *versus(point["paired"]["acc1"])] for point in merged],
            title=BESIDE,
        )
        print_prose(f"{WON} puts the right class first; {TEST}")


def _show_retrieval(dataset: dict[str, Any], merged: Sequence[dict[str, Any]]) -> None:
    points = dataset["points"]
    pairs = f"{plural(dataset['n'], 'picture')}, {plural(dataset['num_texts'], 'caption')}"
    print_prose(f"{dataset['dataset']}: {pairs}; {INTERVALS}")
    for way in ("image_to_text", "text_to_image"):
        chances = "/".join(f"{percent(points[0][way][f'r{k}_chance'])}" for k in (1, 5, 10))
        print_table(
            ("method", "rate", "R@1 %", "R@5 %", "R@10 %"),
            [[*names(point), *(score(point[way], f"r{k}") for k in (1, 5, 10))] for point in points],
            title=f"{way.replace('_', ' ')} (chance {chances} %)",
        )
    if merged:
        print_table(
            ("method", "rate", "to text: won", "lost", "p", "to image: won", "lost", "p"),
            [
                [
                    *names(point),
                    *versus(point["paired"]["image_to_text_r5"]),
                    *versus(point["paired"]["text_to_image_r5"]),
                ]
                for point in merged
            ],
            title=BESIDE,
        )
        print_prose(f"{WON} has a right one among the first 5; {TEST}, where captions of a picture count together")


def scatters(low: float, high: float) -> bool:
    """Whether the interval of a speed-up is so wide that it says little."""
    return high > 1.5 * low


def names(point: dict[str, Any]) -> list[str]:
    """Method and rate of a row, as asked for."""
    return [point["method"] or "none", f"{point['rate']:g}"]


def versus(test: dict[str, Any]) -> list[str]:
    """What only the merged or only the unmerged model gets right, and how likely that is by chance."""
    return [f"{test['won']:,}", f"{test['lost']:,}", f"{test['p']:.2g}"]
