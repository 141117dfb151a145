"""Paths and names that people hand over: how they are read, and how they are shown."""

import re

_UNSHOWN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, ends of lines, what turns the direction of writing, and what UTF-8 cannot encode."""


def escaped(text: str, *, keep: str = "") -> str:
    r"""`text` on one line that is safe to print: `a<newline>b` -> `a\nb`, an escape character -> `\x1b`.

    Args:
        keep: characters that stay as they are.
    """
    return _UNSHOWN.sub(lambda match: match[0] if match[0] in keep else _escape(match[0]), text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()
