"""Folders of pictures whose captions are the names of the folders that they lie in."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from mlip_cli.data.sources.records import Caption, PicturePlace, Record, split_of_folder


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
