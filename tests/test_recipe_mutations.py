"""Mutated recipes and overrides: each is a recipe or a list of mistakes, one on each line, at once."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlip_cli.errors import UsageError
from mlip_cli.recipe.load import load_recipe, load_without_weights, recipe_yaml
from mlip_cli.recipe.schema import paths
from mlip_cli.recipe.shipped import read_schema, recipe_names, recipes_folder

NUM_RECIPES = 160
KEYS_FOR_A_VALUE = 2
MOST_S = 5.0

VALUES: tuple[Any, ...] = (
    *(None, True, "", " ", "~", "~nobody/x", "no", "null", {}, [], [[]], {"": None}, [None], ["a", "a"]),
    *(0, -1, 10**30, -(10**30), 1e308, 1e-320, float("inf"), float("-inf"), float("nan"), 0.1, "1e400"),
    *("a\0b", "a\nb", "a\tb", "\x1b[31m", "\x85", "\u2028", "\u202eabc", "é", "🦊", "\ud800", "x" * 5000, "a/" * 3000),
    *("pipe:cat x", "s3:b", "s3://b/c", "https://h/{0..9}.tar", "folder:~nobody/x", "open_clip:", "open_clip::x"),
    *([{"path": "a", "weight": 10**30}], {"path": "a", "format": "webdataset"}, {"weight": 1}, [0.5, 0.4], [1, 2, 3]),
)
RAW = (
    *("&a [*a]", "!!python/object/apply:os.system [ls]", "!x", "<<: {a: 1}", "%YAML 9.9", "\t", "\0", "\x07", "---"),
    *('"\\ud800"', '"\\UFFFFFFFF"', "'", '"', "{", "}", "[" * 3000, "{a: " * 3000, "? a", "- ", "|", "*x", "@", "`"),
    *("9" * 5000, "0x" + "f" * 5000, "0o" + "7" * 5000, ".inf", ".nan", "1e999", "\ufeff", "\r", "\u2028", "é" * 99),
    "\n".join(f"a{i}: &a{i} [{'*a' + str(i - 1) + ',' if i else 1}]" for i in range(40)),
)


def change_tree(tree: Any, chance: random.Random) -> None:
    """One random change at a random place of a recipe."""
    sections = [tree]
    for section in sections:
        sections += [value for value in section.values() if isinstance(value, dict) and value]
    section = chance.choice(sections)
    key = chance.choice([*section])
    match chance.randrange(4):
        case 0:
            del section[key]
        case 1:
            section[chance.choice((key + "s", key.upper(), "a.b", "\x1b", "a\nb", "\0", "x" * 9000, "", "<<"))] = 1
        case 2:
            section["extends"] = chance.choice(("a\0b", "../" * 2000, "\ud800", "x.yaml", ".", "/dev/zero", 5, ["a"]))
        case _:
            section[key] = chance.choice(VALUES)


def change_text(text: str, chance: random.Random) -> str:
    """One random change in the text of a recipe."""
    at = chance.randrange(len(text))
    match chance.randrange(3):
        case 0:
            return text[:at] + chance.choice(RAW) + text[at:]
        case 1:
            return text[:at] + text[at + chance.randrange(1, 40) :]
        case _:
            lines = text.splitlines()
            return "\n".join([*lines, chance.choice(lines)])


def outcome(call: Callable[[], Any]) -> str | None:
    """None for a recipe, else the mistakes; anything but one escaped line each, at once, fails the test."""
    start = time.perf_counter()
    try:
        loaded = call()
    except UsageError as error:
        lines = str(error).split("\n")
        assert all(line.isprintable() or line.replace("\u202e", "").strip() for line in lines)
        assert not any(ord(character) < 32 or 0xD800 <= ord(character) < 0xE000 for line in lines for character in line)
        assert len(lines) < 200
        return str(error)
    finally:
        assert time.perf_counter() - start < MOST_S
    recipe_yaml(loaded.recipe).encode()
    return None


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def mutated(seed: int) -> str:
    chance = random.Random(seed)
    name = chance.choice(recipe_names())
    text = recipe_yaml(load_without_weights(name).recipe)
    if seed % 2:
        tree = yaml.safe_load(text)
        for _ in range(chance.randrange(1, 4)):
            change_tree(tree, chance)
        return json.dumps(tree) if seed % 4 == 1 else yaml.dump(tree)
    return change_text((recipes_folder() / f"{name}.yaml").read_text() if seed % 4 else text, chance)


@pytest.mark.slow
def test_a_mutated_recipe_is_a_recipe_or_a_list_of_mistakes() -> None:
    found = []
    for seed in range(NUM_RECIPES):
        Path("x.yaml").write_bytes(mutated(seed).encode("utf-8", "surrogatepass"))
        found.append(outcome(lambda: load_recipe("x.yaml")))
    assert 0 < found.count(None) < len(found)


@pytest.mark.slow
def test_mutated_overrides_make_a_recipe_or_a_list_of_mistakes() -> None:
    keys = [path for path, _ in paths(read_schema())]
    strange = ("", ".", "a..b", "a" * 9000, ".".join("a" * 5000), "\x1b", "a\nb", "é", "--x", "data.train[0]", "seed.x")
    chance, found = random.Random(0), []
    for value in (*RAW, *VALUES):
        for key in (*chance.sample(keys, KEYS_FOR_A_VALUE), chance.choice(strange)):
            text = value if isinstance(value, str) else json.dumps(value)
            found.append(outcome(lambda both=[f"{key}={text}"]: load_recipe("openmoji", both)))
    assert 0 < found.count(None) < len(found)
