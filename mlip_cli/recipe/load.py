"""YAML + `extends` + key=value -> Recipe, and back. Every mistake is reported at once, with its file and line."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic.json_schema import GenerateJsonSchema

from mlip_cli import __version__
from mlip_cli.errors import RecipeError, UsageError
from mlip_cli.files import read_object
from mlip_cli.paths import escaped, read_path
from mlip_cli.recipe.checks import check
from mlip_cli.recipe.config import Recipe, Source
from mlip_cli.recipe.init_source import open_clip_file
from mlip_cli.recipe.layers import layered
from mlip_cli.recipe.schema import Node, dotted
from mlip_cli.recipe.shipped import find_recipe as find_recipe
from mlip_cli.recipe.tree import DEEPEST, Key, Mistake, Place, Tree, merge, parse
from mlip_cli.recipe.words import explain, shown

COMMAND_LINE = "command line"
MOST_BYTES = 2**18
"""Size of a recipe file; longer lists of folders are patterns."""


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe and where its values come from."""

    recipe: Recipe
    origins: dict[str, str]
    """Dotted key of every leaf -> `recipes/x.yaml:12`, `command line` or `default`."""
    name: str
    """The file's name without .yaml."""
    notes: tuple[str, ...] = ()
    """Values that gave way to later ones, in words."""


def load_recipe(
    source: str, overrides: Sequence[str] = (), *, of_init: Callable[[str], Recipe] | None = None
) -> LoadedRecipe:
    """Read a recipe file or a shipped recipe, and change it by `key=value`.

    Args:
        of_init: the recipe of the weights that `model.init` names. A recipe without `model.vision` changes that one's
            model, losses and pixels.

    Raises:
        UsageError: there is no such recipe.
        RecipeError: all mistakes, one for each line. Mistakes between keys are looked for only when single keys are
        right."""
    file = find_recipe(source)
    written = _read(file, ())
    tree = layered(written, _overrides(overrides))
    if of_init is not None and (init := _init_without_vision(tree.value)):
        tree = layered(_model_of(of_init(init), init), tree)
    mistakes = list(tree.mistakes)
    recipe = None
    if written.value is not None:
        try:
            recipe = Recipe.model_validate_json(json.dumps(tree.value))
        except ValidationError as error:
            found = explain(error, tree.value, recipe_schema())
            mistakes += [Mistake(_place(tree, key, file), text) for key, text in found]
    if recipe is not None and not mistakes:
        found = [(tuple(name.split(".")), f"{name}: {text}") for name, text in check(recipe)]
        mistakes = [Mistake(_place(tree, key, file), text) for key, text in found]
    if recipe is None or mistakes:
        raise RecipeError("\n".join(_report(mistakes, file)))
    origins = {dotted(key): _origin(tree.places.get(key)) for key, _ in _leaves(_plain(recipe))}
    return LoadedRecipe(recipe, origins, file.stem, tuple(tree.notes))


def load_without_weights(source: str) -> LoadedRecipe:
    """A recipe as `load_recipe` reads it; the model of `laptop` stands in for the one that weights would give."""
    value = _read(find_recipe(source), ()).value
    model = value.get("model", {}) if isinstance(value, dict) else None
    if not isinstance(model, dict) or "vision" in model:
        return load_recipe(source)
    return load_recipe(source, ["model.init=runs/any"], of_init=lambda _: load_recipe("laptop").recipe)


OF_INIT: tuple[Key, ...] = (
    *(("model",), ("losses",)),
    *(("data", name) for name in ("image_size", "resize", "pixel_mean", "pixel_std")),
)
"""What a recipe without `model.vision` takes from the run of `model.init`."""


def _is_of_init(key: Key) -> bool:
    return any(key[: len(own)] == own for own in OF_INIT)


def _init_without_vision(value: Any) -> str | None:
    """The value of `model.init`, if the recipe has one and no `model.vision`."""
    model = value.get("model") if isinstance(value, dict) else None
    if not isinstance(model, dict) or model.get("vision") is not None:
        return None
    init = model.get("init")
    return init if isinstance(init, str) and init else None


def _model_of(recipe: Recipe, init: str) -> Tree:
    """The keys `OF_INIT` of the recipe of `init`, as a layer. Its own start and what it froze are not taken."""
    file = Path(init) / "recipe.yaml"
    tree = parse(recipe_yaml(recipe), str(file) if file.is_file() else "model.init")
    taken = Tree({}, places={key: place for key, place in tree.places.items() if _is_of_init(key)})
    for key in OF_INIT:
        value: Any = tree.value
        for part in key:
            value = value[part]
        for part in reversed(key):
            value = {part: value}
        taken = merge(taken, Tree(value))
    for name in ("init", "freeze"):
        taken.value["model"].pop(name)
    taken.value["model"]["vision"].pop("init")
    return taken


class _Schema(GenerateJsonSchema):
    """No key is required, since `extends` may supply it. Keys need no titles beside their names."""

    def field_is_required(self, field: Any, total: bool) -> bool:
        return False

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def recipe_schema() -> Node:
    """The JSON schema of recipe files, as in recipes/schema.json."""
    schema = Recipe.model_json_schema(schema_generator=_Schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema | {"title": "Recipe of mlip"}


def schema_text() -> str:
    """The content of recipes/schema.json."""
    return json.dumps(recipe_schema(), indent=2) + "\n"


def absolute_paths(recipe: Recipe) -> Recipe:
    """The same recipe with absolute paths of the data, its cache, the weights to start from and the tokenizer."""

    def absolute(sources: tuple[Source, ...] | None) -> tuple[Source, ...] | None:
        return sources and tuple(
            s if "://" in s.path else s.model_copy(update={"path": os.path.abspath(s.path)}) for s in sources
        )

    cache = recipe.data.cache
    if cache.folder is not None:
        cache = cache.model_copy(update={"folder": os.path.abspath(cache.folder)})
    data = {"train": absolute(recipe.data.train), "validation": absolute(recipe.data.validation), "cache": cache}
    init = recipe.model.init
    foreign = open_clip_file(init) if init else None
    if init:
        init = str(replace(foreign, file=os.path.abspath(foreign.file))) if foreign else os.path.abspath(init)
    vision, text = recipe.model.vision, recipe.model.text
    if vision.init is not None:
        vision = vision.model_copy(update={"init": os.path.abspath(vision.init)})
    if text.tokenizer is not None:
        file = os.path.abspath(text.tokenizer.file)
        text = text.model_copy(update={"tokenizer": text.tokenizer.model_copy(update={"file": file})})
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update=data),
            "model": recipe.model.model_copy(update={"init": init, "vision": vision, "text": text}),
        }
    )


def differences(old: Recipe, new: Recipe) -> list[tuple[str, Any, Any]]:
    """[(dotted key, old value, new value)] of the leaves that differ; a section against null is one difference."""
    return list(_differences(_plain(old), _plain(new), ()))


def recipe_yaml(recipe: Recipe, origins: Mapping[str, str] | None = None) -> str:
    """The whole recipe, resolved, as YAML that loads to an equal one; with `origins` each line names its source."""
    lines: list[tuple[str, str]] = []
    open_section: Key = ()
    for key, value in _leaves(_plain(recipe)):
        section = key[:-1]
        opened = [d for d in range(len(section)) if section[: d + 1] != open_section[: d + 1]]
        lines += [("  " * d + f"{section[d]}:", "") for d in opened]
        open_section = section
        origin = f"# {origins[dotted(key)]}" if origins else ""
        lines.append(("  " * len(section) + f"{key[-1]}: {_flow(value)}", origin))
    width = max(len(text) for text, origin in lines if origin) if origins else 0
    return "".join(f"{text:<{width}}  {origin}".rstrip() + "\n" for text, origin in lines)


def override(key: str, value: Any) -> str:
    """`key=value` that the command line reads back as this value."""
    return f"{key}={_flow(value)}"


def _read(file: Path, children: tuple[Path, ...]) -> Tree:
    """Read one file and the files it extends. The value is None if one cannot be read. `children` extend this file."""
    shown = os.path.normpath(file)
    if file.stat().st_size > MOST_BYTES:
        return Tree(mistakes=[Mistake(Place(shown, 1), f"more than {MOST_BYTES // 1024} KiB, not a recipe")])
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        return Tree(mistakes=[Mistake(Place(shown, 1), "not UTF-8 text")])
    tree = parse(text, shown)
    if tree.value is None and not tree.mistakes:
        tree.value = {}
    if not isinstance(tree.value, dict):
        return Tree(
            mistakes=tree.mistakes
            or [Mistake(Place(shown, 1), "expected a recipe: lines of `section:` and `key: value`")]
        )
    parent = tree.value.pop("extends", None)
    return tree if parent is None else _extended(tree, file, parent, (*children, file))


def _extended(tree: Tree, file: Path, parent: Any, chain: tuple[Path, ...]) -> Tree:
    place = tree.places[("extends",)]
    try:
        path = file.parent / read_path(parent if isinstance(parent, str) else "")
    except UsageError as error:
        wrong = str(error) if isinstance(parent, str) else f"expected the path of a recipe, not {shown(parent)}"
        return Tree(mistakes=[*tree.mistakes, Mistake(place, f"extends: {wrong}")])
    if path.resolve() in [link.resolve() for link in chain]:
        links = " -> ".join(os.path.normpath(link) for link in (*chain, path))
        problem = f"extends: these recipes extend each other in a circle: {links}"
    elif not path.is_file():
        problem = f"extends: no file {os.path.normpath(path)}; the path is relative to this recipe's folder"
    else:
        base = _read(path, chain)
        if base.value is not None:
            return layered(base, tree)
        return Tree(mistakes=base.mistakes + tree.mistakes)
    return Tree(mistakes=[*tree.mistakes, Mistake(place, problem)])


def _overrides(overrides: Sequence[str]) -> Tree:
    tree = Tree({})
    for number, text in enumerate(overrides):
        place = Place(f"{COMMAND_LINE}: {text}", 0)
        key, equals, value = text.partition("=")
        problem = _problem(key, equals, value)
        if problem is None and any(other.partition("=")[0] == key for other in overrides[:number]):
            problem = f"{key} is given twice"
        if problem is not None:
            tree.mistakes.append(Mistake(place, problem))
            continue
        path = tuple(key.split("."))
        one = parse(value, place.source, root=path, first_line=0)
        one.places |= {path[:depth]: place for depth in range(1, len(path) + 1)}
        for name in reversed(path):
            one.value = {name: one.value}
        tree = merge(tree, Tree({}, mistakes=one.mistakes) if one.mistakes else one)
    return tree


def _problem(key: str, equals: str, value: str) -> str | None:
    """The mistake in the form of an override, if there is one."""
    if not equals:
        return "expected key=value, as in optim.lr=1e-3"
    if not re.fullmatch(r"[^.\s]+(\.[^.\s]+)*", key) or key.count(".") >= DEEPEST:
        return "expected a key before =, as in optim.lr=1e-3"
    if not value.strip() or value.lstrip().startswith("#"):
        return f"no value after =; {key}=null removes one, and a value that begins with # needs quotes"
    return "extends works in a recipe file only" if key == "extends" else None


def _place(tree: Tree, key: Key, file: Path) -> Place:
    return tree.place_of(key) or Place(os.path.normpath(file), 1)


def _origin(place: Place | None) -> str:
    return "default" if place is None else str(place) if place.line else COMMAND_LINE


def _report(mistakes: list[Mistake], file: Path) -> Iterator[str]:
    """The lines of a RecipeError: files first, by line, then the command line."""
    for place, text in sorted(mistakes, key=lambda m: (not m.place.line, m.place)):
        key = "" if place.line else place.source.removeprefix(f"{COMMAND_LINE}: ").partition("=")[0]
        yield escaped(f"{place}: {text.removeprefix(f'{key}: ')}")
    stamp = file.with_name("run.json")
    try:
        made_by = read_object(stamp).get("mlip_version") if stamp.is_file() else None
    except ValueError as error:
        yield f"{stamp}: damaged ({error}), so what made the recipe is unknown"
        return
    if made_by not in (None, __version__) and any(m.place.line for m in mistakes):
        yield f"{file}: made by mlip {made_by}, this is mlip {__version__}; use that version, or start a new run"


def _plain(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude={"extends"})


def _leaves(data: dict[str, Any], key: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Keys and values of everything that is not a section; lists are leaves. Plain keys come before sections."""
    for name, value in data.items():
        if not isinstance(value, dict):
            yield (*key, name), value
    for name, value in data.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*key, name))


def _differences(old: Any, new: Any, key: Key) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old:
            yield from _differences(old[name], new[name], (*key, name))
    elif old != new:
        yield dotted(key), old, new


def _flow(value: Any) -> str:
    """A value on one line, in YAML that versions 1.1 and 1.2 read alike."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_flow(v)}" for name, v in value.items() if v is not None) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, float):
        digits, exponent, power = repr(value).partition("e")
        return (digits if "." in digits else f"{digits}.0") + exponent + power
    if not isinstance(value, str):
        return json.dumps(value)
    is_plain = re.fullmatch(r"[A-Za-z_/][\w./-]*", value, re.ASCII)
    if is_plain and parse(value, "").value == value and yaml.safe_load(value) == value:
        return value
    return yaml.safe_dump(value, default_style='"', allow_unicode=True, width=2**30).removesuffix("\n")
