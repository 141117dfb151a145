"""Files of installed packages, read without importing the packages, which would take seconds."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from mlip_cli.errors import RunError

NAMES_OF_PIP = {"open_clip": "open_clip_torch"}
"""Packages that pip knows by another name."""


ALONE = "mlip_cli_open_clip"
"""Name of a package with open_clip's modules and without what importing open_clip does."""


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
    """One module of open_clip, with those that it imports itself, unless the whole package is loaded already."""
    if f"open_clip.{name}" in sys.modules:
        return sys.modules[f"open_clip.{name}"]
    if ALONE not in sys.modules:
        bare = ModuleType(ALONE)
        bare.__path__ = [str(package_folder("open_clip"))]
        sys.modules[ALONE] = bare
    return importlib.import_module(f"{ALONE}.{name}")
