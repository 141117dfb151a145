"""The levels of a tree of pictures: folders of splits, folders that wrap others, and the folders below."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from mlip_cli.data.sources.records import split_in_name, split_of_folder, split_of_name

NO_CLASS = re.compile(
    "(?:image|img|picture|pic|photo|data|dataset|jpg|jpeg|png|jpegimage|rgb|raw|file|frame|thumb|thumbnail|mask|label|"
    "annotation|segmentation|caption|part|batch|chunk|shard|folder|unlabell?ed)s?"
)
"""Folders that hold pictures of all kinds, without numbers and signs: images, img_2, part-001."""

Step = Mapping[str, str | None]
"""Folders above the classes, of one level: name -> split, or None for a folder that only wraps the others."""


@dataclass(slots=True)
class Folder:
    """A folder, with the number of pictures in it and below it; those of unread kinds count too."""

    total: int = 0
    folders: dict[str, "Folder"] = field(default_factory=dict)


def tree_of(counts: Mapping[str, int]) -> Folder:
    """The folders, from the number of pictures directly in each."""
    top = Folder()
    for name, num_pictures in counts.items():
        folder = top
        folder.total += num_pictures
        for part in name.split("/") if name else ():
            folder = folder.folders.setdefault(part, Folder())
            folder.total += num_pictures
    return top


def descended(top: Folder) -> tuple[tuple[Step, ...], dict[str, list[Folder]]]:
    """The steps from the root to the folders that may be classes, and those folders; of splits all together."""
    steps: list[Step] = []
    level = inside_of([top])
    while step := _splits(level) or _wrapper(level):
        steps.append(step)
        level = inside_of([folder for name in step for folder in level[name]])
    return tuple(steps), level


def inside_of(folders: Sequence[Folder]) -> dict[str, list[Folder]]:
    """The folders in `folders` by name."""
    found: dict[str, list[Folder]] = {}
    for folder in folders:
        for name, own in folder.folders.items():
            found.setdefault(name, []).append(own)
    return found


def _splits(level: Mapping[str, Sequence[Folder]]) -> dict[str, str | None]:
    """Folders of splits among others, by their names; a class `train` beside `bus` has no folders inside."""
    found: dict[str, str | None] = {name: split for name in level if (split := split_of_name(name))}
    loose: dict[str, str | None] = {name: split for name in level if (split := split_in_name(name))}
    if len(found) < len(level) == len(loose) and len(set(loose.values())) > 1:  # cars_train, cars_test
        return loose
    inside = inside_of([folder for name in found for folder in level[name]])
    return found if len(found) == len(level) or len(inside) > 1 else {}


def _wrapper(level: Mapping[str, Sequence[Folder]]) -> dict[str, str | None]:
    """The one folder with folders inside, where all others hold pictures of all kinds, such as thumbnails."""
    full = [name for name, folders in level.items() if inside_of(folders)]
    is_one = len(full) == 1 and (len(level) == 1 or all(map(is_mixed, level)))
    return {full[0]: None} if is_one else {}


def is_mixed(name: str) -> bool:
    """Whether a folder of this name holds pictures of all kinds."""
    return bool(NO_CLASS.fullmatch(re.sub(r"[\W\d_]+", "", name.lower())))


def path_of(steps: Sequence[Step]) -> str | None:
    """`images/CUB/`, or None where a step has several folders."""
    return "".join(f"{name}/" for step in steps for name in step) if all(len(step) == 1 for step in steps) else None


def split_and_class(steps: Sequence[Step], names: Collection[str], folder: str) -> tuple[str | None, str | None]:
    """Split and class of the files in a folder."""
    split, parts = None, folder.split("/")
    for depth, step in enumerate(steps):
        if depth == len(parts) or parts[depth] not in step:
            return split, None
        split = step[parts[depth]] or split
    return split, next((name for name in parts[len(steps) : len(steps) + 1] if name in names), None)


def splits_in(files: Iterable[str]) -> Callable[[str], str | None]:
    """What tells the split of each file, by a folder at the top or below folders that wrap all the others."""
    steps, _ = descended(tree_of(Counter(name.rpartition("/")[0] for name in files)))

    @lru_cache
    def split_of(folder: str) -> str | None:
        return split_of_folder(Path(folder, "file"))[0] or split_and_class(steps, (), folder)[0]

    return lambda name: split_of(name.rpartition("/")[0])


def split_folders(steps: Sequence[Step], folders: Iterable[str]) -> tuple[str, ...]:
    """The folders of the first step that has several. Those without class folders are left out."""
    depth = next((depth for depth, step in enumerate(steps) if len(step) > 1), None)
    if depth is None:
        return ()
    order = {"validation": 0, "test": 1, "train": 2}
    full = {tuple(folder.split("/")[: depth + 1]) for folder in folders}
    ranked = sorted(full, key=lambda path: (order[steps[depth][path[-1]] or "train"], path))
    return tuple("/".join(path) for path in ranked)


def below_wrappers(folders: Sequence[Folder]) -> Mapping[str, Sequence[Folder]]:
    """The folders in `folders`, or where that is one with folders inside, those."""
    inside = inside_of(folders)
    while len(inside) == 1 and (deeper := inside_of(*inside.values())):
        inside = deeper
    return inside


def groups(level: Mapping[str, Sequence[Folder]]) -> dict[str, list[str]]:
    """Folders whose pictures all lie in several folders inside, and the names of these."""
    found = {}
    for name, folders in level.items():
        inside = inside_of(folders)
        num_deeper = sum(folder.total for own in inside.values() for folder in own)
        if len(inside) > 1 and num_deeper == sum(folder.total for folder in folders):
            found[name] = sorted(inside)
    return found


def are_letters(level: Mapping[str, Sequence[Folder]]) -> bool:
    """Whether folders are an index of those inside, as in a/abbey, a/alley, b/barn."""
    return bool(level) and all(
        len(name) == 1 and inside and all(inner.lower().startswith(name.lower()) and inner != name for inner in inside)
        for name, inside in ((name, inside_of(folders)) for name, folders in level.items())
    )
