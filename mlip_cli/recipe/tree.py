"""YAML text -> plain data and the place of every key. Scalars are those of YAML 1.2; aliases, merge keys and tags
are refused.

PyYAML's own resolvers are those of YAML 1.1, in which `1e-4` is text, `no` is false and `12:30` is 750.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

DEEPEST = 20
"""Levels of nesting, of which recipes need five."""
LONGEST_NUMBER = 100
"""Digits; longer ones are text."""

Key = tuple[str | int, ...]
"""Keys and list positions from the root: ("data", "train", 1)."""


class Place(NamedTuple):
    """Where a value was written: a file and a line, counted from 1. Line 0 means the command line."""

    source: str
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


class Mistake(NamedTuple):
    """One mistake and its place."""

    place: Place
    message: str


@dataclass
class Tree:
    """Plain data and where each part of it was written."""

    value: Any = None
    places: dict[Key, Place] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Values that gave way to later ones, in words."""

    def place_of(self, key: Key) -> Place | None:
        """The place of `key`, or of the innermost written section around it."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key)


_HALF = re.compile("[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]")
"""Half of a pair of UTF-16; two escapes that make a pair are one character."""


class _Loader(yaml.SafeLoader):
    """Makes nodes only. `_scalar` makes the values, since PyYAML's constructors follow YAML 1.1."""


_Loader.yaml_implicit_resolvers = {}

_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
for _name, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first)


def _scalar(node: yaml.ScalarNode) -> Any:
    kind, text = node.tag.rpartition(":")[2], node.value
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int" and len(text) <= LONGEST_NUMBER:
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if kind == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def parse(text: str, source: str, *, root: Key = (), first_line: int = 1) -> Tree:
    """Read one YAML document. Places count lines from `first_line`, which is 0 for a value of the command line.

    Keys of the places start with `root`. The tree holds the mistakes; unreadable text has the value None.
    """

    def at(mark: Any) -> Place:
        return Place(source, mark.line + 1 if mark and first_line else first_line)

    tree = Tree()
    try:
        tree.mistakes += [Mistake(at(mark), problem) for mark, problem in _foreign(text)]
        node = None if tree.mistakes else yaml.compose(text, _Loader)
    except yaml.MarkedYAMLError as error:
        tree.mistakes.append(Mistake(at(error.problem_mark or error.context_mark), f"not YAML: {_problem(error)}"))
        return tree
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1 if first_line else first_line
        tree.mistakes.append(Mistake(Place(source, line), f"not YAML: {error.reason}"))
        return tree
    except (ValueError, OverflowError) as error:  # PyYAML computes with digits that it has not checked
        tree.mistakes.append(Mistake(Place(source, first_line), f"not YAML: a number in it is too large: {error}"))
        return tree
    if node is not None:
        tree.places[root] = at(node.start_mark)
        tree.value = _data(node, root, tree, at)
    return tree


def _foreign(text: str) -> Iterator[tuple[Any, str]]:
    """What YAML has and recipes have not: [(mark, what is wrong)]. Reading stops where the nesting is too deep."""
    depth = 0
    for event in yaml.parse(text, _Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            yield event.start_mark, f"more than {DEEPEST} levels of nesting"
            return
        if getattr(event, "anchor", None) or getattr(event, "tag", None):
            yield event.start_mark, "anchors, aliases and tags (&, *, !) are not part of recipes"
        if isinstance(event, yaml.ScalarEvent) and _HALF.search(event.value):
            yield event.start_mark, f"{event.value!r} holds half of a character; write the character itself"


def _problem(error: yaml.MarkedYAMLError) -> str:
    """PyYAML's words; some of its sentences begin in the context."""
    problem = str(error.problem)
    return f"{error.context}, {problem}" if problem.startswith("but ") else problem


def _data(node: yaml.Node, key: Key, tree: Tree, at: Callable[[Any], Place]) -> Any:
    if isinstance(node, yaml.SequenceNode):
        tree.places |= {(*key, i): at(child.start_mark) for i, child in enumerate(node.value)}
        return [_data(child, (*key, i), tree, at) for i, child in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, key, tree, at)
    assert isinstance(node, yaml.ScalarNode)
    return _scalar(node)


def _mapping(node: yaml.MappingNode, key: Key, tree: Tree, at: Callable[[Any], Place]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for name, child in node.value:
        place = at(name.start_mark)
        if not isinstance(name, yaml.ScalarNode):
            tree.mistakes.append(Mistake(place, "a key must be a plain word"))
            continue
        path = (*key, name.value)
        if name.value == "<<":
            tree.mistakes.append(Mistake(place, "merge keys (<<) are not part of recipes; use extends"))
        elif name.value in data:
            problem = f"duplicate key {'.'.join(map(str, path))}; first in line {tree.places[path].line}"
            tree.mistakes.append(Mistake(place, problem))
        else:
            tree.places[path] = place
            data[name.value] = _data(child, path, tree, at)
    return data


def merge(base: Tree, top: Tree) -> Tree:
    """`top` over `base`: mappings merge and keep their first place; everything else is replaced."""
    places = dict(base.places)
    value = _merged(base.value, top.value, (), places)
    return Tree(value, top.places | places, base.mistakes + top.mistakes, base.notes + top.notes)


def _merged(old: Any, new: Any, key: Key, places: dict[Key, Place]) -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        kept = {k: _merged(old[k], v, (*key, k), places) if k in old else v for k, v in new.items()}
        return old | kept
    for gone in [k for k in places if k[: len(key)] == key]:
        del places[gone]
    return new
