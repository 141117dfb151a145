"""Folders of pictures whose captions are the names of the folders that they lie in."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from mlip_cli.data.sources.classes import ClassFolders
from mlip_cli.data.sources.records import Caption, PicturePlace, Record
from mlip_cli.data.sources.wordnet import WNID


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
