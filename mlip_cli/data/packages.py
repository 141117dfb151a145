"""Files of installed packages, read without importing the packages, which would take seconds."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from mlip_cli.errors import RunError

NAMES_OF_PIP = {"open_clip": "open_clip_torch"}
"""Packages that pip knows by another name."""


def package_folder(name: str) -> Path:
    """The folder of an installed package, found without importing it.

    Raises:
        RunError: it is not installed.
    """
    package = importlib.util.find_spec(name)
    if package is None or package.origin is None:
        raise RunError(f"{name} is not installed; pip install {NAMES_OF_PIP.get(name, name)}")
    return Path(package.origin).parent


def open_clip_module(name: str) -> ModuleType:
    """One module of open_clip, loaded from its file alone unless the whole package is loaded already."""
    if f"open_clip.{name}" in sys.modules:
        return sys.modules[f"open_clip.{name}"]
    file = package_folder("open_clip") / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"mlip_cli_open_clip_{name}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
