"""Questions to the recipe's JSON schema: which keys exist, what a place expects, which key was meant.

Works on the plain schema, so that shell completion can use recipes/schema.json without loading pydantic.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any

Node = dict[str, Any]

SIBLING_CUTOFF, TREE_CUTOFF = 0.6, 0.75
"""Least similarity of a guess. Inside its own section a key may differ more than in the whole recipe."""
BOUNDS = {"minimum": "of at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def _options(schema: Node, node: Node) -> list[Node]:
    """The alternatives at `node`, references followed."""
    if "$ref" in node:
        return _options(schema, schema["$defs"][node["$ref"].rpartition("/")[2]])
    if "anyOf" in node:
        return [option for part in node["anyOf"] for option in _options(schema, part)]
    return [node]


def properties(schema: Node, node: Node) -> dict[str, Node]:
    """Keys of the section at `node` (also of a section that may be null), or {}."""
    return {name: child for option in _options(schema, node) for name, child in option.get("properties", {}).items()}


def node_at(schema: Node, key: Sequence[str | int]) -> Node | None:
    """The part of the schema that describes `key`, or None for an unknown key."""
    node = schema
    for part in key:
        if isinstance(part, str):
            found = properties(schema, node).get(part)
        else:
            found = next((n for option in _options(schema, node) if (n := _item(option, part))), None)
        if found is None:
            return None
        node = found
    return node


def _item(option: Node, position: int) -> Node | None:
    fixed = option.get("prefixItems", [])
    return fixed[position] if position < len(fixed) else option.get("items")


def paths(schema: Node, node: Node | None = None, prefix: str = "") -> Iterator[tuple[str, Node]]:
    """Every dotted key below `node`, sections before what is in them."""
    for name, child in properties(schema, schema if node is None else node).items():
        yield prefix + name, child
        if is_section(schema, child):
            yield from paths(schema, child, f"{prefix}{name}.")


def is_section(schema: Node, node: Node) -> bool:
    """True for a mapping with known keys (a list of such mappings is not one)."""
    options = _options(schema, node)
    return any("properties" in option for option in options) and not any("items" in option for option in options)


def choices(schema: Node, node: Node) -> list[str]:
    """The words that `node` accepts: those of an enumeration, true and false, null."""
    of_type = {"boolean": ["true", "false"], "null": ["null"]}
    words: list[str] = []
    for option in _options(schema, node):
        words += option.get("enum", [])
        words += [option["const"]] if "const" in option else of_type.get(option.get("type", ""), [])
    return words


def expected(schema: Node, node: Node) -> str:
    """What `node` accepts, in words: `a number above 0 or null`."""
    if "x-expected" in node:
        return str(node["x-expected"])
    words = [_words(schema, option) for option in _options(schema, node)]
    comma = "," if words[-1] == "null" and "list" in words[0] else ""
    return f"{comma} or ".join(words)


def _words(schema: Node, option: Node) -> str:
    if "enum" in option:
        return "one of " + ", ".join(option["enum"])
    if "const" in option:
        return str(option["const"])
    if "properties" in option:
        return "a section with the keys " + ", ".join(option["properties"])
    if "prefixItems" in option:
        each = " or ".join(sorted({_plural(expected(schema, item)) for item in option["prefixItems"]}))
        return f"a list of {len(option['prefixItems'])} {each}"
    if "items" in option:
        return f"a list of {_plural(expected(schema, option['items']))}"
    kinds = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text"}
    kind = kinds.get(option["type"], str(option["type"]))
    parts = [f"{words} {option[name]}" for name, words in BOUNDS.items() if name in option]
    filled = " that is not empty" if option.get("minLength") else ""
    return f"{kind} {' and '.join(parts)}".rstrip() + filled


def _plural(words: str) -> str:
    return words.replace("a whole number", "whole numbers").replace("a number", "numbers")


def guess(schema: Node, parent: Sequence[str | int], word: str) -> str | None:
    """The dotted key that `word` inside `parent` probably means: a sibling, else a key of the whole recipe."""
    node = node_at(schema, parent)
    siblings = list(properties(schema, node)) if node else []
    near = closest(word, siblings, SIBLING_CUTOFF)
    if near:
        return dotted((*parent, near))
    return closest(word, [path for path, _ in paths(schema)], TREE_CUTOFF)


def closest(word: str, candidates: Sequence[str], cutoff: float) -> str | None:
    """The candidate most similar to `word`, by its last dotted part or the end of that (`size` of `image_size`)."""
    best, best_score = None, cutoff
    for candidate in candidates:
        parts = candidate.rpartition(".")[2].split("_")
        scores = [_similarity(word, "_".join(parts[i:])) - 0.01 * i for i in range(len(parts))]
        if max(scores) > best_score:
            best, best_score = candidate, max(scores)
    return best


def _similarity(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a.lower(), b.lower()).ratio()


def dotted(key: Sequence[str | int]) -> str:
    """("data", "train", 1) -> data.train[1]"""
    return re.sub(r"\.\[", "[", ".".join(f"[{part}]" if isinstance(part, int) else part for part in key))
