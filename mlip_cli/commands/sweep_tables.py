"""A merge sweep for a person: speed, then accuracy on each data set."""

from typing import Any

from mlip_cli.commands.profile import ratio
from mlip_cli.commands.zeroshot_tables import INTERVALS, percent, score
from mlip_cli.output import print_lines, print_table


def show(result: dict[str, Any]) -> None:
    """The sweep for a person."""
    rows = [
        [
            *names(point),
            f"{point['true_rate']:.3f}",
            " ".join(map(str, point["tokens_per_block"])),
            f"{point['gflops']:.3g}",
            f"{point['images_per_s']:,.1f}",
            ratio(point),
            f"{point['expected_speedup']:.2f}",
        ]
        for point in result["points"]
    ]
    columns = ["method", "rate", "true rate", "tokens per block", "GFLOPs", "images/s", "x rate 0 (95 %)", "by FLOPs"]
    print_table(columns, rows)
    print_lines(
        f"batch of {result['batch_size']}, fp32, on {result['device']}, {result['device_name']}, "
        f"{result['threads']} threads, "
        f"torch {result['torch']}"
    )
    for dataset in result["datasets"]:
        show_dataset(dataset)


def show_dataset(dataset: dict[str, Any]) -> None:
    """Accuracy on one data set."""
    has_names = "names" in dataset["points"][0]
    columns = ["method", "rate", "mean recall %", "top-1 %", *(["name R@5 %"] if has_names else [])]
    rows = []
    for point in dataset["points"]:
        row = [*names(point), score(point, "mean_per_class_recall"), score(point, "acc1")]
        if has_names:
            row.append(score(point["names"], "r5"))
        rows.append([*row, percent(point["agreement"]), *versus(point)])
    chance = f"chance {percent(dataset['chance'])} %"
    if has_names:
        chance += f", of name R@5 {percent(dataset['points'][0]['names']['r5_chance'])} %"
    print_lines(f"\n{dataset['dataset']}: {dataset['n']:,} pictures, {chance}; {INTERVALS}")
    print_table([*columns, "same top-1 %", "won/lost", "p"], rows)
    print_lines("won/lost: pictures that only this setting, or only rate 0, puts first; p: McNemar's exact test")


def names(point: dict[str, Any]) -> list[str]:
    """Method and rate of a row, as asked for."""
    return [point["method"] or "none", f"{point['rate']:g}"]


def versus(point: dict[str, Any]) -> list[str | None]:
    """Pictures that only the merged or only the unmerged model gets right, and how likely that is by chance."""
    test = point["paired"]["acc1"]
    return [f"{test['won']}/{test['lost']}", f"{test['p']:.2g}"] if point["method"] else [None, None]
