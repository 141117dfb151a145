"""Which pictures a question asks about: a hidden style, names of known words, tags.

A sample is a row of the source: `name`, `tags`, `concept`, `source`.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Sample = Mapping[str, Any]

QUESTIONS = ("style", "names", "tags")
"""style: pictures of the hidden style, of concepts that training shows in others. names: held concepts whose name
training never saw, and every token of it it did. tags: held concepts against the tags that training saw often."""

HIDDEN_STYLE = "fluent"
VALIDATION_SHARE = 0.1
LEAST_PICTURES_OF_A_TOKEN = 5
LEAST_PICTURES_OF_A_TAG = 10


def draw(text: str) -> float:
    """A number in [0, 1) that is the same for the same text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def split_of(concept: str, source: str, *, is_test: bool) -> str:
    """train, validation, test, or none: a concept is held or trained, and the hidden style is never trained.

    The style's pictures of trained concepts are halved between validation and test, by concept. Those of held concepts
    are in no split: a question hides one thing.
    """
    held = "test" if is_test else "validation" if draw(concept) < VALIDATION_SHARE else ""
    if source == HIDDEN_STYLE:
        return "none" if held else "validation" if draw(f"style {concept}") < 0.5 else "test"
    return held or "train"


@dataclass(frozen=True)
class Training:
    """What the training pictures show."""

    concepts: Collection[str]
    names: Collection[str]
    tokens: Collection[int]
    """Those of at least `LEAST_PICTURES_OF_A_TOKEN` pictures."""
    tags: Collection[str]
    """Those of at least `LEAST_PICTURES_OF_A_TAG` pictures."""


def training_of(samples: Sequence[Sample], tokens_of: Callable[[str], Iterable[int]]) -> Training:
    """What these training samples show; a picture shows the tokens of its name and of all its tags."""
    tokens = Counter(token for one in samples for token in set(tokens_of(", ".join([one["name"], *one["tags"]]))))
    tags = Counter(tag for one in samples for tag in set(one["tags"]))
    return Training(
        concepts={one["concept"] for one in samples},
        names={one["name"] for one in samples},
        tokens={token for token, n in tokens.items() if n >= LEAST_PICTURES_OF_A_TOKEN},
        tags={tag for tag, n in tags.items() if n >= LEAST_PICTURES_OF_A_TAG},
    )


def questions_of(sample: Sample, training: Training, tokens_of: Callable[[str], Iterable[int]]) -> list[str]:
    """The questions that a picture of validation or test belongs to; perhaps none.

    A picture of a held concept without a frequent tag is in `tags` too: it is a wrong answer to every tag.
    """
    if sample["source"] == HIDDEN_STYLE:
        return ["style"] if sample["concept"] in training.concepts else []
    is_new = sample["name"] not in training.names
    knows_tokens = all(token in training.tokens for token in tokens_of(sample["name"]))
    return (["names"] if is_new and knows_tokens else []) + ["tags"]
