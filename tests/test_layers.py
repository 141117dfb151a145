"""Imports point one way: cli -> commands -> rooms -> types, distributed -> base. Read with ast, so nothing runs."""

import ast
import importlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mlip_cli"

BASE = {
    "drawing",
    "errors",
    "files",
    "heap",
    "init_source",
    "merge_plan",
    "output",
    "run_folder",
    "config",
    "recipe",
    "recipe_checks",
    "recipe_schema",
    "recipe_tree",
    "recipe_words",
    "shipped",
}
SHARED = {"types", "distributed"}
ROOMS = {"data", "model", "losses", "train", "evaluate", "profiling"}
TOP = {"cli", "cli_values", "endings", "__main__", "__init__"}

HEAVY = {
    "torch",
    "torchvision",
    "timm",
    "open_clip",
    "webdataset",
    "clip_benchmark",
    "pyarrow",
    "sklearn",
    "matplotlib",
    "numpy",
}


def modules() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "mlip_cli/*.py"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    files = [ROOT / name for name in listed if (ROOT / name).exists()]
    return files or sorted(PACKAGE.rglob("*.py"))


def room(name: str) -> str:
    """mlip_cli.train.loop -> train"""
    return name.split(".")[1] if "." in name else "__init__"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(tree: ast.AST, *, inside_functions: bool) -> Iterator[str]:
    """Full names of what a module imports; `from a import b` gives a.b."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(node, inside_functions=inside_functions)


def allowed(importer: str) -> set[str]:
    if importer in BASE:
        return BASE
    if importer in SHARED:
        return BASE | SHARED
    if importer in ROOMS:
        return BASE | SHARED | {importer}
    if importer == "commands":
        return BASE | SHARED | ROOMS | {"commands"}
    return BASE | {"commands", "cli", "cli_values", "endings"}


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_imports_point_one_way(path: Path) -> None:
    here = room(module_name(path))
    assert here in BASE | SHARED | ROOMS | TOP | {"commands"}, "a new room needs a place in the layers"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    rooms = {room(name) for name in imports(tree, inside_functions=True) if name.split(".")[0] == "mlip_cli"}
    assert rooms - {"__version__", "__init__"} <= allowed(here)


@pytest.mark.parametrize("path", [p for p in modules() if room(module_name(p)) in BASE | TOP], ids=module_name)
def test_the_base_layer_and_the_command_line_import_nothing_heavy(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not {name.split(".")[0] for name in imports(tree, inside_functions=True)} & HEAVY


def test_packages_hold_no_code_but_the_version() -> None:
    for path in modules():
        if path.name == "__init__.py":
            text = path.read_text(encoding="utf-8").strip()
            assert not text or (path.parent == PACKAGE and text.startswith("__version__ = "))


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_every_module_imports(path: Path) -> None:
    importlib.import_module(module_name(path).removesuffix(".__init__"))
