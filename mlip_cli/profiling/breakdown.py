"""Clocked steps and the loader's seconds -> the parts of a typical step, and the one that training waits for."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from mlip_cli.profiling.loader import batch_seconds
from mlip_cli.profiling.result import Limit, LoaderFacts, StepPart, Unaccounted
from mlip_cli.profiling.step import ClockedSeconds


@dataclass(frozen=True)
class Breakdown:
    """A typical step by parts; with what is unaccounted they add up to the whole exactly."""

    whole_s: float
    """Of the step with the clock, and of loading if the step waits for that."""
    parts: tuple[StepPart, ...]
    unaccounted: Unaccounted


def break_down(
    steps: Sequence[ClockedSeconds],
    groups: Mapping[str, str],
    *,
    loader: LoaderFacts | None,
    batch_size: int,
) -> Breakdown:
    """Seconds of each part, its share of the whole step, and what no part accounts for.

    The whole is the median over steps; a part is its median share of a step, times the whole. So what slows a step as a
    whole (a busy machine) moves no part against the others. `unaccounted` holds what is outside of all parts (the calls
    between them, freeing what the step held: `outside_s`, by its median share too) and the difference between medians,
    for which it can be negative.

    Args:
        groups: the parts of the step, in order, and the group of each.
        loader: what a sample costs; None without data. Loader processes make the batches while the step runs, so their
            parts add nothing to it; the shares say how much of the step's time these processes are busy.
        batch_size: samples of the step.
    """
    loader_s = {} if loader is None else batch_seconds(loader, batch_size)
    is_loaded_inside = loader is not None and loader.loader_processes == 0
    compute_s = median(step.whole_s for step in steps)
    whole_s = compute_s + (sum(loader_s.values()) if is_loaded_inside else 0.0)

    def typical(seconds: Iterable[float]) -> float:
        """Median share of a step, in seconds of the median step; `seconds` has one value a step."""
        return compute_s * median(value / step.whole_s for value, step in zip(seconds, steps, strict=True))

    def row(part: str, group: str, seconds: float, in_step: bool) -> StepPart:
        return StepPart(part=part, group=group, seconds=seconds, share=seconds / whole_s, in_step=in_step)

    rows = [row(part, "data", seconds, is_loaded_inside) for part, seconds in loader_s.items()]
    rows += [row(part, group, typical(s.parts.get(part, 0.0) for s in steps), True) for part, group in groups.items()]
    left_s = whole_s - sum(line.seconds for line in rows if line.in_step)
    outside_s = typical(step.whole_s - sum(step.parts.values()) for step in steps)
    return Breakdown(whole_s, tuple(rows), Unaccounted(seconds=left_s, share=left_s / whole_s, outside_s=outside_s))


def limit(parts: Sequence[StepPart], loader: LoaderFacts | None, *, step_per_s: float) -> Limit:
    """What training waits for, and why: data, or the largest part of the computation.

    Without loader processes the step waits for every batch, so the slower of both is the limit.

    Args:
        step_per_s: images a second of the step without clocks and without data.
    """
    largest = max((line for line in parts if line.group != "data"), key=lambda line: line.seconds)
    takes = f"{largest.share:.0%} of the step"
    if loader is None:
        return Limit(part=largest.part, why=f"{takes}; there is no data to compare with")
    most = max(loader.sample_seconds, key=lambda part: loader.sample_seconds[part])
    share = loader.sample_seconds[most] / sum(loader.sample_seconds.values())
    count = loader.loader_processes
    who = {0: "the training process itself", 1: "1 loader process"}.get(count, f"{count} loader processes")
    who += f" of one of {loader.ranks} ranks" if loader.ranks > 1 else ""
    verb, whose = ("makes", "its") if count < 2 else ("make", "their")
    speeds = f"{who} {verb} {loader.loader_images_per_s:,.0f} images/s, the step takes {step_per_s:,.0f}"
    if loader.loader_images_per_s < step_per_s:
        return Limit(part="data", why=f"{speeds}; {most} is {share:.0%} of {whose} time")
    return Limit(part=largest.part, why=f"{takes}; {speeds}")
