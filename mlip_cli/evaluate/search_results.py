"""What a search found, for a table, a page or JSON. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from mlip_cli.runs.result_files import json_value


@dataclass(frozen=True, kw_only=True)
class Match:
    """A picture that was found."""

    rank: int
    """From 1."""
    cosine: float
    picture: str
    """Its file, its row in a table, or its key in shards."""
    caption: str | None
    was_trained_on: bool | None
    """Whether it is among the training pictures; None: not known."""


@dataclass(frozen=True, kw_only=True)
class Query:
    """A text or a picture that was searched for, and the nearest pictures."""

    text: str | None
    """None for a picture."""
    picture: str | None
    """Its file; None for a text."""
    cut_to: int | None
    """Tokens that the model reads of a text that is longer; None: it reads the whole."""
    found: Sequence[Match]

    @property
    def words(self) -> str:
        """The text, or the file of the picture."""
        return self.text if self.text is not None else str(self.picture)


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The answers to all queries of one call."""

    run: str
    step: int
    true_merge_rate: float
    precision: str
    """In which the model computed the vectors."""
    images: str
    """The collection, as the user named it."""
    num_pictures: int
    """Pictures that were searched."""
    num_encoded: int
    """Those among them that were encoded now; the others were encoded before."""
    passed_over: str | None
    """What was not searched, by reason, in words; None: nothing."""
    trained_on: str
    """What the marks of the training pictures rest on, or why there are none."""
    attribution: Sequence[str]
    queries: Sequence[Query]

    def to_json(self) -> dict[str, object]:
        """For --json."""
        value: dict[str, object] = json_value(self)
        return value


@dataclass(frozen=True)
class Thumbnails:
    """Small pictures for a page, as WebP."""

    asked: Sequence[bytes | None]
    """One for each query; None for a text."""
    found: Sequence[Sequence[bytes | None]]
    """One for each match of each query; None: it could not be decoded."""
