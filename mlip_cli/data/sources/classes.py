"""Which folders of a tree are classes: for preparing data and for evaluation alike."""

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlip_cli.data.sources.class_levels import (
    Folder,
    Step,
    are_letters,
    below_wrappers,
    descended,
    groups,
    inside_of,
    is_mixed,
    path_of,
    split_and_class,
    split_folders,
    tree_of,
)
from mlip_cli.data.sources.class_names import NAMES_FILE, class_names, doubts_about, one_line, some
from mlip_cli.data.sources.listing import (
    PassedOver,
    is_leftover,
    is_picture,
    is_table,
    is_unread_picture,
    kind_of,
    number_order,
)
from mlip_cli.errors import RunError, UsageError
from mlip_cli.files import read_lines
from mlip_cli.paths import check_utf8, escaped
from mlip_cli.terminal.output import plural, say, warn


@dataclass(frozen=True)
class ClassFolders:
    """The classes of a tree of pictures."""

    steps: tuple[Step, ...]
    """The folders above the classes, from the root down."""
    names: Mapping[str, str]
    """Folder -> name of the class, in the order of the classes."""
    num_pictures: int
    """Pictures in class folders, of the kinds that are read."""
    passed_over: PassedOver
    empty: tuple[str, ...]
    """Class folders without a picture."""
    names_file: str | None
    """What names the classes, relative to the root."""
    splits: tuple[str, ...]
    """Folders of several splits, the best to evaluate on first; none where the classes are those of one split."""
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Class folder -> the folders inside, where all classes have several and no other pictures."""

    def place(self, picture: str) -> tuple[str | None, str | None]:
        """Split and class folder of a picture; no class folder if it lies in none."""
        return split_and_class(self.steps, self.names, folder_of(picture))

    @property
    def wrapper(self) -> str | None:
        """The folder that holds the class folders, such as `images/`, or "" for the root; None for several splits."""
        return path_of(self.steps)

    def in_words(self) -> str:
        """`60 pictures in 2 classes: cat, dog`, with the folder that they lie in."""
        classes = plural(len(self.names), "class", "classes")
        where = f" in {escaped(self.wrapper)}" if self.wrapper else ""
        return f"{plural(self.num_pictures, 'picture')} in {classes}{where}: {some(self.names.values())}"

    def tell(self, place: str) -> None:
        """Say what names the classes, as in `classnames.txt: 1 = rose, 2 = tulip ...`, and warn of what is doubtful."""
        if self.names_file:
            pairs = [f"{escaped(folder)} = {name}" for folder, name in self.names.items()]
            say(f"{place}: {self.names_file}: {some(pairs)}")
        for caution in doubts_about(self.names):
            warn(f"{place}: {caution}")
        for folder, inside in list(self.groups.items())[:1]:
            held = f"{escaped(folder)}: {some(list(map(escaped, inside)))}"
            cure = "if those are the classes, move them up to one folder"
            warn(f"{place}: each class holds folders of pictures ({held}); {cure}")


def find_classes(root: Path, files: Sequence[str], *, place: str) -> ClassFolders:
    """The classes of a tree. `files` are all its files relative to `root`, without leftovers; `place` begins messages.

    A class is a folder with pictures, below folders of splits and below folders that wrap all the others.

    Raises:
        UsageError: there are fewer than two classes, the folders are parts of a data set, or a name is not text.
        RunError: most of the pictures are of unread kinds, or lie in no class.
    """
    top = tree_of(Counter(folder_of(name) for name in files if is_picture(name) or is_unread_picture(name)))
    steps, level = descended(top)
    folders = number_order([*level, *_empty(root, files, steps, level)])
    names_file = _names_file(steps, files)
    given = None if names_file is None else read_lines(root / names_file)
    if given is None or len(given) != len(folders) or len(folders) < 2:
        _refuse_parts(place, steps, level)
        _refuse_letters(place, level)
        folders = [name for name in folders if not is_mixed(name)]
        _check_number(root, place, files, level, top.total)
    if given is not None and len(given) != len(folders):
        raise UsageError(
            f"{root / str(names_file)}: {len(given)} names for {len(folders)} class folders; write one name a line, in "
            "the order of the folders"
        )
    _check_names(place, folders)
    names = class_names(folders) if given is None else dict(zip(folders, map(one_line, given), strict=True))
    classes = {folder: split_and_class(steps, names, folder)[1] for folder in set(map(folder_of, files))}
    num_pictures, passed_over = count_pictures(place, files, lambda name: classes[folder_of(name)])
    full = {classes[folder_of(name)] for name in filter(is_picture, files)}
    empty = tuple(folder for folder in folders if folder not in full)
    splits = split_folders(steps, [folder for folder, name in classes.items() if name is not None])
    grouped = groups(level)
    grouped = grouped if grouped.keys() >= set(folders) - set(empty) else {}
    return ClassFolders(steps, names, num_pictures, passed_over, empty, names_file, splits, grouped)


def folder_of(file: str) -> str:
    """`train/dog` of train/dog/x.jpg; "" for a file in no folder."""
    return file.rpartition("/")[0]


def _names_file(steps: Sequence[Step], files: Collection[str]) -> str | None:
    """The classnames.txt that lies beside the class folders, else the nearest one above."""
    above = (path for end in range(len(steps), -1, -1) if (path := path_of(steps[:end])) is not None)
    return next((path + NAMES_FILE for path in above if path + NAMES_FILE in files), None)


def _empty(root: Path, files: Sequence[str], steps: Sequence[Step], level: Collection[str]) -> list[str]:
    """Folders beside the class folders in which there is no file at all: classes without pictures."""
    path = path_of(steps)
    if path is None or not level:
        return []
    full = {name[len(path) :].partition("/")[0] for name in files if name.startswith(path)}
    with os.scandir(root / path) as entries:
        return [e.name for e in entries if e.is_dir() and e.name not in full and not is_leftover(e.name)]


def _refuse_parts(place: str, steps: Sequence[Step], level: Mapping[str, Sequence[Folder]]) -> None:
    """Refuse folders which hold the same folders: amazon, dslr and webcam are not classes.

    Raises:
        UsageError: they do.
    """
    inside = [set(below_wrappers(folders)) for folders in level.values()]
    same = set.intersection(*inside) if len(inside) > 1 else set()
    if len(same) > 1 and 2 * len(same) >= len(set.union(*inside)):
        above = "".join(f"{next(iter(step))}/" for step in steps)  # of several splits the first
        names = some([escaped(name) for name in sorted(level)])
        raise UsageError(
            f"{place}: {names} hold the same folders ({some(sorted(map(escaped, same)))}), so they are parts of a "
            f"data set and not classes; name one, such as {place.rstrip('/')}/{above}{escaped(min(level))}; if they "
            f"are classes, name them in {NAMES_FILE}"
        )


def _refuse_letters(place: str, level: Mapping[str, Sequence[Folder]]) -> None:
    """Refuse the letters of a/abbey, a/alley, b/barn.

    Raises:
        UsageError: all folders are letters.
    """
    if are_letters(level):
        names = sorted(level)
        example = f"{names[0]}/{escaped(min(inside_of(level[names[0]])))}"
        raise UsageError(
            f"{place}: {some(names)} are letters above the classes ({example}) and not classes; move the classes up to "
            "one folder"
        )


def _check_number(
    root: Path, place: str, files: Sequence[str], level: Mapping[str, Sequence[Folder]], num_pictures: int
) -> None:
    """Refuse a tree that does not hold several classes.

    Raises:
        UsageError: fewer than two folders can be classes.
    """
    if sum(not is_mixed(name) for name in level) > 1:
        return
    cure = f"make one folder for each class in {root}/"
    if not num_pictures:
        raise UsageError(f"{place}: no pictures; {cure}")
    stems = {name.rpartition(".")[0] for name in files if is_picture(name) or is_unread_picture(name)}
    tables = [name for name in files if is_table(name) and name.rpartition(".")[0] not in stems]
    beside = [escaped(name) for name in tables if name.count("/") < 2]
    cure += f", or name the file that says what they show ({some(beside)})" if beside else ""
    if not level:
        raise UsageError(f"{place}: pictures outside of class folders; {cure}")
    where = f"the folder{'s' if len(level) > 1 else ''} {some([escaped(name) for name in sorted(level)])}"
    held = plural(sum(folder.total for folders in level.values() for folder in folders), "picture")
    raise UsageError(f"{place}: {held} in {where}, not in folders of several classes; {cure}")


def _check_names(place: str, folders: Sequence[str]) -> None:
    """Refuse names that cannot be read.

    Raises:
        UsageError: a name is not UTF-8, or has no sign that can be read.
    """
    for folder in folders:
        check_utf8(folder, place=f"{place}: ")
        if not folder.replace("_", " ").strip():
            raise UsageError(f"{place}: a class folder called {folder!r}; give it a name that can be read")


def first_folder(file: str) -> str | None:
    """`dog` of dog/old/x.jpg; None for a file in no folder."""
    first, slash, _ = file.partition("/")
    return first if slash else None


def count_pictures(place: str, files: Iterable[str], class_of: Callable[[str], str | None]) -> tuple[int, PassedOver]:
    """Pictures in classes, and what is passed over, of all files. `class_of`: file -> class folder.

    Raises:
        RunError: most pictures are passed over.
    """
    passed_over, others, num_pictures = PassedOver(), PassedOver(), 0
    for name in files:
        folder = class_of(name)
        if is_picture(name) and folder is None:
            passed_over.add("pictures in no class folder", name)
        elif is_picture(name):
            num_pictures += 1
        elif is_unread_picture(name):
            passed_over.add(kind_of(name), name)
        elif folder is not None:
            others.add(kind_of(name), name)
    num_unread = sum(passed_over.counts.values())
    if num_unread > num_pictures:
        share = f"{num_unread:,} of {plural(num_unread + num_pictures, 'picture')} cannot be used"
        raise RunError(f"{place}: {share}: {passed_over.in_words()}; convert them to JPEG or PNG, in class folders")
    passed_over.update(others)
    return num_pictures, passed_over
