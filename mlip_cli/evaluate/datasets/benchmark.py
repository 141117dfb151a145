"""An evaluation set that was found, and the files in its folders."""

from dataclasses import dataclass
from pathlib import Path

from mlip_cli.data.sources.listing import PICTURE_ENDINGS, is_leftover, number_order, walk


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
    """Folders in `folder` in the order of their classes: by name, or by number where all are numbers."""
    names = [child.name for child in folder.iterdir() if child.is_dir() and not is_leftover(child.name)]
    return [folder / name for name in number_order(names)]


def pictures_in(folder: Path) -> list[Path]:
    """Picture files anywhere under `folder`, sorted."""
    return sorted(path for path in walk(folder) if path.suffix[1:].lower() in PICTURE_ENDINGS)
