"""An evaluation set that was found, and the files in its folders."""

from dataclasses import dataclass
from pathlib import Path

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


@dataclass(frozen=True)
class Benchmark:
    """An evaluation set that was found."""

    name: str
    """As the user gave it."""
    kind: str
    """How it is stored: a key of `open.OPENERS`."""
    root: Path
    """The folder that holds it. For digits, which scikit-learn brings along, the current folder."""
    fingerprint: str
    """Changes when the data, the class names or the templates change."""


def class_folders(folder: Path) -> list[Path]:
    """Folders in `folder` in the order of their classes: by name, without hidden ones."""
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def pictures_in(folder: Path) -> list[Path]:
    """Picture files anywhere under `folder`, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file())
