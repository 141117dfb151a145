"""What a training changed: the answers to single questions before its first step, and at its last evaluation. No torch.

RUN/evals/before_after.json holds them, so that a paired test on the same questions can be made at any time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from mlip_cli.evaluate.results import PairedTest
from mlip_cli.evaluate.statistics import (
    SIGNIFICANT,
    Interval,
    by_cluster,
    cluster_interval,
    paired,
    paired_interval,
    wilson,
)
from mlip_cli.runs.folder import Run, now
from mlip_cli.runs.result_files import Result, json_value
from mlip_cli.terminal.output import warn

MEASURES = {
    "acc1": "top-1",
    "picture_r1": "text to image R@1",
    "image_to_text_r5": "image to text R@5",
    "text_to_image_r5": "text to image R@5",
}
"""Measures whose answers are kept -> in words."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Which questions of a data set a model answers rightly."""

    dataset: str
    fingerprint: str
    measure: str
    """A key of MEASURES."""
    right: str
    """A character (0 or 1) a question."""
    cluster_of: Sequence[int] | None = None
    """Cluster of each question; None: they are independent."""


@dataclass(frozen=True, kw_only=True)
class QuestionSet:
    """The questions of a data set, answered before the training and after it."""

    dataset: str
    fingerprint: str
    measure: str
    before: str
    after: str | None = None
    """None: not evaluated since."""
    cluster_of: Sequence[int] | None = None

    @property
    def questions(self) -> tuple[str, str, str, int]:
        """Equal where the questions are."""
        return self.dataset, self.fingerprint, self.measure, len(self.before)


@dataclass(frozen=True, kw_only=True)
class BeforeAfter(Result):
    """The answers before the first step, and those of the last evaluation, of step `step`."""

    KIND: ClassVar[str] = "before_after"

    asked: Sequence[QuestionSet]

    @property
    def changes(self) -> list["Change"]:
        """The change of each measure; none before a second evaluation."""
        return [change_of(own) for own in self.asked if own.after is not None]

    def changes_as_json(self) -> dict[str, Any]:
        """For --json: the steps that are compared, and the changes."""
        return {"from_step": 0, "to_step": self.step, "changes": [change.to_json() for change in self.changes]}


@dataclass(frozen=True, kw_only=True)
class Change:
    """A measure before and after, as fractions with 95 % intervals."""

    dataset: str
    measure: str
    n: int
    """Questions."""
    before: float
    before_interval: Interval
    after: float
    after_interval: Interval
    test: PairedTest
    """After against before."""
    interval: Interval
    """Of the difference."""

    @property
    def words(self) -> str:
        """digits top-1"""
        return f"{self.dataset} {MEASURES[self.measure]}"

    @property
    def is_shown(self) -> bool:
        """Whether the interval of the difference leaves 0 out, and the paired test agrees."""
        low, high = self.interval
        return not low <= 0 <= high and self.test.p < SIGNIFICANT

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        return {**json_value(self), "is_shown": self.is_shown}


def change_of(asked: QuestionSet) -> Change:
    """Shares, their paired difference, and intervals. Questions of a cluster are drawn together."""
    assert asked.after is not None
    test = PairedTest(**paired(asked.before, asked.after, asked.cluster_of))
    n = len(asked.before)
    return Change(
        dataset=asked.dataset,
        measure=asked.measure,
        n=n,
        before=asked.before.count("1") / n,
        before_interval=_interval(asked.before, asked.cluster_of),
        after=asked.after.count("1") / n,
        after_interval=_interval(asked.after, asked.cluster_of),
        test=test,
        interval=paired_interval(asked.before, asked.after, asked.cluster_of),
    )


def _interval(right: str, cluster_of: Sequence[int] | None) -> Interval:
    """The interval of a share, as the evaluations have it."""
    if cluster_of is None:
        return wilson(right.count("1"), len(right))
    return cluster_interval(*by_cluster([int(answer) for answer in right], cluster_of))


def place_of(run: Run) -> Path:
    """The file of a run."""
    return run.evals / "before_after.json"


def read_changes(run: Run) -> BeforeAfter | None:
    """What a run keeps; None: nothing, or a damaged file, which is named."""
    path = place_of(run)
    if not path.is_file():
        return None
    try:
        return BeforeAfter.read(path)
    except ValueError as error:
        warn(f"{path}: damaged ({error}); what the training changed cannot be said; remove it")
        return None


def keep_answers(run: Run, step: int, answers: Sequence[Answers]) -> None:
    """Write the answers of an evaluation into a run: those of step 0 anew, later ones beside them.

    Questions that step 0 was not asked are left out.
    """
    if step == 0:
        asked = [
            QuestionSet(
                dataset=own.dataset,
                fingerprint=own.fingerprint,
                measure=own.measure,
                before=own.right,
                cluster_of=own.cluster_of,
            )
            for own in answers
        ]
        BeforeAfter(step=0, measured_at=now(), asked=asked).write(place_of(run))
        return
    first = read_changes(run)
    if first is None:
        return
    newest = {(own.dataset, own.fingerprint, own.measure, len(own.right)): own.right for own in answers}
    asked = [replace(own, after=newest.get(own.questions)) for own in first.asked]
    replace(first, step=step, measured_at=now(), asked=asked).write(place_of(run))
