"""What a stranger gets: a wheel that finds its recipes, and a Makefile that explains itself."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mlip_cli.recipe.shipped import recipe_names

ROOT = Path(__file__).parents[1]


def tracked_files() -> list[str]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("needs a git checkout")
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tracked files."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in tracked_files():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_all_recipes_and_nothing_beside_the_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {name.removeprefix("mlip_cli/recipes/") for name in names if name.startswith("mlip_cli/recipes/")}
    recipes = {path.relative_to(ROOT / "recipes").as_posix() for path in (ROOT / "recipes").rglob("*.yaml")}
    assert {name for name in shipped if name.endswith(".yaml")} == recipes
    assert {f"{name}.yaml" for name in recipe_names()} <= recipes
    beside = {f"mlip_cli/{name}" for name in ("recipes/schema.json", "recipes/slurm.sbatch", "recipes/prepare.sbatch")}
    beside.add("mlip_cli/py.typed")
    assert beside | {"mlip_cli/data/index.py"} <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"mlip_cli"}


@pytest.mark.slow
def test_an_installed_wheel_finds_its_recipes(wheel: Path, tmp_path: Path) -> None:
    site, work = tmp_path / "site", tmp_path / "work"
    zipfile.ZipFile(wheel).extractall(site)
    work.mkdir()
    code = (
        "import mlip_cli\n"
        "from mlip_cli.recipe.load import load_recipe\n"
        "from mlip_cli.recipe.shipped import complete_override\n"
        "print(mlip_cli.__file__)\n"
        "print(load_recipe('recipes/openmoji.yaml').origins['optim.lr'])\n"
        "print(load_recipe('openmoji_clip').recipe.model.merging)\n"
        "print(*complete_override([], 'optim.l'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=work,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    package, origin, merging, completed = done.stdout.splitlines()
    assert package == str(site / "mlip_cli" / "__init__.py")
    assert origin.startswith(str(site / "mlip_cli" / "recipes" / "openmoji.yaml") + ":")
    assert (merging, completed) == ("None", "optim.lr= optim.layer_decay=")


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "VENV"}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_make_alone_lists_the_targets() -> None:
    listed = [line.split()[1] for line in make().stdout.splitlines() if line.startswith("  make ")]
    assert listed == [
        "help",
        "demo",
        "test",
        "test-quick",
        "smoke",
        "check",
        "format",
        "bench",
        "gpu",
        "ablation",
        "schema",
        "clean",
    ]


def test_make_says_which_python_it_needs(tmp_path: Path) -> None:
    done = make("demo", "PYTHON=python-of-long-ago", f"VENV={tmp_path / 'venv'}")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[0] == (
        "error: python-of-long-ago: not a Python of version 3.11 or newer; name one: make PYTHON=/path/to/python3.11"
    )
    assert not (tmp_path / "venv").exists()


def test_every_promise_of_contributing_names_tests_that_exist() -> None:
    document = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = document.split("| promise | test |\n")[1].split("\n\n")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines()[1:] if "**" not in line]
    assert len(rows) > 50
    for promise, tests in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", tests)
        assert named, f"{promise}: names no test"
        for file, name in named:
            source = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert f"\ndef {name}(" in source, f"{promise}: {file} has no {name}"
