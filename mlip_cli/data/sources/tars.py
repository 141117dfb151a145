"""The samples of webdataset tars, such as those of img2dataset; nothing is unpacked."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from mlip_cli.data.sources.listing import PICTURE_ENDINGS
from mlip_cli.data.sources.records import (
    Caption,
    PicturePlace,
    Record,
    UnusableSampleError,
    captions_of,
    decode_text,
    plain_values,
    split_of_folder,
)
from mlip_cli.data.tar import Member, read_members

TEXT_ENDINGS = {"txt": ("txt", "caption", "text"), "json": ("json",), "cls": ("cls",)}
"""Texts of a sample -> their endings; the first ending that a sample has is read."""
ENDINGS = frozenset((*PICTURE_ENDINGS, *(ending for endings in TEXT_ENDINGS.values() for ending in endings)))
CLASS_NAMES = ("class", "label")
MAX_TEXT_BYTES = 1 << 20

OURS = {
    "captions",
    "caption",
    "class",
    "width",
    "height",
    "original_width",
    "original_height",
    "sha256",
    "source",
    "meta",
}
"""Fields of a KEY.json that do not go into `meta`: mlip writes them itself."""


def tar_records(root: Path, tars: Sequence[str]) -> Iterator[Record]:
    """One record a sample.

    Captions come from KEY.json (`captions`, as mlip writes them, or `caption`), else from KEY.txt.

    Raises:
        DamagedTarError: a tar is not whole; to go on with the samples before the damage would hide the loss.
    """
    for tar in tars:
        path = root / tar
        split, _ = split_of_folder(Path(tar))
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for row, (key, members) in enumerate(tar_samples(path)):
                yield _record(path, descriptor, members, file=tar, row=row, key=key, split=split)
        finally:
            os.close(descriptor)


def tar_samples(path: Path) -> Iterator[tuple[str, list[Member]]]:
    """(key, members with endings that mlip reads) of each sample: a run of members of one key.

    The sample in which a damaged tar ends is not given: it may not be whole.

    Raises:
        DamagedTarError: the tar is not whole.
    """
    for key, members in groupby(read_members(path), key=lambda member: key_of(member.name)):
        if known := [member for member in members if member.is_file and ending_of(member.name) in ENDINGS]:
            yield key, known


def key_of(name: str) -> str:
    """`a/b.c.jpg` -> `a/b.c`: members of one key are one sample."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.rpartition(".")[0]


def ending_of(name: str) -> str:
    """`a/b.c.JPG` -> `jpg`"""
    return name.rpartition(".")[2].lower()


def chosen_members(members: Sequence[Member]) -> dict[str, Member]:
    """The members of a sample that are read, by part: image, txt, json and cls. Empty texts count as missing.

    Raises:
        UnusableSampleError: there is not one picture, or a text is too long.
    """
    pictures = [member for member in members if ending_of(member.name) in PICTURE_ENDINGS]
    if len(pictures) != 1:
        raise UnusableSampleError("several pictures" if pictures else "no picture")
    chosen = {"image": pictures[0]}
    texts = {ending_of(member.name): member for member in members if member.size}
    for part, endings in TEXT_ENDINGS.items():
        if found := [texts[ending] for ending in endings if ending in texts]:
            chosen[part] = found[0]
            if found[0].size > MAX_TEXT_BYTES:
                raise UnusableSampleError("caption too long", detail=found[0].name)
    return chosen


def _record(
    path: Path, descriptor: int, members: Sequence[Member], *, file: str, row: int, key: str, split: str | None
) -> Record:
    picture = None
    try:
        parts = chosen_members(members)
        image = parts.pop("image")
        picture = PicturePlace(str(path), image.offset, image.size)
        info = stated({part: os.pread(descriptor, m.size, m.offset) for part, m in parts.items()})
    except UnusableSampleError as error:
        return Record(file, row, picture, (), split=split, reject=str(error), detail=error.detail or key)
    return Record(file, row, picture, info.captions, split=split, label=info.label, meta=info.meta, detail=key)


class Stated(NamedTuple):
    """What the texts of a sample say about its picture. Training asks for captions alone, so the rest is read late."""

    captions: tuple[Caption, ...]
    fields: dict[str, Any]
    """KEY.json."""
    cls: str | None
    """KEY.cls."""

    @property
    def label(self) -> str | None:
        """Class of the sample: `class` or `label` of KEY.json, else KEY.cls (often a number)."""
        for name in CLASS_NAMES:
            if isinstance(self.fields.get(name), str | int):
                return str(self.fields[name])
        return (self.cls or "").strip() or None

    @property
    def meta(self) -> dict[str, Any]:
        """Texts and numbers that the sample states besides, such as `concept`."""
        ours = self.fields.get("meta") if "captions" in self.fields else None
        return plain_values(ours if isinstance(ours, dict) else {}) | plain_values(self.fields, without=OURS)


def stated(contents: Mapping[str, bytes]) -> Stated:
    """What the texts of a sample (txt, json, cls) say.

    Raises:
        UnusableSampleError: they are not UTF-8, or KEY.json is not a JSON object.
    """
    texts = {part: decode_text(content) for part, content in contents.items()}
    if None in texts.values():
        raise UnusableSampleError("caption is not UTF-8")
    try:
        fields = json.loads(texts["json"] or "null") if "json" in texts else {}
    except (json.JSONDecodeError, RecursionError):
        raise UnusableSampleError("KEY.json is not JSON") from None
    if not isinstance(fields, dict):
        raise UnusableSampleError("KEY.json is not a JSON object")
    return Stated(_captions(fields, texts.get("txt")), fields, texts.get("cls"))


def _captions(fields: dict[str, Any], text: str | None) -> tuple[Caption, ...]:
    for name in ("captions", "caption"):
        if (captions := captions_of(fields.get(name))) and (name == "captions" or text is None):
            return captions
    return captions_of(text)
