"""The ablation's tables, decisions and contrasts, from OUT/results alone: python -m ablation.verdict OUT."""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import matplotlib
import numpy as np
from ablation.factorial import DEGREES_OF_FREEDOM
from ablation.questions import QUESTIONS
from ablation.results import Result, found_in, read
from ablation.runs import Found, Missing
from ablation.scores import Contrast, Rows, contrast, holm, lr_by_question, macro, numbered, recall, reciprocal_ranks
from ablation.stages import (
    CONFIRMATION_STEPS,
    CONTRASTS,
    Comparison,
    after_halving,
    after_screening,
    halving_gains,
    plateau_steps,
    screened,
)

from mlip_cli.terminal.output import print_lines, print_table

matplotlib.use("svg")

Arms = dict[str, dict[int, Result]]
"""Name of an arm -> its results by seed."""

COLUMNS = (
    *("arm", "split", "steps", "seeds", "measured at", "LR", "sd", *(f"LR {name}" for name in QUESTIONS)),
    *("MRR %", "text R@1 %", "text R@5 %", "picture R@1 %", "picture R@5 %", "CPU s"),
)
FEATURES = ("spatial", "frequency", "sum")


def arms_of(results: dict[str, Result]) -> Arms:
    """Results by arm and seed; checkpoints of one training are arms of their own."""
    arms: Arms = defaultdict(dict)
    for name, result in results.items():
        arm, _, seed = name.rpartition("-")
        number, _, step = seed.partition("@")
        arms[f"{arm}@{step}" if step else arm][int(number)] = result
    return dict(
        sorted(arms.items(), key=lambda item: (next(iter(item[1].values()))["split"] == "test", natural(item[0])))
    )


def natural(name: str) -> tuple[str, int]:
    """plateau_half@250 comes before plateau_half@1000."""
    arm, _, step = name.partition("@")
    return arm, int(step or 0)


def other_measures(result: Result, at: str, feature: str) -> dict[str, float]:
    """Reciprocal rank and recalls, as means over the questions."""
    found: dict[str, list[float]] = defaultdict(list)
    for name in QUESTIONS:
        ranks = result["at"][at][feature][name]
        sources = numbered(result["questions"][name]["sources"])
        found["MRR %"].append(macro(reciprocal_ranks(ranks), sources))
        for answer, way in (("text", "image_to_text"), ("picture", "text_to_image")):
            for k in (1, 5):
                found[f"{answer} R@{k} %"].append(macro(recall(ranks, way, k), sources))
    return {column: 100 * float(np.mean(values)) for column, values in found.items()}


def table(arms: Arms) -> list[list[str]]:
    """A line for every arm, merge rate and feature."""
    lines = []
    for arm, results in arms.items():
        one = next(iter(results.values()))
        for at, measured in one["at"].items():
            what = [arm, one["split"], str(one["step"]), str(len(results))]
            lines += [[*what, *line(results, at, feature)] for feature in FEATURES if feature in measured]
    return lines


def line(results: dict[int, Result], at: str, feature: str) -> list[str]:
    """Means over seeds, from the column `measured at` on."""
    by_question = [lr_by_question(result, at, feature) for result in results.values()]
    lrs = np.array([np.mean(list(lr.values())) for lr in by_question])
    others = [other_measures(result, at, feature) for result in results.values()]
    times = [result["cpu_s"] for result in results.values() if result["cpu_s"] is not None]
    rate = next(iter(results.values()))["at"][at]["rate"]
    return [
        feature + (f", rate {rate:.2f}" if rate else ""),
        f"{lrs.mean():.3f}",
        f"{lrs.std(ddof=1):.3f}" if len(lrs) > 1 else "-",
        *(f"{np.mean([lr[name] for lr in by_question]):.3f}" for name in QUESTIONS),
        *(f"{np.mean([other[column] for other in others]):.2f}" for column in others[0]),
        f"{median(times):.0f}" if times else "-",
    ]


def show_choices(found: Found) -> None:
    """Plateau, main effects, gains of the halving and what is decided, as far as there are results."""
    try:
        print_lines(f"plateau: {plateau_steps(found):,} steps; the confirmation takes {CONFIRMATION_STEPS:,}")
        rows = [
            [one.factor, f"{one.gain:+.3f}", f"{one.standard_error:.3f}", "{:+.3f} to {:+.3f}".format(*one.interval)]
            for one in screened(found).values()
        ]
        print_table(["factor", "gain of LR", "standard error", "95 %"], rows)
        print_lines(
            f"each effect from all 16 runs; noise from the {DEGREES_OF_FREEDOM} degrees of freedom that they leave\n"
            + after_screening(found).reason
        )
        gains = halving_gains(found)
        print_table(["MLIP factors", "gain of LR over none"], [[mlip, f"{gain:+.3f}"] for mlip, gain in gains.items()])
        print_lines(after_halving(found).reason)
    except Missing as missing:
        print_lines(f"{missing}")


def compare(comparison: Comparison, arms: Arms) -> Contrast | None:
    """Over the seeds that both arms have; None if there is none."""
    first, second = arms.get(comparison.first, {}), arms.get(comparison.second, {})
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        print_lines(f"{comparison.name}: no seed yet of both {comparison.first} and {comparison.second}")
        return None
    own, others = ([arm[seed] for seed in seeds] for arm in (first, second))
    return contrast(comparison.name, Rows.of(own), Rows.of(others), margin=comparison.margin)


def cpu_ratio(comparison: Comparison, arms: Arms) -> float | None:
    """Median CPU time of the first arm over that of the second; None if one of them is not known."""
    times = [
        [result["cpu_s"] for result in arms.get(name, {}).values() if result["cpu_s"] is not None]
        for name in (comparison.first, comparison.second)
    ]
    return median(times[0]) / median(times[1]) if all(times) else None


def verdict(comparison: Comparison, found: Contrast, adjusted_p: float, ratio: float | None) -> str:
    """The contrast's own verdict, unless the arm took more CPU time than it was allowed."""
    if comparison.most_cpu is not None and (ratio is None or ratio > comparison.most_cpu):
        return "not shown: CPU time"
    return found.verdict(adjusted_p)


def show_contrasts(arms: Arms, out: Path) -> None:
    """Those of CONTRASTS whose arms are there; the others are named."""
    pairs = [(one, found) for one in CONTRASTS if (found := compare(one, arms)) is not None]
    adjusted = holm([found.p for _, found in pairs], among=len(CONTRASTS))
    lines = []
    for (comparison, one), p in zip(pairs, adjusted, strict=True):
        ratio = cpu_ratio(comparison, arms)
        lines.append(
            [
                one.name,
                f"{one.gain:+.3f} ({one.low:+.3f} to {one.high:+.3f})",
                f"{p:.3f}",
                f"{one.seeds_agree} of {one.num_seeds}",
                "-" if ratio is None else f"{ratio:.2f}",
                verdict(comparison, one, p, ratio),
            ]
        )
    if lines:
        print_table(["contrast", "gain of LR (95 %)", "p (Holm)", "seeds agree", "CPU time", "verdict"], lines)
        draw([found for _, found in pairs], out / "contrasts.svg")
        print_lines(
            "intervals by 10,000 draws of concepts and seeds at once; few seeds make them too narrow on that side: a "
            f"sample of five has four fifths of the variance\npicture: {out / 'contrasts.svg'}"
        )


def draw(found: Sequence[Contrast], path: Path) -> None:
    """The contrasts with their intervals and margins, as a picture."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.5 * len(found)), layout="constrained")
    for place, one in enumerate(reversed(found)):
        axes.plot([one.low, one.high], [place, place], color="#3465a4", linewidth=2)
        axes.plot(one.gain, place, "o", color="#3465a4")
        axes.plot(-one.margin, place, "|", color="black", markersize=14)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(found)), [one.name for one in reversed(found)])
    axes.set_ylim(-0.5, len(found) - 0.5)
    axes.set_xlabel("gain of the mean log2 rank, 95 % interval")
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    results = read(out / "results")
    if not results:
        raise SystemExit(f"{out / 'results'}: no results yet; run ablation.train_all first")
    arms = arms_of(results)
    print_table(list(COLUMNS), table(arms))
    show_choices(found_in(out / "results"))
    show_contrasts(arms, out)


if __name__ == "__main__":
    main()
