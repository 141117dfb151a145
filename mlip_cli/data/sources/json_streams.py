"""One JSON document read piece by piece, so that memory holds an item of its long array and not the document."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mlip_cli.data.sources.text_tables import MAX_CELL, TOO_LONG, opened_text

PIECE = 1 << 20
"""Characters that are read at once."""
MOST_MEMBERS = 1_000
"""An object of more members is a table of captions by file name, or of columns: it is not streamed."""
SPACE = " \t\n\r"


class JsonText:
    """The text of a document and the place that has been read."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file
        self.text, self.at, self.is_whole = "", 0, False
        self.passed = 0
        """Characters before `text`."""
        self.decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in SPACE:
                self.at += 1
            if self.at < len(self.text) or not self._read_on():
                return self.text[self.at : self.at + 1]

    def take(self, wanted: str) -> bool:
        """Step over the next character if it is this one."""
        if self.peek() != wanted:
            return False
        self.at += 1
        return True

    def expect(self, wanted: str) -> None:
        """Step over this character.

        Raises:
            ValueError: another one is there.
        """
        if not self.take(wanted):
            raise ValueError(f"{wanted!r} expected at character {self.passed + self.at}")

    def value(self) -> Any:
        """The next value.

        Raises:
            ValueError, RecursionError: it is not JSON.
        """
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if self._read_on():
                    continue
                raise ValueError(f"{error.msg} at character {self.passed + error.pos}") from None
            length = end - self.at
            if end < len(self.text) or not self._read_on():  # a number could go on
                self.at += length
                return value

    def items(self) -> Iterator[Any]:
        """The items of the array that comes next.

        Raises:
            ValueError, RecursionError: it is not JSON.
        """
        self.expect("[")
        if self.take("]"):
            return
        yield self.value()
        while not self.take("]"):
            self.expect(",")
            yield self.value()

    def names(self) -> Iterator[str]:
        """The names of the members of the object that comes next; the caller reads the value of each.

        Raises:
            ValueError, RecursionError: it is not JSON.
        """
        self.expect("{")
        if self.take("}"):
            return
        while True:
            name = self.value()
            if not isinstance(name, str):
                raise ValueError("a member without a name")
            self.expect(":")
            yield name
            if self.take("}"):
                return
            self.expect(",")

    def expect_end(self) -> None:
        """Check that nothing follows.

        Raises:
            ValueError: something does.
        """
        if self.peek():
            raise ValueError(f"text after the document at character {self.passed + self.at}")

    def _read_on(self) -> bool:
        """Read more, at least as much as is there: an item longer than that is not parsed for every piece of it.

        Raises:
            ValueError: too much is there.
        """
        if len(self.text) - self.at > MAX_CELL:
            raise ValueError(f"{TOO_LONG} at character {self.passed + self.at}")
        piece = "" if self.is_whole else self.file.read(max(PIECE, len(self.text) - self.at))
        self.is_whole = not piece
        self.passed += self.at
        self.text, self.at = self.text[self.at :] + piece, 0
        return bool(piece)


def streamed_array(path: Path) -> str | None:
    """Where the rows of a document lie: "" if it is an array, NAME if it is the one array of objects in an object.

    None where the document must be read as a whole: an object of another form, or no JSON.
    """
    with opened_text(path) as file:
        text = JsonText(file)
        if text.peek() == "[":
            return ""
        try:
            return _only_array(text)
        except (ValueError, RecursionError):
            return None


def _only_array(text: JsonText) -> str | None:
    arrays = []
    for number, name in enumerate(text.names()):
        if number == MOST_MEMBERS:
            return None
        if text.peek() == "[":
            num_items, are_objects = 0, True
            for item in text.items():
                num_items += 1
                are_objects = are_objects and isinstance(item, dict)
            arrays += [name] if num_items and are_objects else []
        else:
            text.value()
    text.expect_end()
    return arrays[0] if len(arrays) == 1 else None


def streamed_items(path: Path, name: str) -> Iterator[Any]:
    """The items of the array that `streamed_array` found.

    Raises:
        ValueError, RecursionError: the document is damaged.
    """
    with opened_text(path) as file:
        text = JsonText(file)
        if not name:
            yield from text.items()
            text.expect_end()
            return
        for member in text.names():
            if member == name and text.peek() == "[":
                yield from text.items()
                return
            text.value()
