"""Folders of pictures: captions in .txt files beside them, or in the names of the folders they lie in."""

import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlip_cli.data.sources.classes import ClassFolders
from mlip_cli.data.sources.records import Caption, PicturePlace, Record, decode_text, split_of_folder
from mlip_cli.data.sources.wordnet import WNID

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


def class_records(root: Path, images: Sequence[str], classes: ClassFolders) -> Iterator[Record]:
    """One record a picture. Its class and its caption are the name of its class folder."""
    for image in images:
        split, folder = classes.place(image)
        name = None if folder is None else classes.names[folder]
        yield Record(
            file=image,
            row=0,
            picture=PicturePlace(str(root / image)),
            captions=() if name is None else (Caption(name),),
            split=split,
            label=name,
            meta={"wnid": folder} if folder and WNID.fullmatch(folder) else {},
            reject=None if folder else "not in a class folder",
        )


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
