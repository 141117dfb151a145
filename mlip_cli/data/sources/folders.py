"""Folders of pictures: captions in .txt files beside them, or in the names of the folders they lie in."""

import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlip_cli.data.sources.records import Caption, PicturePlace, Record, decode_text, split_of_folder

MAX_SIDECAR_BYTES = 1 << 20


def sidecar_records(root: Path, images: Sequence[str]) -> Iterator[Record]:
    """One record a picture. Its caption is the whole of the .txt file of the same name."""
    for image in images:
        text, reason = _read_sidecar((root / image).with_suffix(".txt"))
        yield Record(
            file=image,
            row=0,
            picture=PicturePlace(str(root / image)),
            captions=() if text is None else (Caption(text),),
            split=split_of_folder(Path(image))[0],
            reject=reason,
            detail=str(Path(image).with_suffix(".txt")) if reason else "",
        )


def class_records(root: Path, images: Sequence[str]) -> Iterator[Record]:
    """One record a picture. Class and caption are the name of its folder, with spaces for underscores."""
    for image in images:
        folder = class_folder(image)
        words = " ".join(folder.replace("_", " ").split()) if folder else None
        yield Record(
            file=image,
            row=0,
            picture=PicturePlace(str(root / image)),
            captions=() if words is None else (Caption(words),),
            split=split_of_folder(Path(image))[0],
            label=words,
            reject=None if folder else "not in a class folder",
        )


def class_folder(image: str) -> str | None:
    """`train/dog/old/x.jpg` -> `dog`: the first folder under the split, or None for a picture in no folder."""
    _, relative = split_of_folder(Path(image))
    return relative.parts[0] if len(relative.parts) > 1 else None


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
    return (None, "caption is not UTF-8") if text is None else (text, None)
