"""Captions as the cells of tables and the texts of samples hold them, and captions that hardly anyone wants."""

import ast
import io
import json
import math
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mlip_cli.data.sources.records import Caption
from mlip_cli.paths import escaped

MOST_LOOKED_AT = 20_000
"""Captions that are looked at: the first ones tell what all look like."""
MANY = 0.5
"""A warning is given if more than this share of the captions is of one odd kind,"""
SOME = 0.05
"""or if more than this share is words for a missing value."""
FEWEST = 3
"""No warning is given of fewer captions."""
LOOKED_AT = 300
"""Characters of a caption that tell its looks."""
LONGEST_LIST = 1 << 20
"""Characters of a cell in which a list is looked for."""
MOST_CHARACTERS = 60
"""Characters of a caption in a message."""

TEXT_KEYS = ("text", "caption", "raw", "sentence")
"""Where the objects of a list hold their text."""
ASKED, ANSWERED = ("from", "role"), ("value", "content")
ANSWERING = ("gpt", "assistant", "model")

ODD = {
    "lists": re.compile(r"\[.*\]$|[\[(]\s*['\"]|\{.*\}$", re.DOTALL),
    "paths or addresses": re.compile(
        r"\w+://\S+$|\S*[/\\]\S*\.\w{2,5}$|[^\s.]+\.(jpe?g|png|webp|gif|txt)$", re.IGNORECASE
    ),
    "numbers": re.compile(r"[-+]?[0-9][0-9., ]*$"),
    "ids": re.compile(r"(?=\S*[0-9])[\w-]{12,}$|[a-zA-Z]{0,4}[_-]?[0-9]{3,}$"),
    "bytes as Python shows them": re.compile(r"b'.*'$|b\".*\"$", re.DOTALL),
    "HTML": re.compile(
        r".*(</?(p|b|i|a|br|div|span|img|h[1-6]|li|ul|em|strong|html)\b[^>]{0,99}>|&(amp|lt|gt|quot|nbsp|#[0-9]+);)",
        re.DOTALL | re.IGNORECASE,
    ),
}
MISSING = frozenset(("nan", "none", "null", "n/a", "na", "#n/a", "<na>", "undefined", "nil"))


def captions_of(value: Any) -> tuple[Caption, ...]:
    """The captions of a cell or of a key of KEY.json: a text, a list, a list written as a text, or a conversation.

    The items of a list are texts or objects such as {text, weight}. Other values give no captions. Bytes are text,
    which `usable_captions` checks.
    """
    value = _decoded(value)
    if isinstance(value, str):
        if not (texts := listed(value)):
            return (Caption(value),)
        value = texts
    elif isinstance(value, list) and any(isinstance(turn, dict) and turn.keys() & set(ASKED) for turn in value):
        value = _first_answer(value)
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(caption for caption in map(_caption, values) if caption)


def caption_lines(text: str) -> list[str]:
    """The captions of a text: its lines if there are several and none of them is empty, else the whole."""
    lines = text.strip().splitlines()
    return lines if len(lines) > 1 and all(line.strip() for line in lines) else [text]


def _decoded(value: Any) -> Any:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def _caption(item: Any) -> Caption | None:
    item = _decoded(item)
    if isinstance(item, str):
        return Caption(item)
    if not isinstance(item, dict):
        return None
    text = next((item[key] for key in TEXT_KEYS if isinstance(item.get(key), str)), None)
    return None if text is None else Caption(text, _weight(item.get("weight", 1.0)))


def _weight(value: Any) -> float:
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:  # JSON has integers that no float can hold
        return math.inf


def captions_of_text(text: str) -> tuple[Caption, ...]:
    """The captions of a file of text: those of a list, else its lines (see `caption_lines`)."""
    return captions_of(listed(text) or caption_lines(text))


def listed(text: str) -> list[str] | None:
    """The texts of a list in JSON's, Python's or NumPy's words, or None if `text` is not such a list."""
    if "[" not in text or len(text) > LONGEST_LIST:
        return None
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = list(_python_texts(text))
    return found if found and all(isinstance(item, str) for item in found) else None


def _python_texts(text: str) -> Iterator[str | None]:
    """The texts between brackets, each for itself: Python would join those that no comma parts."""
    try:
        for token in tokenize.generate_tokens(io.StringIO(text[1:-1]).readline):
            if token.type == tokenize.STRING:
                yield ast.literal_eval(token.string)
            elif token.string.strip(" ,\r\n"):
                yield None
    except (tokenize.TokenError, SyntaxError, ValueError):
        yield None


def _first_answer(turns: list[Any]) -> str | None:
    """What the model says first, in the talks of LLaVA and its like."""
    for turn in turns:
        if isinstance(turn, dict) and any(turn.get(key) in ANSWERING for key in ASKED):
            return next((turn[key] for key in ANSWERED if isinstance(turn.get(key), str)), None)
    return None


@dataclass
class CaptionLooks:
    """What the first captions look like."""

    seen: int = 0
    odd: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    same: Counter[str] = field(default_factory=Counter)

    def look_at(self, captions: tuple[Caption, ...]) -> None:
        """Note the captions of one record."""
        for caption in captions:
            if self.seen == MOST_LOOKED_AT:
                return
            self.seen += 1
            self.same[caption.text] += 1
            kind = _kind(caption.text[:LOOKED_AT])
            if kind:
                self.odd[kind] += 1
                examples = self.examples.setdefault(kind, [])
                if len(examples) < FEWEST and caption.text not in examples:
                    examples.append(caption.text)

    def warnings(self, *, are_classes: bool) -> Iterator[str]:
        """What is worth a warning, with examples. Captions of class folders are alike by their nature."""
        for kind, n in self.odd.most_common():
            if n >= FEWEST and n > self.seen * (SOME if kind == "missing" else MANY):
                what = "are words for a missing value" if kind == "missing" else f"look like {kind}"
                yield f"{n:,} of {self.seen:,} captions {what}: {_quoted(self.examples[kind])}"
        for text, n in [] if are_classes else self.same.most_common(1):
            if n >= 2 * FEWEST and n > self.seen * MANY:
                yield f"{n:,} of {self.seen:,} captions are the same: {_quoted([text])}"


def _kind(text: str) -> str | None:
    if text.lower() in MISSING:
        return "missing"
    return next((kind for kind, look in ODD.items() if look.match(text)), None)


def _quoted(texts: list[str]) -> str:
    return ", ".join(shortened(text) for text in texts)


def shortened(text: str) -> str:
    """A caption in a message: in quotes, on one line, not long."""
    text = escaped(text)
    return f'"{text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + "..."}"'
