"""What `mlip eval-zeroshot` can measure: how, what a stored result must hold, and how results are shown."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlip_cli.commands.pointing_tables import compared_pointing, print_pointing
from mlip_cli.evaluate.datasets.find import Benchmark
from mlip_cli.report.tables import compared, print_results

if TYPE_CHECKING:
    from mlip_cli.runs.loading import LoadedRun, MergedEncoder


Results = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """A measure."""

    kind: str
    """Of its results."""
    prefix: str
    """Of their files' names."""
    identity: dict[str, Any]
    """Its part of what the numbers depend on. `protocol` is raised when the same data and weights would give other
    numbers; results of other protocols are measured again."""
    needed: frozenset[str]
    """Keys of a stored result that the tables and the run's page read."""
    measure: Callable[..., list[list[dict[str, Any]]]]
    """(benchmark, [(run, its encoders)], batch_size=) -> scores of each encoder of each run; imports torch."""
    compared: Callable[[Results], list[dict[str, Any]]]
    """Results on one data set, each but the first with its paired comparison to the first."""
    print_results: Callable[..., None]
    """(results by data set, failed=names of data sets)"""


def _classify(
    benchmark: Benchmark, runs: "Sequence[tuple[LoadedRun, Sequence[MergedEncoder]]]", *, batch_size: int
) -> list[list[dict[str, Any]]]:
    from mlip_cli.evaluate.evaluators import measure_runs

    return measure_runs(benchmark, runs, batch_size=batch_size)


def _point(
    benchmark: Benchmark, runs: "Sequence[tuple[LoadedRun, Sequence[MergedEncoder]]]", *, batch_size: int
) -> list[list[dict[str, Any]]]:
    from mlip_cli.commands.pointing import point_runs

    return point_runs(benchmark, runs, batch_size=batch_size)


_ALWAYS = {"kind", "step", "true_merge_rate", "measured_at", "n", "chance", "right"}

TASKS = {
    "classification": Task(
        kind="zeroshot",
        prefix="",
        identity={"protocol": 1},
        needed=frozenset(
            _ALWAYS
            | {"num_classes", "per_class", "acc1", "acc1_interval", "acc5", "images_per_s"}
            | {"mean_per_class_recall", "mean_per_class_recall_interval"}
        ),
        measure=_classify,
        compared=compared,
        print_results=print_results,
    ),
    "pointing": Task(
        kind="pointing",
        prefix="pointing-",
        identity={"kind": "pointing", "protocol": 1},
        needed=frozenset(_ALWAYS | {"num_names", "num_mosaics", "pointing", "mosaic"}),
        measure=_point,
        compared=compared_pointing,
        print_results=print_pointing,
    ),
}
