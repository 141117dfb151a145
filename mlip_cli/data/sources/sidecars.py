"""Pictures with a text each: beside the picture, or in a folder beside that of the pictures."""

import os
import stat
import unicodedata
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from mlip_cli.data.sources.captions import captions_of_text
from mlip_cli.data.sources.class_levels import splits_in
from mlip_cli.data.sources.file_names import ChosenNames, FileNames, KeyIndex
from mlip_cli.data.sources.listing import is_picture
from mlip_cli.data.sources.records import MAX_TEXT_BYTES, PicturePlace, Record
from mlip_cli.data.sources.text_tables import decode_text

TEXT_ENDINGS = (".txt", ".caption")
NO_TEXT = -1
NO_CAPTIONS = {"labels"}
"""Folders of texts that are not captions: the boxes of object detection lie there."""


@dataclass(frozen=True)
class Sidecars:
    """The pictures of a folder and the text of each: 8 bytes a picture and one a file beside the names."""

    names: FileNames
    """Of all files."""
    pictures: "array[int]"
    """Places of the pictures in `names`."""
    texts: "array[int]"
    """Place of the text of each picture, or NO_TEXT."""
    is_used: bytearray
    """Of each file, 1 if it is the text of a picture."""

    def __len__(self) -> int:
        return len(self.pictures) - self.texts.count(NO_TEXT)

    def pairs(self) -> Iterator[tuple[str, str | None]]:
        """Each picture and its text."""
        for picture, text in zip(self.pictures, self.texts, strict=True):
            yield self.names[picture], None if text == NO_TEXT else self.names[text]

    def where(self, is_wanted: Callable[[str], bool]) -> "Sidecars":
        """The same with some of the pictures."""
        numbers = [number for number, (picture, _) in enumerate(self.pairs()) if is_wanted(picture)]
        pictures, texts = (array(own.typecode, map(own.__getitem__, numbers)) for own in (self.pictures, self.texts))
        return replace(self, pictures=pictures, texts=texts)

    def endings(self) -> list[str]:
        """The endings of the texts, sorted."""
        return sorted({PurePosixPath(text).suffix for _, text in self.pairs() if text is not None})

    def give(self, number: int, text: int) -> None:
        """Note the text of a picture."""
        self.texts[number] = text
        self.is_used[text] = True

    def lonely(self) -> Iterator[int]:
        """The numbers of the pictures without a text."""
        return (number for number, text in enumerate(self.texts) if text == NO_TEXT)

    def free_texts(self) -> Iterator[int]:
        """The places of the texts that are those of no picture."""
        return (
            place
            for place, name in enumerate(self.names)
            if not self.is_used[place] and name.lower().endswith(TEXT_ENDINGS)
        )


def sidecars_of(names: FileNames) -> Sidecars:
    """Pictures and their texts: `x.txt` or `x.jpg.txt` beside `x.jpg`, or `captions/x.txt` for `images/x.jpg`.

    A text belongs to one picture. In another folder it must be the only one of its name, and so must the picture.
    """
    pictures = names.where(is_picture).places
    found = Sidecars(names, pictures, array("i", [NO_TEXT]) * len(pictures), bytearray(len(names)))
    if next(found.free_texts(), None) is None:
        return found
    for number, place in enumerate(pictures):
        beside = names.beside(place, f"{_stem(names[place])}.")
        text = next((beside[text] for text in _texts_of(names[place]) if text in beside), None)
        if text is not None:
            found.give(number, text)
    if next(found.lonely(), None) is not None and next(found.free_texts(), None) is not None:
        _give_other_spellings(found)
        _give_those_of_other_folders(found)
    return found


def _stem(picture: str) -> str:
    return picture.rpartition(".")[0]


def _texts_of(picture: str) -> Iterator[str]:
    """The names of its text, the likeliest first."""
    return (start + end for end in TEXT_ENDINGS for start in (_stem(picture), picture))


def sidecar_records(root: Path, sidecars: Sidecars) -> Iterator[Record]:
    """One record a picture. Its caption is the whole of its text, or each line is one where no line is empty."""
    split_of = splits_in(ChosenNames(sidecars.names, sidecars.pictures))
    for image, beside in sidecars.pairs():
        sidecar = beside or f"{_stem(image)}.txt"
        text, reason = _read_sidecar(os.path.join(root, sidecar))
        yield Record(
            file=image,
            row=0,
            picture=PicturePlace(os.path.join(root, image)),
            captions=() if text is None else captions_of_text(text),
            split=split_of(image),
            reject=reason,
            detail=sidecar if reason else "",
        )


def _give_other_spellings(found: Sidecars) -> None:
    """Give pictures the texts whose names differ in case of the ending or in Unicode normal form."""
    names = found.names
    texts = KeyIndex((_key(names[place]), place) for place in found.free_texts())
    for number in found.lonely():
        for key in map(_key, _texts_of(names[found.pictures[number]])):
            if fitting := [place for place in texts.places_of(key) if _key(names[place]) == key]:
                found.give(number, fitting[-1])
                break


def _give_those_of_other_folders(found: Sidecars) -> None:
    """Give pictures the texts whose paths differ in one folder, where this is clear."""
    names = found.names
    texts = KeyIndex(
        (key, place)
        for place in found.free_texts()
        if NO_CAPTIONS.isdisjoint(names[place].split("/"))
        for key in _without_a_folder(names[place])
    )
    matches, num_owners = array("I"), bytearray(len(names))
    numbers = array("I")
    for number in found.lonely():
        picture = names[found.pictures[number]]
        keys = {key for name in (picture, f"{picture}.") for key in _without_a_folder(name)}  # x.txt and x.jpg.txt
        fitting = {place for key in keys for place in texts.places_of(key) if key in _without_a_folder(names[place])}
        if len(fitting) == 1:
            place = fitting.pop()
            matches.append(place)
            numbers.append(number)
            num_owners[place] = min(2, num_owners[place] + 1)
    for number, place in zip(numbers, matches, strict=True):
        if num_owners[place] == 1:
            found.give(number, place)


def _key(name: str) -> str:
    """What the spellings of a name share: Unicode's normal forms, and an ending in upper or lower case."""
    stem, dot, ending = unicodedata.normalize("NFC", name).rpartition(".")
    return stem + dot + ending.lower()


def _without_a_folder(name: str) -> Iterator[tuple[int, str]]:
    """`a/b/x.jpg` -> (0, `b/x`), (1, `a/x`)."""
    *folders, base = PurePosixPath(_key(name)).parts
    stem = base.rpartition(".")[0]
    for place in range(len(folders)):
        yield place, "/".join([*folders[:place], *folders[place + 1 :], stem])


def _read_sidecar(path: str) -> tuple[str | None, str | None]:
    """(caption, None) or (None, reason)."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            return None, "caption is not a file"
        if status.st_size > MAX_TEXT_BYTES:
            return None, "caption too long"
        with open(path, "rb") as file:
            text = decode_text(file.read())
    except FileNotFoundError:
        return None, "no caption"
    except OSError:  # no permission, a loop of links, a bad disk block
        return None, "caption cannot be read"
    return (None, "caption is not UTF-8") if text is None else (text, None)
