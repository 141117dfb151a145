"""Imports follow the order of rooms, and no files import each other in a circle. Read with ast, so nothing runs."""

import ast
import importlib
import subprocess
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mlip_cli"

ORDER = (
    {"__init__", "errors", "files", "machine", "paths", "types"},
    {"recipe"},
    {"terminal"},
    {"meetings"},
    {"devices", "distributed"},
    {"data", "model"},
    {"losses"},
    {"runs"},
    {"train"},
    {"profiling"},
    {"evaluate"},
    {"report"},
    {"export"},
    {"commands"},
    {"cli", "__main__"},
)
"""The rooms: each imports itself and those of earlier lines; single files that share a line may import each other."""

STRANGERS = {("data", "model"), ("model", "data"), ("losses", "model"), ("losses", "data")}
"""(room, other): never imported, whatever the order says."""

LIGHT = (
    "__init__",
    "errors",
    "files",
    "machine",
    "paths",
    "recipe",
    "terminal",
    "report",
    "runs.folder",
    "runs.start",
    "evaluate.datasets.find",
    "cli",
)
"""Rooms and files that import nothing heavy: a mistake shows before torch is loaded."""

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


def files() -> dict[str, Path]:
    """Every module by its name without `mlip_cli.`: train.loop, cli."""
    listed = subprocess.run(
        ["git", "ls-files", "mlip_cli/*.py"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    paths = [ROOT / name for name in listed if (ROOT / name).exists()] or sorted(PACKAGE.rglob("*.py"))
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in paths}


FILES = files()


def room(name: str) -> str:
    """train.loop -> train"""
    return name.partition(".")[0]


def place(name: str) -> int:
    """Line of `ORDER` that a module stands in."""
    return next(line for line, rooms in enumerate(ORDER) if room(name) in rooms)


def imports(tree: ast.AST, *, at_start_only: bool = False) -> Iterator[str]:
    """Full names of what a module imports; `from a import b` gives a.b. `at_start_only` leaves out what functions
    import when they are called, and what only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif at_start_only and (
            isinstance(node, ast.FunctionDef)
            or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        ):
            continue
        else:
            yield from imports(node, at_start_only=at_start_only)


def own_imports(path: Path) -> set[str]:
    """Modules of this package that a file imports anywhere; of the package's own door, `load`, what it imports at the
    start."""
    found = set()
    for name in imports(ast.parse(path.read_text(encoding="utf-8")), at_start_only=path == PACKAGE / "__init__.py"):
        if name.split(".")[0] == "mlip_cli":
            module = name.removeprefix("mlip_cli").removeprefix(".")
            found.add(module if module in FILES else module.rpartition(".")[0] or "__init__")
    return found


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_rooms_that_stand_before_its_own(name: str) -> None:
    for imported in own_imports(FILES[name]):
        assert place(imported) <= place(name), f"{name} imports {imported}"
        assert (room(name), room(imported)) not in STRANGERS, f"{name} imports {imported}"


def test_no_files_import_each_other_in_a_circle() -> None:
    TopologicalSorter({name: own_imports(path) for name, path in FILES.items()}).prepare()  # raises CycleError


@pytest.mark.parametrize("name", [name for name in FILES if f"{name}.".startswith(tuple(f"{at}." for at in LIGHT))])
def test_rooms_that_answer_at_once_import_nothing_heavy(name: str) -> None:
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    assert not {imported.split(".")[0] for imported in imports(tree, at_start_only=True)} & HEAVY


def test_packages_hold_no_code_but_the_version_and_the_door_to_a_model() -> None:
    for path in FILES.values():
        if path.name == "__init__.py":
            body = ast.parse(path.read_text(encoding="utf-8")).body
            assert not body or path.parent == PACKAGE
            assert {own.name for own in body if isinstance(own, ast.FunctionDef | ast.ClassDef)} <= {"load"}


@pytest.mark.parametrize("name", FILES)
def test_every_module_imports(name: str) -> None:
    importlib.import_module(f"mlip_cli.{name}".removesuffix(".__init__"))
