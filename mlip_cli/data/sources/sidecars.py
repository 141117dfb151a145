"""Pictures with a text each: beside the picture, or in a folder beside that of the pictures."""

import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from mlip_cli.data.sources.listing import PICTURE_ENDINGS
from mlip_cli.data.sources.records import Caption, PicturePlace, Record, decode_text, split_of_folder

MAX_SIDECAR_BYTES = 1 << 20
TEXT_ENDINGS = (".txt", ".caption")
NO_CAPTIONS = {"labels"}
"""Folders of texts that are no captions: the boxes of object detection lie there."""


def sidecars_of(files: Iterable[str]) -> dict[str, str]:
    """Picture -> its text: `x.txt` or `x.jpg.txt` beside `x.jpg`, or `captions/x.txt` for `images/x.jpg`.

    A text belongs to one picture. In another folder it must be the only one of its name, and so must the picture.
    """
    names = set(files)
    pictures = sorted(name for name in names if name.rpartition(".")[2].lower() in PICTURE_ENDINGS)
    found = {}
    for picture in pictures:
        stems = (picture.rpartition(".")[0], picture)
        text = next((text for end in TEXT_ENDINGS for stem in stems if (text := stem + end) in names), None)
        if text:
            found[picture] = text
    lonely = [picture for picture in pictures if picture not in found]
    texts = names.difference(found.values())
    texts = {name for name in texts if name.endswith(TEXT_ENDINGS) and not NO_CAPTIONS & set(name.split("/"))}
    return found | _in_other_folders(lonely, texts) if lonely and texts else found


def sidecar_records(root: Path, images: Sequence[str], sidecars: Mapping[str, str]) -> Iterator[Record]:
    """One record a picture. Its caption is the whole of its text, or each line is one where no line is empty."""
    for image in images:
        sidecar = sidecars.get(image) or str(Path(image).with_suffix(".txt"))
        text, reason = _read_sidecar(root / sidecar)
        yield Record(
            file=image,
            row=0,
            picture=PicturePlace(str(root / image)),
            captions=() if text is None else tuple(map(Caption, caption_lines(text))),
            split=split_of_folder(Path(image))[0],
            reject=reason,
            detail=sidecar if reason else "",
        )


def caption_lines(text: str) -> list[str]:
    """The captions of a text: its lines if there are several and none of them is empty, else the whole."""
    lines = text.strip().splitlines()
    return lines if len(lines) > 1 and all(line.strip() for line in lines) else [text]


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


def _without_a_folder(name: str) -> Iterator[tuple[int, str]]:
    """`a/b/x.jpg` -> (0, `b/x`), (1, `a/x`)."""
    *folders, base = PurePosixPath(name).parts
    stem = base.rpartition(".")[0]
    for place in range(len(folders)):
        yield place, "/".join([*folders[:place], *folders[place + 1 :], stem])


def _read_sidecar(path: Path) -> tuple[str | None, str | None]:
    """(caption, None) or (None, reason)."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            return None, "caption is not a file"
        if status.st_size > MAX_SIDECAR_BYTES:
            return None, "caption too long"
        text = decode_text(path.read_bytes())
    except FileNotFoundError:
        return None, "no caption"
    except OSError:  # no permission, a loop of links, a bad disk block
        return None, "caption cannot be read"
    return (None, "caption is not UTF-8") if text is None else (text, None)
