"""An evaluation set that was found, and the files in its folders."""

from dataclasses import dataclass
from pathlib import Path

from mlip_cli.data.sources.classes import ClassFolders, find_classes
from mlip_cli.data.sources.file_names import names_below
from mlip_cli.data.sources.listing import is_leftover
from mlip_cli.errors import UsageError
from mlip_cli.files import read_lines
from mlip_cli.paths import escaped


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

    @property
    def words(self) -> str:
        """The name for messages."""
        return escaped(self.name)


def names_in(folder: Path) -> list[str]:
    """All files anywhere under `folder`, relative to it and sorted, without hidden files and leftovers."""
    return list(names_below(folder))


def folders_in(folder: Path) -> list[str]:
    """Names of the folders in `folder`, sorted, without hidden ones and leftovers."""
    return sorted(child.name for child in folder.iterdir() if child.is_dir() and not is_leftover(child.name))


def templates_in(path: Path) -> tuple[str, ...]:
    """The templates of a file, one a line.

    Raises:
        UsageError: there are none, or one has no place for the class name.
    """
    templates = read_lines(path)
    wrong = [template for template in templates if "{c}" not in template]
    if wrong or not templates:
        what = f"{wrong[0]!r} has no {{c}}" if wrong else "no templates"
        raise UsageError(f"{path}: {what}; write one template a line, with {{c}} for the class name")
    return tuple(templates)


def classes_in(name: str, folder: Path) -> ClassFolders:
    """The classes of the evaluation set `folder:PATH`.

    Raises:
        UsageError: the folder holds several splits of a data set, or no classes (see `find_classes`).
        RunError: most of its pictures cannot be used.
    """
    place = escaped(name)
    found = find_classes(folder, names_in(folder), place=place)
    if found.splits:
        words, first = " and ".join(map(escaped, found.splits)), f"{place.rstrip('/')}/{escaped(found.splits[0])}"
        if len(found.splits) == 1:
            raise UsageError(f"{place}: {words} is a split of a data set and not a class; name {first}")
        raise UsageError(
            f"{place}: {words} are splits of a data set and not classes; name one of them, such as {first}"
        )
    return found
