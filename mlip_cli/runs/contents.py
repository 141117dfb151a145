"""What run.json, data.json and metrics.jsonl of a run hold, as values that are checked when they are read. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlip_cli.files import parse_object, read_object
from mlip_cli.runs.result_files import checked


@dataclass(frozen=True, kw_only=True)
class Session:
    """One `mlip pretrain` of a run, from its start to its end."""

    command: str | None = None
    started: str | None = None
    from_step: int | None = None
    device: str | None = None
    ranks: int | None = None
    threads: int | None = None
    cpu_s: float | None = None
    """CPU time of rank 0 and its loader processes; None: the session was killed, or an earlier version wrote it."""


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """run.json: when, where and with what a run was trained, and why it ended."""

    mlip_version: str | None = None
    commit: str | None = None
    versions: dict[str, str | None] = field(default_factory=dict)
    platform: str | None = None
    seed: int | None = None
    data: dict[str, str] = field(default_factory=dict)
    """Folder or URL of the training data -> fingerprint."""
    started: str | None = None
    ended: str | None = None
    end_reason: str | None = None
    """None: the run has not ended, or it was killed."""
    sessions: Sequence[Session] = ()

    @classmethod
    def read(cls, path: Path) -> "Stamp":
        """The stamp that a file holds.

        Raises:
            ValueError: it holds something else.
        """
        return checked(cls, read_object(path))


@dataclass(frozen=True, kw_only=True)
class PartOfAverage:
    """A run whose weights are in an average."""

    run: str
    step: int
    coefficient: float


@dataclass(frozen=True, kw_only=True)
class Origin:
    """origin.json of a checkpoint: where weights come from that no training of the run made."""

    kind: str
    """Such as `average`."""
    runs: Sequence[PartOfAverage] = ()
    """Of an average."""
    source: str | None = None
    """File of weights of another program."""
    named: str | None = None
    """As the user named it."""
    sha256: str | None = None
    """Of the contents of its files."""

    @classmethod
    def read(cls, path: Path) -> "Origin":
        """The origin that a file holds.

        Raises:
            ValueError: it holds something else.
        """
        return checked(cls, read_object(path))

    @property
    def words(self) -> str:
        """an average: 0.75 of base at step 320, 0.25 of tuned at step 60"""
        parts = ", ".join(f"{own.coefficient:.3g} of {own.run} at step {own.step:,}" for own in self.runs)
        if parts:
            return f"an average: {parts}"
        return f"those of {self.named}" if self.named else self.kind


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where prepared data comes from."""

    source: str | None = None
    tool: str | None = None
    holds: str | None = None
    """What the split holds, where the source says more than its name."""
    license: str | None = None
    attribution: str | None = None


SPREAD = {"min", "median", "mean", "max"}
"""Keys of a statistic. A class may be called median too."""


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """A statistic of the samples."""

    min: int | float
    median: int | float
    mean: int | float
    max: int | float


@dataclass(frozen=True, kw_only=True)
class DataCard:
    """A data set of the run, as data.json holds it."""

    folder: str
    fingerprint: str
    num_samples: int
    num_bytes: int | None = None
    provenance: Provenance = Provenance()
    spreads: dict[str, Statistic] = field(default_factory=dict)
    """Statistics by name."""
    classes: dict[str, int] = field(default_factory=dict)
    """Samples of the most frequent classes."""
    num_classes: int = 0

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "DataCard":
        """A card whose `statistics` are sorted into spreads and classes.

        Raises:
            ValueError: a key is missing or has a wrong value.
        """
        statistics = value.get("statistics", {})
        if not isinstance(statistics, dict):
            raise ValueError("statistics: not a JSON object")
        spreads = {name: own for name, own in statistics.items() if isinstance(own, dict) and own.keys() == SPREAD}
        classes = {key: statistics[key] for key in ("classes", "num_classes") if key in statistics}
        return checked(cls, {**value, "spreads": spreads, **classes})


def read_cards(path: Path) -> dict[str, DataCard]:
    """The cards of a run's data by role, such as `training`.

    Raises:
        ValueError: the file holds something else.
    """
    cards = {}
    for role, card in read_object(path).items():
        if not isinstance(card, dict):
            raise ValueError(f"{role}: not a JSON object")
        try:
            cards[role] = DataCard.from_json(card)
        except ValueError as error:
            raise ValueError(f"{role}.{error}") from None
    return cards


MetricsLine = Mapping[str, Any]
"""Numbers by name, `step` among them; None where a number was not finite."""


def metrics_line(text: str) -> MetricsLine:
    """One line of metrics.jsonl.

    Raises:
        ValueError: it is not one.
    """
    line = parse_object(text, constant=lambda name: None)
    if not isinstance(line.get("step"), int):
        raise ValueError("no step")
    if not all(isinstance(value, int | float | None) for value in line.values()):
        raise ValueError("not only numbers")
    return line


def read_metrics(path: Path) -> tuple[list[MetricsLine], list[int]]:
    """The lines of metrics.jsonl, and the numbers of those that are damaged; nothing where there is no file.

    A last line without its end is still being written and is left out.
    """
    lines: list[MetricsLine] = []
    damaged: list[int] = []
    if not path.is_file():
        return lines, damaged
    for number, text in enumerate(path.read_text("utf-8", errors="replace").splitlines(keepends=True), start=1):
        if not text.endswith("\n"):
            break
        try:
            lines.append(metrics_line(text))
        except ValueError:
            damaged.append(number)
    return lines, damaged
