"""The settings of a merge sweep: one model held at several rates and methods."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlip_cli import merge_plan
from mlip_cli.commands.loading import LoadedRun, MergedEncoder, at_rate
from mlip_cli.errors import UsageError

METHODS = tuple(method for method in merge_plan.METHODS if method != "random_drop")
"""Those that merge. `random_drop` is for training: a run that trained by it is swept as guided."""


@dataclass(frozen=True)
class Point:
    """One setting of the sweep."""

    method: str | None
    """None for the unmerged model."""
    rate: float
    """As asked for; the plan's is the true one."""
    encoder: MergedEncoder

    @property
    def setting(self) -> dict[str, Any]:
        """What names the point in results."""
        return {"method": self.method, "rate": self.rate, "true_rate": self.encoder.plan.rate}


def check_methods(methods: Sequence[str]) -> None:
    """Refuse a method that does not exist."""
    for method in methods:
        if method not in METHODS:
            near = difflib.get_close_matches(method, METHODS, n=1)
            cure = f"did you mean {near[0]}?" if near else f"there are {', '.join(METHODS)}"
            fault = "drops patches in training only" if method == "random_drop" else "no such method"
            raise UsageError(f"--methods {method}: {fault}; {cure}")


def sweep_points(loaded: LoadedRun, rates: Sequence[float], methods: Sequence[str]) -> list[Point]:
    """Rate 0 once, then each method at each other rate, ascending; no method named: `merge_plan`'s choice.

    Raises:
        UsageError: no plan reaches a rate.
    """
    model = loaded.model
    wanted = sorted({rate for rate in rates if rate > 0})
    return [
        Point(None, 0.0, at_rate(model, 0.0)),
        *(
            Point(method, rate, at_rate(model, rate, method))
            for method in dict.fromkeys(methods or [model.merge_plan(0.0).method])
            for rate in wanted
        ),
    ]
