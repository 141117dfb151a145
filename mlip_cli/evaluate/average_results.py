"""Averages of weights as RUN/evals/ has them: what each of them answers rightly. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from mlip_cli.evaluate.before_after import MEASURES, Change, QuestionSet, change_of
from mlip_cli.runs.result_files import Result

Coefficients = tuple[float, ...]
"""One a run; their sum is 1."""


@dataclass(frozen=True, kw_only=True)
class Ingredient:
    """A run that is averaged."""

    run: str
    """Its name."""
    folder: str
    checkpoint: str
    step: int
    sha256: str
    """Of its weights."""

    @property
    def words(self) -> str:
        """base at step 320"""
        return f"{self.run} at step {self.step:,}"


@dataclass(frozen=True, kw_only=True)
class AnsweredPoint:
    """One average on a data set."""

    coefficients: Coefficients
    right: str
    """A character (0 or 1) a question."""


@dataclass(frozen=True, kw_only=True)
class AveragedData:
    """A measure of a data set, of every average."""

    dataset: str
    fingerprint: str
    measure: str
    """A key of `before_after.MEASURES`."""
    chance: float
    points: Sequence[AnsweredPoint]
    cluster_of: Sequence[int] | None = None
    """Cluster of each question; None: they are independent."""

    @property
    def words(self) -> str:
        """digits top-1"""
        return f"{self.dataset} {MEASURES[self.measure]}"

    @property
    def n(self) -> int:
        """Questions."""
        return len(self.points[0].right)

    def beside(self, point: Coefficients, other: Coefficients) -> Change:
        """The average `point` after the average `other`."""
        right = {own.coefficients: own.right for own in self.points}
        return change_of(
            QuestionSet(
                dataset=self.dataset,
                fingerprint=self.fingerprint,
                measure=self.measure,
                before=right[other],
                after=right[point],
                cluster_of=self.cluster_of,
            )
        )

    def has(self, wanted: Sequence[Coefficients]) -> bool:
        """Whether all these averages are measured."""
        return {own.coefficients for own in self.points} >= set(wanted)

    def of(self, wanted: Sequence[Coefficients]) -> "AveragedData":
        """These averages alone, in this order."""
        points = {own.coefficients: own for own in self.points}
        return replace(self, points=[points[coefficients] for coefficients in wanted])


@dataclass(frozen=True, kw_only=True)
class AverageResult(Result):
    """Averages of some runs on some data sets; `step` is that of the last run."""

    KIND: ClassVar[str] = "average"

    ingredients: Sequence[Ingredient]
    batch_size: int
    device: str
    """As asked for."""
    device_type: str = "cuda"
    """Earlier versions did not write it: on no other device would their precision be another one today."""
    precision: str = "fp32"
    """As in EvaluatedResult."""
    datasets: Sequence[AveragedData]

    @property
    def is_path(self) -> bool:
        """Whether it is the way from one run to another, and not a soup of several."""
        return len(self.ingredients) == 2

    @property
    def ends(self) -> list[Coefficients]:
        """The coefficients of each run alone."""
        return alone(len(self.ingredients))

    def name_of(self, point: Coefficients) -> str:
        """The weight of the second run; of a soup, the run's name, or `soup`."""
        if self.is_path:
            return f"{point[1]:g}"
        return self.ingredients[point.index(1.0)].run if 1.0 in point else "soup"

    def with_data(self, found: Sequence[AveragedData]) -> "AverageResult":
        """The same with more points, and with more data sets."""
        own = {(data.dataset, data.fingerprint, data.measure): data for data in self.datasets}
        for data in found:
            key = (data.dataset, data.fingerprint, data.measure)
            known = own[key].points if key in own else ()
            points = {point.coefficients: point for point in (*known, *data.points)}
            own[key] = replace(data, points=sorted(points.values(), key=lambda point: point.coefficients[::-1]))
        return replace(self, datasets=list(own.values()))

    def of_data(self, dataset: str, fingerprint: str) -> list[AveragedData]:
        """Its measures of a data set."""
        return [own for own in self.datasets if (own.dataset, own.fingerprint) == (dataset, fingerprint)]


def path_point(weight: float) -> Coefficients:
    """The average with this weight of the second run."""
    return (round(1 - weight, 10), weight)


def soup(num_runs: int) -> Coefficients:
    """The uniform average."""
    return (1 / num_runs,) * num_runs


def alone(num_runs: int) -> list[Coefficients]:
    """Each run by itself."""
    return [tuple(float(own == number) for own in range(num_runs)) for number in range(num_runs)]


def best_point(measured: Sequence[AveragedData], points: Sequence[Coefficients]) -> Coefficients:
    """The point with the most right answers, by the mean of the measures; of equal ones the nearest to the start."""
    shares = {
        point: sum(data.of([point]).points[0].right.count("1") / data.n for data in measured) / len(measured)
        for point in points
    }
    return max(sorted(points, key=lambda point: point[1]), key=lambda point: shares[point])
