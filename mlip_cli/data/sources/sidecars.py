"""Pictures with a text each: beside the picture, or in a folder beside that of the pictures."""

import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from mlip_cli.data.sources.captions import captions_of_text
from mlip_cli.data.sources.class_levels import splits_in
from mlip_cli.data.sources.listing import is_picture
from mlip_cli.data.sources.records import MAX_TEXT_BYTES, PicturePlace, Record, decode_text

TEXT_ENDINGS = (".txt", ".caption")
NO_CAPTIONS = {"labels"}
"""Folders of texts that are not captions: the boxes of object detection lie there."""


def sidecars_of(files: Iterable[str]) -> dict[str, str]:
    """Picture -> its text: `x.txt` or `x.jpg.txt` beside `x.jpg`, or `captions/x.txt` for `images/x.jpg`.

    A text belongs to one picture. In another folder it must be the only one of its name, and so must the picture.
    """
    names = set(files)
    pictures = sorted(name for name in names if is_picture(name))
    found = {}
    for picture in pictures:
        stems = (picture.rpartition(".")[0], picture)
        text = next((text for end in TEXT_ENDINGS for stem in stems if (text := stem + end) in names), None)
        if text:
            found[picture] = text
    texts = {name for name in names.difference(found.values()) if name.lower().endswith(TEXT_ENDINGS)}
    by_key = {_key(text): text for text in texts}
    for picture in pictures if texts else ():
        keys = (_key(stem + end) for end in TEXT_ENDINGS for stem in (picture.rpartition(".")[0], picture))
        if picture not in found and (other := next((by_key[key] for key in keys if key in by_key), None)):
            found[picture] = other
    lonely = [picture for picture in pictures if picture not in found]
    texts = {name for name in texts.difference(found.values()) if not NO_CAPTIONS & set(name.split("/"))}
    return found | _in_other_folders(lonely, texts) if lonely and texts else found


def sidecar_records(root: Path, images: Sequence[str], sidecars: Mapping[str, str]) -> Iterator[Record]:
    """One record a picture. Its caption is the whole of its text, or each line is one where no line is empty."""
    splits = splits_in(images)
    for image in images:
        sidecar = sidecars.get(image) or str(Path(image).with_suffix(".txt"))
        text, reason = _read_sidecar(root / sidecar)
        yield Record(
            file=image,
            row=0,
            picture=PicturePlace(str(root / image)),
            captions=() if text is None else captions_of_text(text),
            split=splits[image],
            reject=reason,
            detail=sidecar if reason else "",
        )


def _in_other_folders(pictures: Iterable[str], texts: Iterable[str]) -> dict[str, str]:
    """Pictures and texts whose paths differ in one folder, where this is clear."""
    candidates: dict[tuple[int, str], list[str]] = {}
    for text in texts:
        for place, key in _without_a_folder(text):
            candidates.setdefault((place, key), []).append(text)
    matches = {}
    for picture in pictures:
        fitting = {
            text
            for name in (picture, f"{picture}.")  # x.txt and x.jpg.txt
            for place in _without_a_folder(name)
            for text in candidates.get(place, ())
        }
        if len(fitting) == 1:
            matches[picture] = fitting.pop()
    owners = Counter(matches.values())
    return {picture: text for picture, text in matches.items() if owners[text] == 1}


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


def _read_sidecar(path: Path) -> tuple[str | None, str | None]:
    """(caption, None) or (None, reason)."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            return None, "caption is not a file"
        if status.st_size > MAX_TEXT_BYTES:
            return None, "caption too long"
        text = decode_text(path.read_bytes())
    except FileNotFoundError:
        return None, "no caption"
    except OSError:  # no permission, a loop of links, a bad disk block
        return None, "caption cannot be read"
    return (None, "caption is not UTF-8") if text is None else (text, None)
