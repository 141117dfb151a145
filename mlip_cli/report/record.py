"""All that a run folder says of itself, read from its files alone: no weights, no data, no torch."""

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mlip_cli.recipe.config import Recipe
from mlip_cli.recipe.load import load_recipe
from mlip_cli.runs.folder import Run
from mlip_cli.terminal.output import warn

Result = dict[str, Any]

SHOWN = {
    "zeroshot": "dataset data_fingerprint step merge_rate true_merge_rate n num_classes chance per_class right "
    "images_per_s mean_per_class_recall mean_per_class_recall_interval acc1 acc1_interval",
    "gallery": "step true_merge_rate num_images num_texts chosen scores text_to_image image_to_text",
    "merge_pictures": "step dataset chosen map_colors points",
    "merge_sweep": "step points datasets batch_size rounds device device_name threads torch",
    "profile": "step breakdown unaccounted limit clocks_cost step_s speed parameters gflops mfu peak_memory torch",
}
"""Kinds of results in evals/, and the keys that a page shows of each: a file of another version may lack some."""

MEASURED = "loss"
"""Key that the lines of training steps have and the lines of evaluations have not."""


@dataclass(frozen=True)
class RunRecord:
    """A run as its files show it."""

    run: Run
    name: str
    recipe: Recipe | None
    """None when it does not validate with this version."""
    recipe_text: str
    stamp: Result
    steps: list[Result]
    """Lines of metrics.jsonl about training."""
    evaluations: list[Result]
    """Lines of metrics.jsonl with measures taken during training."""
    results: dict[str, list[Result]]
    """evals/*.json by kind, in the order of their steps."""
    cards: dict[str, Result]
    """Data card by the role of the data, such as `training`."""
    damaged: list[str] = field(default_factory=list)
    """What could not be read, as lines for people."""

    @cached_property
    def last_step(self) -> int:
        """Last step that was logged; 0 before the first."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def last_loss(self) -> str | None:
        """As people read it; None before the first step."""
        if not self.steps:
            return None
        loss = self.steps[-1][MEASURED]
        return "not finite" if loss is None else f"{loss:.3f}"

    @property
    def place(self) -> str:
        """The run folder as a shell wants it."""
        return shlex.quote(str(self.run.folder))

    @cached_property
    def attributions(self) -> list[str]:
        """What the licences of the data ask to be said."""
        found = [card.get("provenance", {}).get("attribution") for card in self.cards.values()]
        return list(dict.fromkeys(text for text in found if text))

    def newest(self, kind: str) -> Result | None:
        """The result of a kind at the latest step."""
        return self.results[kind][-1] if self.results.get(kind) else None


def read_run(folder: Path, *, name: str | None = None) -> RunRecord:
    """Read a run folder. What is damaged is named in `damaged`, and the rest is read all the same.

    Args:
        name: what the page calls it; None for the folder's name.
    """
    run = Run(folder)
    damaged: list[str] = []
    lines = _read_metrics(run.metrics, damaged)
    results: dict[str, list[Result]] = {}
    for path in sorted(run.evals.glob("*.json")):
        result = _attempt(path, _read_result, damaged)
        if result is not None:
            results.setdefault(result["kind"], []).append(result)
    for found in results.values():
        found.sort(key=lambda result: (result.get("step", 0), result.get("measured_at", "")))
    record = RunRecord(
        run=run,
        name=name or folder.resolve().name,
        recipe=_attempt(run.recipe, _read_recipe, damaged),
        recipe_text=run.recipe.read_text("utf-8", errors="replace") if run.recipe.is_file() else "",
        stamp=_attempt(run.stamp, _read_object, damaged) or {},
        steps=[line for line in lines if MEASURED in line],
        evaluations=[line for line in lines if MEASURED not in line],
        results=results,
        cards=_attempt(run.data_cards, _read_object, damaged) or {},
        damaged=damaged,
    )
    for line in damaged:
        warn(line)
    return record


def _attempt(path: Path, read: Callable[[Path], Any], damaged: list[str]) -> Any:
    """What `read` makes of a file; None for a missing file, and for a damaged one, which is noted."""
    if not path.is_file():
        return None
    try:
        return read(path)
    except ValueError as error:  # RecipeError too
        cure = "; remove it, or measure again" if path.parent.name == "evals" else ""
        damaged.append(f"{path}: cannot be read ({str(error).splitlines()[0]}); left out of the report{cure}")
        return None


def _read_object(path: Path) -> Result:
    value = json.loads(path.read_text("utf-8"))
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


def _read_result(path: Path) -> Result:
    result = _read_object(path)
    kind = result.get("kind")
    if kind not in SHOWN:
        raise ValueError(f"its kind is none of {', '.join(SHOWN)}: another version wrote it")
    missing = [key for key in SHOWN[kind].split() if key not in result]
    if missing:
        raise ValueError(f"no {missing[0]} in it: another version wrote it")
    return result


def _read_recipe(path: Path) -> Recipe:
    return load_recipe(str(path)).recipe


def _read_metrics(path: Path, damaged: list[str]) -> list[Result]:
    """Whole lines; a last one without its end is still being written."""
    if not path.is_file():
        return []
    lines: list[Result] = []
    for number, text in enumerate(path.read_text("utf-8", errors="replace").splitlines(keepends=True), start=1):
        if not text.endswith("\n"):
            break
        try:
            line = json.loads(text)
            lines.append({**line, "step": int(line["step"])})
        except (ValueError, KeyError, TypeError):
            damaged.append(f"{path}:{number}: not a line of metrics; left out of the report")
    return lines
