"""Existing webdataset tars, img2dataset's output among them, as records; nothing is unpacked."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from mlip_cli.data.sources.records import (
    PICTURE_ENDINGS,
    Caption,
    PicturePlace,
    Record,
    captions_of,
    decode_text,
    plain_values,
    split_of_folder,
)
from mlip_cli.data.tar import Member, read_members

TEXTS = ("txt", "caption", "text")
CLASS_NAMES = ("class", "label")
MAX_PART_BYTES = 1 << 20

OURS = (
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
)
"""Fields of a KEY.json that a new KEY.json says anew."""


def tar_records(root: Path, tars: Sequence[str]) -> Iterator[Record]:
    """One record a sample. A sample is a run of members whose names are equal up to the last dot.

    Captions come from KEY.json (`captions`, as written by us, or `caption`), else from KEY.txt.

    Raises:
        DamagedTarError: a tar is not whole; the samples before the damage are not enough to go on without a word.
    """
    for tar in tars:
        path = root / tar
        split, _ = split_of_folder(Path(tar))
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            samples = groupby(read_members(path), key=lambda member: key_of(member.name))
            known = ((key, parts) for key, parts in ((k, known_members(m)) for k, m in samples) if parts)
            for row, (key, parts) in enumerate(known):
                yield _record(path, descriptor, parts, file=tar, row=row, key=key, split=split)
        finally:
            os.close(descriptor)


def key_of(name: str) -> str:
    """`a/b.c.jpg` -> `a/b.c`: members of one key are one sample."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.rpartition(".")[0]


def known_members(members: Iterator[Member]) -> list[tuple[str, Member]]:
    """(ending, member) of the members that we read; never links or folders, which have no bytes of their own."""
    named = [(member.name.rpartition(".")[2].lower(), member) for member in members if member.is_file]
    return [(ending, member) for ending, member in named if ending in (*PICTURE_ENDINGS, *TEXTS, "json", "cls")]


def _record(
    path: Path, descriptor: int, parts: list[tuple[str, Member]], *, file: str, row: int, key: str, split: str | None
) -> Record:
    pictures = [member for ending, member in parts if ending in PICTURE_ENDINGS]
    if len(pictures) != 1:
        reason = "several pictures" if pictures else "no picture"
        return Record(file, row, None, (), split=split, reject=reason, detail=key)
    place = PicturePlace(str(path), pictures[0].offset, pictures[0].size)
    texts = {ending: member for ending, member in parts if ending not in PICTURE_ENDINGS}
    if large := [member.name for member in texts.values() if member.size > MAX_PART_BYTES]:
        return Record(file, row, place, (), split=split, reject="caption too long", detail=large[0])
    try:
        said = stated({ending: os.pread(descriptor, m.size, m.offset) for ending, m in texts.items()})
    except UnusableTextsError as error:
        return Record(file, row, place, (), split=split, reject=str(error), detail=key)
    return Record(
        file=file,
        row=row,
        picture=place,
        captions=said.captions,
        split=split,
        label=said.label,
        meta=said.meta,
        detail=key,
    )


class UnusableTextsError(ValueError):
    """What stands beside a picture cannot be read; the words are those of a reject."""


@dataclass(frozen=True)
class Stated:
    """What a sample says of its picture."""

    captions: tuple[Caption, ...]
    label: str | None
    meta: dict[str, Any]


def stated(contents: Mapping[str, bytes]) -> Stated:
    """What the texts of a sample say, by their endings (json, cls, and those of TEXTS).

    Raises:
        UnusableTextsError: they are not UTF-8, or KEY.json is no JSON object.
    """
    texts = {ending: decode_text(content) for ending, content in contents.items()}
    if None in texts.values():
        raise UnusableTextsError("caption is not UTF-8")
    try:
        fields = json.loads(texts["json"] or "null") if "json" in texts else {}
    except (json.JSONDecodeError, RecursionError):
        raise UnusableTextsError("KEY.json is not JSON") from None
    if not isinstance(fields, dict):
        raise UnusableTextsError("KEY.json is not a JSON object")
    text = next((texts[ending] for ending in TEXTS if ending in texts), None)
    return Stated(_captions(fields, text), _label(fields, texts.get("cls")), _meta(fields))


def _captions(fields: dict[str, Any], text: str | None) -> tuple[Caption, ...]:
    for name in ("captions", "caption"):
        if (captions := captions_of(fields.get(name))) and (name == "captions" or text is None):
            return captions
    return captions_of(text)


def _label(fields: dict[str, Any], content: str | None) -> str | None:
    """Class of the sample: `class` or `label` of KEY.json, else KEY.cls (often a number)."""
    for name in CLASS_NAMES:
        if isinstance(fields.get(name), str | int):
            return str(fields[name])
    return content.strip() if content and content.strip() else None


def _meta(fields: dict[str, Any]) -> dict[str, Any]:
    ours = fields.get("meta") if "captions" in fields else None
    return plain_values(ours if isinstance(ours, dict) else {}) | plain_values(fields, without=OURS)
