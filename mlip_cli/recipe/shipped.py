"""The shipped recipes: their folder, their names, and shell completion from their schema.

Nothing heavy is imported: the shell calls this at every press of the tab key.
"""

import json
from pathlib import Path

from mlip_cli.errors import UsageError
from mlip_cli.paths import read_path
from mlip_cli.recipe.schema import Node, choices, closest, is_section, paths


def recipes_folder() -> Path:
    """Inside the package when installed from a wheel, beside it in a clone."""
    package = Path(__file__).parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def recipe_names() -> list[str]:
    """Sorted names of the shipped recipes, without those of the ablation, which fit one small data set."""
    folder = recipes_folder()
    found = [*folder.glob("*.yaml"), *folder.glob("baselines/*.yaml")]
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in found)


def find_recipe(source: str) -> Path:
    """The path `source`, or the shipped recipe of that name: `openmoji`, `recipes/openmoji.yaml`, `baselines/clip`.

    Raises:
        UsageError: there is no such file. It names the nearest shipped recipe and lists all of them.
    """
    path = Path(read_path(source))
    if path.is_file():
        return path
    if path.is_dir():
        inside = path / "recipe.yaml"
        hint = f"did you mean {inside}?" if inside.is_file() else "name a recipe file"
        raise UsageError(f"{source}: a folder, not a recipe; {hint}")
    name = path.as_posix().removeprefix("recipes/").removesuffix(".yaml")
    if name in recipe_names():
        shipped, here = recipes_folder() / f"{name}.yaml", Path.cwd()
        return shipped.relative_to(here) if shipped.is_relative_to(here) else shipped
    last = path.name.removesuffix(".yaml")
    near = next((known for known in recipe_names() if known.endswith(f"/{last}")), closest(last, recipe_names(), 0.6))
    hint = f"did you mean {near}? " if near else ""
    raise UsageError(f"{source}: no such file and no shipped recipe; {hint}shipped: {', '.join(recipe_names())}")


def read_schema() -> Node:
    """recipes/schema.json"""
    return json.loads((recipes_folder() / "schema.json").read_text(encoding="utf-8"))


def complete_recipe(incomplete: str) -> list[str]:
    """Shipped recipes whose names start with `incomplete`."""
    return [name for name in recipe_names() if name.startswith(incomplete)]


def complete_override(earlier: list[str], incomplete: str) -> list[str]:
    """Keys of the recipe up to the equals sign, then the words that can follow it.

    bash makes `key`, `=` and the value separate words (the `=` arrives only when a value has begun) and wants the value
    alone; zsh and fish hand over `key=value` in one piece.
    """
    if earlier[-1:] == ["="] and len(earlier) > 1:
        return _values(earlier[-2], incomplete)
    if earlier and "=" not in earlier[-1] and earlier[-2:-1] != ["="]:
        return _values(earlier[-1], incomplete)
    key, equals, value = incomplete.partition("=")
    if equals:
        return [f"{key}={word}" for word in _values(key, value)]
    schema = read_schema()
    found = [(path, node) for path, node in paths(schema) if path.startswith(key) and path != "extends"]
    return [f"{path}=" for path, node in found if not is_section(schema, node) or "null" in choices(schema, node)]


def _values(key: str, incomplete: str) -> list[str]:
    schema = read_schema()
    node = dict(paths(schema)).get(key)
    return [word for word in choices(schema, node) if word.startswith(incomplete)] if node else []
