"""Which runs the ablation is made of, in the order in which they are worth having."""

from collections.abc import Iterator
from dataclasses import dataclass

SEEDS = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class AblationRun:
    """One training and where it is measured."""

    stage: str
    name: str
    seed: int
    split: str
    recipe: str
    """File in recipes/ablation, without its ending."""
    overrides: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Name of its folder and of its result."""
        return f"{self.name}-{self.seed}"


def _choices() -> Iterator[AblationRun]:
    """A, B: one seed each, on validation, to choose learning rate, placement, token loss and strength."""
    for lr in ("2.5e-4", "5e-4", "1e-3"):
        yield AblationRun("A", f"clip_lr_{lr}", 0, "validation", "clip", (f"optim.lr={lr}",))
    for recipe in ("branch_tokens", "branch_dct", "stem", "sparc", "filip", "sparc_light"):
        yield AblationRun("B", recipe, 0, "validation", recipe)
    for recipe in ("mlip_half", "mlip_half_firm"):
        yield AblationRun("B", f"{recipe}_validation", 0, "validation", recipe)


def _verdicts() -> Iterator[AblationRun]:
    """C: equal steps. D: equal CPU time. E: what else is worth knowing. All on test."""
    for seed in SEEDS:
        for recipe in ("clip", "branch", "mlip", "mlip_half", "mlip_half_tome"):
            yield AblationRun("C", recipe, seed, "test", recipe)
    for seed in SEEDS:
        yield AblationRun("D", "mlip_half_time", seed, "test", "mlip_half_time")
        if seed < 3:
            yield AblationRun("D", "mlip_time", seed, "test", "mlip_time")
    for recipe in ("mlip_half_inverse", "mlip_half_drop", "mlip_third", "clip_strong", "mlip_strong"):
        for seed in SEEDS[:3]:
            yield AblationRun("E", recipe, seed, "test", recipe)


RUNS = (*_choices(), *_verdicts())
