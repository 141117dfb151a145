"""pydantic's errors in the words of a recipe."""

import json
from typing import Any

from pydantic import ValidationError

from mlip_cli.recipe.schema import Node, dotted, expected, guess, is_section, node_at, properties
from mlip_cli.recipe.tree import Key


def explain(error: ValidationError, data: dict[str, Any], schema: Node) -> list[tuple[Key, str]]:
    """One sentence for each wrong place, the innermost ones: [(key, text)]."""
    found: dict[Key, str] = {}
    for detail in error.errors(include_url=False, include_context=False):
        key, value = _in_data(detail["loc"], data)
        if detail["type"] == "extra_forbidden":
            text = _unknown(schema, key)
        elif detail["type"] == "missing" and isinstance(detail["loc"][-1], str):
            key = (*key, detail["loc"][-1])
            text = f"{dotted(key)} is missing{_model_of_weights(key, data)}"
        elif detail["type"] == "value_error":  # raised by a function of ours
            text = f"{dotted(key)}: {detail['msg'].removeprefix('Value error, ')}"
        else:
            text = _unexpected(schema, key, value)
        found.setdefault(key, text)
    outer = {key[:length] for key in found for length in range(len(key))}
    return [(key, text) for key, text in found.items() if key not in outer]


def _model_of_weights(key: Key, data: dict[str, Any]) -> str:
    """What is to be given in place of a model, which may be that of the weights."""
    if key not in (("model",), ("model", "vision")):
        return ""
    if isinstance(data.get("model"), dict) and data["model"].get("init") is not None:
        return "; mlip pretrain alone takes it from model.init"
    return "; give model.init=RUN or model.init=open_clip:ARCH:FILE, whose model is then trained, or describe a model"


def _in_data(loc: tuple[str | int, ...], data: Any) -> tuple[Key, Any]:
    """The part of pydantic's location that the file holds, and its value. A scalar in place of a list has no [0]."""
    key: Key = ()
    for part in loc:
        if isinstance(data, dict):
            is_there = part in data
        else:
            is_there = isinstance(data, list) and isinstance(part, int) and part < len(data)
        if is_there:
            data = data[part]
            key = (*key, part)
    return key, data


def _unknown(schema: Node, key: Key) -> str:
    *parent, word = key
    text = f"unknown key {dotted(key)}"
    if isinstance(word, str) and "." in word:
        section, _, leaf = word.rpartition(".")
        return f"{text}; dots are for the command line, in a file write {leaf} under {section}"
    near = guess(schema, parent, str(word))
    if near:
        return f"{text}; did you mean {near}?"
    node = node_at(schema, parent)
    return f"{text}; known here: {', '.join(properties(schema, node or schema))}"


def _unexpected(schema: Node, key: Key, value: Any) -> str:
    node = node_at(schema, key)
    assert node is not None, key
    if value is None and is_section(schema, node):
        keys = ", ".join(properties(schema, node))
        return f"{dotted(key)}: cannot be null or empty; its keys: {keys}"
    return f"{dotted(key)}: expected {expected(schema, node)}, not {shown(value)}"


def shown(value: Any) -> str:
    """A value as the user wrote it, roughly, in at most 60 characters."""
    if isinstance(value, dict):
        return "a section"
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
