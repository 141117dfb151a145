"""The ablation's table, contrasts and picture, from OUT/results alone: python -m ablation.verdict OUT."""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from ablation.runs import RUNS
from ablation.scores import Contrast, Rows, contrast, group_recall, holm, macro, numbered, recall, reciprocal_ranks

from mlip_cli.terminal.output import print_lines, print_table

matplotlib.use("svg")

Results = dict[int, dict[str, Any]]
"""Seed -> result."""

CONTRASTS = (
    ("MLIP - clip, equal steps", "mlip", "clip"),
    ("MLIP@0.5 - clip, equal CPU time", "mlip_half_time", "clip"),
    ("guided - tome at 0.5", "mlip_half", "mlip_half_tome"),
    ("branch - none", "branch", "clip"),
)
"""Named before the first run of stage C."""

COLUMNS = (
    *("run", "measured at", "seeds", "MRR %", "sd"),
    *("name R@1 %", "name R@5 %", "picture R@1 %", "picture R@5 %", "group %", "points %", "words point %"),
)


def read(folder: Path) -> dict[str, Results]:
    """Name of a run -> its results by seed, in the order of runs.py."""
    found: dict[str, Results] = defaultdict(dict)
    for run in RUNS:
        path = folder / f"{run.label}.json"
        if path.is_file():
            of_split = folder / f"pictures_{run.split}.json"
            if not of_split.is_file():
                raise SystemExit(f"{of_split}: no such file beside {path.name}; ablation.measure writes both")
            pictures = json.loads(of_split.read_bytes())
            result = json.loads(path.read_bytes())
            if result["data"] != pictures["data"]:
                raise SystemExit(
                    f"{path}: measured on other data than pictures_{run.split}.json; remove it, train again"
                )
            found[run.name][run.seed] = pictures | result
    return found


def rows(results: Results, seeds: list[int], at: str = "own") -> Rows:
    """Reciprocal ranks of some seeds, which all have the same pictures."""
    first = results[seeds[0]]
    values = np.stack([reciprocal_ranks(results[seed], at) for seed in seeds])
    return Rows(values, numbered(first["concepts"]), numbered(first["sources"]))


def scores(results: Results, at: str, feature: str) -> dict[str, np.ndarray]:
    """Percentages of each seed, by column: (seeds,)."""
    found = defaultdict(list)
    for result in results.values():
        sources = numbered(result["sources"])
        found["MRR %"].append(macro(reciprocal_ranks(result, at, feature), sources))
        for column, way, k in (
            ("name R@1 %", "image_to_text", 1),
            ("name R@5 %", "image_to_text", 5),
            ("picture R@1 %", "text_to_image", 1),
            ("picture R@5 %", "text_to_image", 5),
        ):
            found[column].append(macro(recall(result, way, k, at, feature), sources))
        if feature == "spatial":
            found["group %"].append(group_recall(result, result["groups"], at))
            pointing = result["at"][at]["pointing"]
            found["points %"].append(pointing["feature"])
            if "tokens" in pointing:
                found["words point %"].append(pointing["tokens"])
    return {name: 100 * np.asarray(values) for name, values in found.items()}


def table(everything: dict[str, Results]) -> list[list[str]]:
    """A line for every run, merge rate and feature."""
    lines = []
    for name, results in everything.items():
        one = next(iter(results.values()))
        for at, measured in one["at"].items():
            for feature in ("spatial", "sum"):
                if feature in measured:
                    found = scores(results, at, feature)
                    where = f"rate {measured['rate']:.2f}" + (", both domains" if feature == "sum" else "")
                    mrr = found["MRR %"]
                    sd = f"{mrr.std(ddof=1):.2f}" if len(mrr) > 1 else "-"
                    cells = [f"{found[c].mean():.2f}" if c in found else "-" for c in COLUMNS[5:]]
                    lines.append([name, where, str(len(results)), f"{mrr.mean():.2f}", sd, *cells])
    return lines


def contrasts(everything: dict[str, Results]) -> list[Contrast]:
    """Those of CONTRASTS whose runs are there, over the seeds that both have; the others are named."""
    found = []
    for name, first, second in CONTRASTS:
        seeds = sorted(everything.get(first, {}).keys() & everything.get(second, {}).keys())
        if seeds:
            found.append(contrast(name, rows(everything[first], seeds), rows(everything[second], seeds)))
        else:
            print_lines(f"{name}: no seed yet of both {first} and {second}")
    return found


def draw(found: list[Contrast], path: Path) -> None:
    """The contrasts with their intervals, as a picture."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.5 * len(found)), layout="constrained")
    for place, one in enumerate(reversed(found)):
        axes.plot([100 * one.low, 100 * one.high], [place, place], color="#3465a4", linewidth=2)
        axes.plot(100 * one.difference, place, "o", color="#3465a4")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(found)), [one.name for one in reversed(found)])
    axes.set_ylim(-0.5, len(found) - 0.5)
    axes.set_xlabel("difference of the mean reciprocal rank, percentage points, 95 % interval")
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    everything = read(out / "results")
    if not everything:
        raise SystemExit(f"{out / 'results'}: no results yet; run ablation.train_all first")
    print_table(list(COLUMNS), table(everything))
    found = contrasts(everything)
    adjusted = holm([one.p for one in found], among=len(CONTRASTS))
    lines = []
    for one, p in zip(found, adjusted, strict=True):
        interval = f"{100 * one.difference:+.2f} ({100 * one.low:+.2f} to {100 * one.high:+.2f})"
        lines.append([one.name, interval, f"{p:.3f}", f"{one.seeds_agree} of {one.num_seeds}", one.verdict(p)])
    if lines:
        print_table(["contrast", "MRR, points (95 %)", "p (Holm)", "seeds agree", "verdict"], lines)
        draw(found, out / "contrasts.svg")
        print_lines(
            "intervals by 10,000 draws of concepts and seeds at once; few seeds make them too narrow on that side: a "
            f"sample of five has four fifths of the variance\npicture: {out / 'contrasts.svg'}"
        )


if __name__ == "__main__":
    main()
