"""A run as its files show it: no weights, no data, no torch."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from mlip_cli.evaluate.average_results import AverageResult
from mlip_cli.evaluate.before_after import BeforeAfter
from mlip_cli.evaluate.picture_results import GalleryResult, MergePicturesResult
from mlip_cli.evaluate.results import SweepResult, ZeroshotResult
from mlip_cli.evaluate.retrieval_results import RetrievalResult
from mlip_cli.files import read_object
from mlip_cli.profiling.result import ProfileResult
from mlip_cli.recipe.config import Recipe
from mlip_cli.recipe.load import load_recipe
from mlip_cli.runs.contents import DataCard, MetricsLine, Origin, Stamp, read_cards, read_metrics
from mlip_cli.runs.folder import CURES, ORIGIN, Run
from mlip_cli.runs.result_files import Result
from mlip_cli.terminal.output import warn

KINDS: dict[str, type[Result]] = {
    kind.KIND: kind
    for kind in (
        ZeroshotResult,
        RetrievalResult,
        GalleryResult,
        MergePicturesResult,
        SweepResult,
        ProfileResult,
        BeforeAfter,
        AverageResult,
    )
}
"""The results that RUN/evals/ may hold."""

MEASURED = "loss"
"""Only lines about training steps have this key."""

Kind = TypeVar("Kind", bound=Result)
Content = TypeVar("Content")


@dataclass(frozen=True)
class RunRecord:
    """The contents of a run's files."""

    run: Run
    name: str
    recipe: Recipe | None
    """None: it does not validate with this version."""
    recipe_text: str
    stamp: Stamp
    """Empty where there is none, and where it is damaged."""
    steps: list[MetricsLine]
    """Lines of metrics.jsonl about training."""
    evaluations: list[MetricsLine]
    """Lines of metrics.jsonl with measures taken during training."""
    results: Sequence[Result]
    """Of evals/, in the order of their steps and times."""
    cards: dict[str, DataCard]
    """Data card by the role of the data, such as `training`."""
    origin: Origin | None = None
    """Of weights that no training of this run made."""
    damaged: list[str] = field(default_factory=list)
    """A line about each file that could not be read."""

    @cached_property
    def last_step(self) -> int:
        """Last step that was logged; 0 before the first."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def last_loss(self) -> str | None:
        """The last logged loss, rounded; None before the first step."""
        if not self.steps:
            return None
        loss = self.steps[-1][MEASURED]
        return "not finite" if loss is None else f"{loss:.3f}"

    @property
    def place(self) -> str:
        """The run folder, quoted for a shell."""
        return shlex.quote(str(self.run.folder))

    @cached_property
    def attributions(self) -> list[str]:
        """The attributions that the licences of the data ask for."""
        found = (card.provenance.attribution for card in self.cards.values())
        return list(dict.fromkeys(text for text in found if text))

    def all_of(self, kind: type[Kind]) -> list[Kind]:
        """The results of a kind, in the order of their steps and times."""
        return [result for result in self.results if isinstance(result, kind)]

    def newest(self, kind: type[Kind]) -> Kind | None:
        """The result of a kind at the latest step."""
        found = self.all_of(kind)
        return found[-1] if found else None


def read_run(folder: Path, *, name: str | None = None) -> RunRecord:
    """Read a run folder. A damaged file is named in `damaged`; the rest is read all the same.

    Args:
        name: of the run on the page; None: the folder's name.
    """
    run = Run(folder)
    damaged: list[str] = []
    lines, damaged_lines = read_metrics(run.metrics)
    for number in damaged_lines:
        cure = CURES[run.metrics.name]
        damaged.append(f"{run.metrics}:{number}: not a line of metrics; left out of the report; {cure}")
    found = [_attempt(path, _read_result, damaged) for path in sorted(run.evals.glob("*.json"))]
    results = [result for result in found if result is not None]
    record = RunRecord(
        run=run,
        name=name or folder.resolve().name,
        recipe=_attempt(run.recipe, lambda path: load_recipe(str(path)).recipe, damaged),
        recipe_text=run.recipe.read_text("utf-8", errors="replace") if run.recipe.is_file() else "",
        stamp=_attempt(run.stamp, Stamp.read, damaged) or Stamp(),
        steps=[line for line in lines if MEASURED in line],
        evaluations=[line for line in lines if MEASURED not in line],
        results=sorted(results, key=lambda result: (result.step or 0, result.measured_at or "")),
        cards=_attempt(run.data_cards, read_cards, damaged) or {},
        origin=_attempt((run.latest_checkpoint() or run.checkpoints) / ORIGIN, Origin.read, damaged),
        damaged=damaged,
    )
    for line in damaged:
        warn(line)
    return record


def _attempt(path: Path, read: Callable[[Path], Content], damaged: list[str]) -> Content | None:
    """The content of a file; None for a missing file, and for a damaged one, which is noted."""
    if not path.is_file():
        return None
    try:
        return read(path)
    except ValueError as error:  # RecipeError too
        cure = CURES.get(path.name, "remove it, or measure again")
        damaged.append(f"{path}: cannot be read ({str(error).splitlines()[0]}); left out of the report; {cure}")
        return None


def _read_result(path: Path) -> Result:
    value = read_object(path)
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind: {kind!r} is not one of {', '.join(KINDS)}: another version wrote it")
    return KINDS[kind].from_json(value)
