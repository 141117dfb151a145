"""What classes are called: one way from the name of a folder to the name of its class, for every command."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from mlip_cli.data.sources.wordnet import WNID, english_name

NAMES_FILE = "classnames.txt"
"""One class name a line, in the order of the folders."""
IDS = (re.compile(r"n[0-9]{8}[-_. ]+(?=.*[^\W\d_])"), re.compile(r"[0-9]+[-_. ]+(?=.*[^\W\d_])"))
"""What stands before the words in n02085620-Chihuahua and 001.Black_footed_Albatross."""
SAYS_NOTHING = re.compile(r"(?:[a-z]|class|label|category|id)?[\W\d_]*\d[\W\d_]*", re.IGNORECASE)
"""Numbers, dates, class_7, c0, WordNet ids."""
MOST_SHOWN = 3


def class_names(folders: Sequence[str]) -> dict[str, str]:
    """Folder -> name of the class: spaces for underscores, English for WordNet ids.

    An id before the words goes where all folders have one.
    """
    ids = next((ids for ids in IDS if all(map(ids.match, folders))), None)
    return {folder: _words(ids.sub("", folder, count=1) if ids else folder) for folder in folders}


def _words(folder: str) -> str:
    if WNID.fullmatch(folder):
        return english_name(folder) or folder
    return one_line(folder.replace("_", " "))


def one_line(name: str) -> str:
    """`name` in normal form C, with one space in the place of spaces, line breaks and control characters."""
    signs = (" " if unicodedata.category(sign) == "Cc" else sign for sign in name)
    return unicodedata.normalize("NFC", " ".join("".join(signs).split()))


def some(names: Collection[str]) -> str:
    """The first three of them."""
    return ", ".join(list(names)[:MOST_SHOWN]) + (" ..." if len(names) > MOST_SHOWN else "")


def doubts_about(names: Mapping[str, str]) -> list[str]:
    """What is doubtful about the names of classes (by folder), a sentence each."""
    alike = defaultdict(list)
    for folder, name in names.items():
        alike[unicodedata.normalize("NFKC", name).casefold()].append(folder)
    found = [
        f"{' and '.join(map(ascii, folders))} read alike, as {names[folders[0]]!r}; make them one class, or rename one"
        for folders in alike.values()
        if len(folders) > 1
    ]
    if nothing := [name for name in names.values() if SAYS_NOTHING.fullmatch(name)]:
        found.append(
            f"{len(nothing)} of {len(names)} class names say nothing about the pictures ({some(nothing)}); write "
            f"{NAMES_FILE}, one name a line in the order of the folders"
        )
    return found
