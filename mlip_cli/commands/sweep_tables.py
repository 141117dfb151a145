"""A merge sweep for a person: speed, then accuracy on each data set."""

from collections.abc import Sequence
from typing import Any

from mlip_cli.commands.profile_tables import ratio
from mlip_cli.commands.zeroshot_tables import INTERVALS, score
from mlip_cli.evaluate.words import percent
from mlip_cli.output import plural, print_lines, print_prose, print_table

BESIDE = "beside rate 0"
WON = "won, lost: for so many, only this setting, or only rate 0,"
TEST = "p: McNemar's exact test"


def show(result: dict[str, Any]) -> None:
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
