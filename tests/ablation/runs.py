"""What a training of the ablation is, which factors change its recipe, and what the rules of stages.py read of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median

ON = {
    "A": ("model.frequency={placement: stem, depth: 2}", "losses.frequency_global={weight: 0.5}"),
    "B": ("losses.spatial_words={weight: 0.5}",),
    "C": ("model.vision.pool=mean",),
    "D": ("data.captions_per_image=3",),
    "E": ("losses.positives=concept",),
    "F": ("losses.spatial_token={kind: pooled, weight: 0.5}",),
    "G": ("optim.lr=1e-3",),
}
"""A: spectral blocks begin the tower, with a loss of their own. B: softmax over the caption's words. C: the feature is
the mean of the tokens. D: captions of a picture in a step. E: pictures of one concept are right for each other. F: a
token loss between all pairs of the batch. G: the larger learning rate."""

OFF = {"G": ("optim.lr=5e-4",)}
WORDS_OF_STEM = "losses.frequency_words={weight: 0.25}"
"""B on the tokens of the stem, where A is on too."""


@dataclass(frozen=True)
class AblationRun:
    """One training and where it is measured."""

    stage: str
    name: str
    seed: int
    train: str
    """Folder of the data: train, or train_half with half of its pairs."""
    split: str
    overrides: tuple[str, ...] = ()
    recipe: str = "clip"
    """File in recipes/ablation, without its ending."""
    checkpoints: tuple[int, ...] = ()
    """Steps to measure; training stops after the last of them. Empty: training ends, and its last step is measured."""

    @property
    def label(self) -> str:
        """Name of its folder."""
        return f"{self.name}-{self.seed}"

    @property
    def results(self) -> tuple[str, ...]:
        """Names of its results."""
        return tuple(f"{self.label}@{step}" for step in self.checkpoints) or (self.label,)


@dataclass(frozen=True)
class Measured:
    """What the rules read of a result."""

    lr: float
    """Mean of the three questions, of the spatial feature."""
    cpu_s: float | None


class Missing(Exception):
    """A stage asks for a result that an earlier one has not made yet."""


@dataclass(frozen=True)
class Found:
    """The results that there are, by name."""

    results: Mapping[str, Measured]

    def __getitem__(self, name: str) -> Measured:
        if name not in self.results:
            raise Missing(f"no result of {name} yet")
        return self.results[name]

    def lr(self, name: str, seeds: Sequence[int]) -> float:
        """Mean over seeds."""
        return mean(self[f"{name}-{seed}"].lr for seed in seeds)

    def cpu_s(self, name: str, seeds: Sequence[int]) -> float:
        """Median over the seeds whose time is known."""
        known = [time for seed in seeds if (time := self[f"{name}-{seed}"].cpu_s) is not None]
        if not known:
            raise Missing(f"no CPU time of {name}: each of its trainings was killed once")
        return median(known)


def overrides_of(high: str) -> tuple[str, ...]:
    """Changes to clip.yaml for the factors in `high`, such as "AC"; all others are low."""
    changes = [change for factor, on in ON.items() for change in (on if factor in high else OFF.get(factor, ()))]
    return (*changes, *([WORDS_OF_STEM] if {"A", "B"} <= set(high) else []))


def cell_name(stage: str, high: str) -> str:
    """Such as screening_ACG; screening_none has all factors low."""
    return f"{stage}_{high or 'none'}"
