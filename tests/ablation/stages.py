"""The trainings of the ablation, stage by stage, and the rules that choose the next ones; all fixed before.

After four cells of the halving and before the first run of the confirmation these rules were cut, for time: the halving
has four cells and not six (ABF and F were not trained), no final at the plateau compares the best two of them, and the
confirmation takes the halving's steps and fp32, which all CPUs compute fast. It goes seed by seed, so that whatever
number of whole seeds has ended answers all questions.

A, B, F are what MLIP adds. C, D, E, G are parts of a recipe: what the screening chooses of them goes to every later
arm, CLIP's too. LR is defined in scores.py; a gain is how much it falls. The last checkpoint counts, never the best
one, and no seed is dropped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from ablation.factorial import Effect, cells, effects
from ablation.runs import ON, AblationRun, Found, cell_name, overrides_of

MLIP_FACTORS = "ABF"
RECIPE_FACTORS = "CDEG"

PLATEAU_CHECKPOINTS, CONSTANT_RATE = tuple(range(250, 2001, 250)), 100_000
SCREENING_STEPS, HALVING_STEPS, FINE_STEPS = 500, 1000, 500
PLATEAU_TOLERANCE = 0.05
LEAST_GAIN_OF_SCREENING, LEAST_GAIN_OF_HALVING = 0.05, 0.08
CONFIRMATION_STEPS = HALVING_STEPS
CONFIRMATION_PRECISION = "train.precision=fp32"
MARGIN, MOST_CPU = 0.05, 0.55
SMOOTHED_FREQUENCY = "losses.frequency_global.label_smoothing=0.1"
"""clip_strong.yaml smooths the labels of the only global loss that CLIP has."""

HALVING_CELLS = 4
HALVING_SEEDS = (100, 101)
CONFIRMATION_SEEDS, CONTROL_SEEDS = (300, 301, 302, 303, 304), (300, 301, 302)
"""The screening gives every run a seed of its own, 0 to 15."""


@dataclass(frozen=True)
class Decision:
    """Whether the next stage is worth its time, and why."""

    goes_on: bool
    reason: str


# P: where more steps stop to help


def plateau_runs(found: Found) -> list[AblationRun]:
    """CLIP at a constant rate, measured every 250 steps, on half and on all of the pairs."""
    changes = (
        *ON["C"],
        f"train.steps={CONSTANT_RATE}",
        "optim.ema_horizon=25600",
        "train.checkpoint_every.steps=250",
        "train.checkpoint_every.minutes=10",
        "train.keep.every_steps=250",
    )
    return [
        AblationRun("P", f"plateau_{part}", 0, train, "validation", changes, checkpoints=PLATEAU_CHECKPOINTS)
        for part, train in (("half", "train_half"), ("all", "train"))
    ]


def plateau_steps(found: Found) -> int:
    """The first step whose LR is within 0.05 of the best, on half or on all pairs, whichever is later."""
    firsts = []
    for run in plateau_runs(found):
        lrs = [found[name].lr for name in run.results]
        firsts.append(
            next(step for step, lr in zip(run.checkpoints, lrs, strict=True) if lr <= min(lrs) + PLATEAU_TOLERANCE)
        )
    return max(firsts)


# S: every factor at once


def screening_runs(found: Found) -> list[AblationRun]:
    """The 16 runs of the design, on half of the pairs."""
    steps = f"train.steps={SCREENING_STEPS}"
    return [
        AblationRun("S", cell_name("screening", high), seed, "train_half", "validation", (*overrides_of(high), steps))
        for seed, high in enumerate(cells())
    ]


def screened(found: Found) -> dict[str, Effect]:
    """Main effects of the seven factors."""
    return effects(np.array([found[run.label].lr for run in screening_runs(found)]))


def after_screening(found: Found) -> Decision:
    """Stop if no factor of MLIP gains more than 0.05."""
    gains = {factor: screened(found)[factor].gain for factor in MLIP_FACTORS}
    best = max(gains, key=gains.__getitem__)
    return Decision(
        gains[best] > LEAST_GAIN_OF_SCREENING,
        f"the best MLIP factor of the screening, {best}, gains {gains[best]:+.3f} LR; "
        f"more than {LEAST_GAIN_OF_SCREENING:+} is asked for",
    )


# H: the best cells, twice as long


def chosen_recipe(found: Found) -> str:
    """The recipe factors that are high from here on: those whose gain is above 0."""
    return "".join(factor for factor in RECIPE_FACTORS if screened(found)[factor].gain > 0)


def halving_cells(found: Found) -> list[str]:
    """MLIP factors of four cells, all with the chosen recipe: none, and the three sets of largest predicted gain."""
    gains = {factor: screened(found)[factor].gain for factor in MLIP_FACTORS}
    sets = ["".join(some) for size in range(1, 4) for some in combinations(MLIP_FACTORS, size)]
    best = sorted(sets, key=lambda some: -sum(gains[factor] for factor in some))
    return ["", *best[: HALVING_CELLS - 1]]


def arm(found: Found, mlip: str, *, steps: int) -> tuple[str, ...]:
    """Overrides of the chosen recipe with these MLIP factors."""
    return (*overrides_of(mlip + chosen_recipe(found)), f"train.steps={steps}")


def halving_runs(found: Found) -> list[AblationRun]:
    """Four cells, two seeds."""
    return [
        AblationRun(
            "H", cell_name("halving", mlip), seed, "train_half", "validation", arm(found, mlip, steps=HALVING_STEPS)
        )
        for mlip in halving_cells(found)
        for seed in HALVING_SEEDS
    ]


def halving_gains(found: Found) -> dict[str, float]:
    """MLIP factors of a cell -> its gain over the cell without them; the largest first."""
    lrs = {mlip: found.lr(cell_name("halving", mlip), HALVING_SEEDS) for mlip in halving_cells(found)}
    gains = {mlip: lrs[""] - lr for mlip, lr in lrs.items() if mlip}
    return dict(sorted(gains.items(), key=lambda item: -item[1]))


def after_halving(found: Found) -> Decision:
    """Stop if no cell gains 0.08."""
    best, gain = next(iter(halving_gains(found).items()))
    return Decision(
        gain >= LEAST_GAIN_OF_HALVING,
        f"the best MLIP cell of the halving, {best}, gains {gain:+.3f} LR; {LEAST_GAIN_OF_HALVING:+} is asked for",
    )


# C: confirmation, on test


def chosen_mlip(found: Found) -> str:
    """MLIP factors of the halving's best cell."""
    return next(iter(halving_gains(found)))


def confirmation_runs(found: Found) -> list[AblationRun]:
    """The arms of the four contrasts, seed by seed. `fine` has 256 patches a picture, MLIP merges 3 of 4 away."""
    mlip = chosen_mlip(found)
    smoothed = (SMOOTHED_FREQUENCY,) if "A" in mlip else ()
    arms = (
        ("clip_half", "", "train_half", "clip", ()),
        ("mlip_half", mlip, "train_half", "clip", ()),
        ("clip_all", "", "train", "clip", ()),
        ("clip_strong", "", "train_half", "clip_strong", ()),
        ("mlip_strong", mlip, "train_half", "clip_strong", smoothed),
    )
    return [
        run
        for seed in CONFIRMATION_SEEDS
        for run in (
            *(
                confirmation_run(found, name, seed, factors, changes, train=train, recipe=recipe)
                for name, factors, train, recipe, changes in arms
            ),
            fine_run(found, "clip_fine", seed, ""),
            fine_run(found, "mlip_fine", seed, mlip, "model.merging={rate: 0.75}"),
        )
    ]


def confirmation_run(
    found: Found,
    name: str,
    seed: int,
    mlip: str,
    changes: Sequence[str] = (),
    *,
    train: str = "train_half",
    recipe: str = "clip",
    steps: int = CONFIRMATION_STEPS,
) -> AblationRun:
    """A run that is measured on test."""
    overrides = (*arm(found, mlip, steps=steps), CONFIRMATION_PRECISION, *changes)
    return AblationRun("C", name, seed, train, "test", overrides, recipe)


def fine_run(found: Found, name: str, seed: int, mlip: str, *merging: str) -> AblationRun:
    """One with 256 patches a picture."""
    return confirmation_run(found, name, seed, mlip, ("model.vision.patch_size=4", *merging), steps=FINE_STEPS)


# E: controls beside it


def control_runs(found: Found) -> list[AblationRun]:
    """MLIP on all pairs, two other ways to save fine patches, and CLIP of 64 patches for the CPU time of mlip_fine."""
    mlip = chosen_mlip(found)
    of_a_step = found.cpu_s("clip_half", CONTROL_SEEDS) / CONFIRMATION_STEPS
    steps = round(found.cpu_s("mlip_fine", CONTROL_SEEDS) / of_a_step)
    return [
        run
        for seed in CONTROL_SEEDS
        for run in (
            confirmation_run(found, "mlip_all", seed, mlip, train="train"),
            fine_run(found, "mlip_fine_tome", seed, mlip, "model.merging={rate: 0.75, method: tome}"),
            fine_run(found, "mlip_fine_drop", seed, mlip, "model.merging={rate: 0.75, method: random_drop}"),
            confirmation_run(found, "clip_equal_time", seed, "", steps=steps),
        )
    ]


@dataclass(frozen=True)
class Stage:
    """Trainings that can run at the same time, and what is decided after them."""

    letter: str
    runs: Callable[[Found], list[AblationRun]]
    decide: Callable[[Found], Decision] | None = None


STAGES = (
    Stage("P", plateau_runs),
    Stage("S", screening_runs, after_screening),
    Stage("H", halving_runs, after_halving),
    Stage("C", confirmation_runs),
    Stage("E", control_runs),
)


@dataclass(frozen=True)
class Comparison:
    """A contrast that the confirmation tests."""

    name: str
    first: str
    second: str
    margin: float = 0.0
    """0: better is asked for. Above 0: not worse than this."""
    most_cpu: float | None = None
    """Largest share of the second arm's CPU time that the first may take."""


CONTRASTS = (
    Comparison("MLIP - CLIP, equal data and steps", "mlip_half", "clip_half"),
    Comparison("MLIP on half of the pairs - CLIP on all", "mlip_half", "clip_all", MARGIN),
    Comparison("MLIP strong - CLIP strong", "mlip_strong", "clip_strong"),
    Comparison("MLIP at half the time - CLIP, 256 patches", "mlip_fine", "clip_fine", MARGIN, MOST_CPU),
)
"""All over the same seeds; Holm's correction counts all four."""
