"""What evaluations are asked for, checked before torch is loaded: methods, merge rates, data sets."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Protocol

from mlip_cli.errors import RunError, UsageError
from mlip_cli.evaluate.datasets.benchmark import Benchmark
from mlip_cli.evaluate.datasets.find import find_benchmark
from mlip_cli.recipe.config import Recipe
from mlip_cli.recipe.merge_plan import METHODS, plan_of_recipe
from mlip_cli.terminal.output import say

VALIDATION = "validation"
"""Name of the run's own validation set."""

SWEPT_METHODS = tuple(method for method in METHODS if method != "random_drop")
"""Methods that merge. `random_drop` is for training only; a run that trained with it is swept as guided."""

FAILURES = (UsageError, RunError, OSError)
"""Errors of one data set that let the others be measured."""

Failures = dict[str, Exception]
"""Errors by the name of their data set."""


class Find(Protocol):
    """Finds a data set by its name under a data root, or raises one of FAILURES."""

    def __call__(self, name: str, *, root: Path | None) -> Benchmark: ...


@dataclass(frozen=True)
class WantedData:
    """Data sets by name, in the order in which they were asked for, and the errors of those that are not there."""

    found: dict[str, Benchmark | None]
    """None: the run's own validation set, which is looked at when it is opened."""
    failures: Failures


def check_methods(methods: Sequence[str]) -> None:
    """Refuse a method that does not merge.

    Raises:
        UsageError: there is one.
    """
    for method in methods:
        if method not in SWEPT_METHODS:
            raise UsageError(f"--methods {method}: not a method to sweep; use {' or '.join(SWEPT_METHODS)}")


def check_rates(recipe: Recipe, rates: Sequence[float], methods: Sequence[str] = ()) -> None:
    """Check that the image tower reaches the rates; of a tower that timm names, only torch knows the depth.

    Raises:
        UsageError: no plan reaches a rate.
    """
    swept: Sequence[str | None] = methods or [None]
    for method, rate in product(swept, rates):
        plan_of_recipe(recipe, rate, method)


def wanted_names(recipe: Recipe, names: Sequence[str]) -> list[str]:
    """The named data sets, else those of the recipe, else its validation set."""
    own = [VALIDATION] if recipe.data.validation is not None else []
    return list(names) or list(recipe.evaluate.zeroshot) or own


def find_wanted(
    names: Sequence[str], *, root: Path | None, own: str | None = None, find: Find = find_benchmark
) -> WantedData:
    """Find data sets by name. Data that is named twice, also in two spellings, is found once.

    Args:
        own: the name that means the run's validation set; None: no name does.
        find: finds one.
    """
    wanted = WantedData({}, {})
    names_of: dict[tuple[str, Path], str] = {}
    for name in dict.fromkeys(names):
        try:
            benchmark = None if name == own else find(name, root=root)
        except FAILURES as error:
            wanted.failures[name] = error
            continue
        if benchmark is not None:
            first = names_of.setdefault((benchmark.kind, benchmark.root.resolve()), name)
            if first != name:
                say(f"{name}: this is the same data as {first}, which is measured once")
                continue
        wanted.found[name] = benchmark
    return wanted
