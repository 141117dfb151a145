"""What the samples of webdataset tars, such as those of img2dataset, say; nothing is unpacked."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from mlip_cli.data.sources.captions import captions_of, captions_of_text
from mlip_cli.data.sources.class_levels import splits_in
from mlip_cli.data.sources.records import (
    MAX_TEXT_BYTES,
    REFUSE,
    USE_START,
    Caption,
    PicturePlace,
    Record,
    UnusableSampleError,
    plain_values,
    split_in_name,
)
from mlip_cli.data.sources.tar_samples import (
    PICTURE_FIELDS,
    Columns,
    TarNotes,
    TarSample,
    ending_of,
    parts_of_sample,
    samples_of,
    used_before,
)
from mlip_cli.data.sources.text_tables import decode_text
from mlip_cli.data.tar import OpenTar, members_before_damage, open_tar, read_members
from mlip_cli.paths import escaped

TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
"""Endings of file names, in lower case, by which tars are found."""
CLASS_NAMES = ("class", "label")

SEVERAL_CAPTIONS = "samples with several captions in KEY.txt"

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


def tar_records(
    root: Path, tars: Sequence[str], columns: Columns, notes: TarNotes, *, damaged: str = REFUSE
) -> Iterator[Record]:
    """One record a sample. Memory holds the members of one tar.

    Without names in `columns`, the captions are `captions` of KEY.json, as mlip writes them, else KEY.txt, a caption a
    line, else `caption` of KEY.json.

    Args:
        notes: are added to.
        damaged: USE_START gives the samples before the damage, and then a reject that stands for those behind it.

    Raises:
        DamagedTarError: a tar is not whole, and `damaged` is REFUSE.
    """
    splits = splits_of_tars(tars)
    for tar in tars:
        yield from _records_of(root, tar, columns, notes, split=splits[tar], damaged=damaged)


def _records_of(
    root: Path, tar: str, columns: Columns, notes: TarNotes, *, split: str | None, damaged: str
) -> Iterator[Record]:
    path = root / tar
    members, damage = members_before_damage(path) if damaged == USE_START else (read_members(path), None)
    samples, _ = samples_of(members, columns, notes, tar=tar, is_cut=damage is not None)
    with open_tar(path) as opened:
        opened = _with_texts_read(opened, samples) if opened.is_compressed else opened
        for row, sample in enumerate(samples):
            yield _record(opened, sample, columns, notes, file=tar, row=row, split=split)
    if damage is not None:
        notes.add_damage(damage, len(samples))
        words = used_before(damage.removeprefix(f"{path}: "), len(samples))
        notes.passed_over.add("ends of damaged tars", f"{tar}: {words}")
        yield Record(tar, len(samples), None, (), split=split, reject="tar damaged", detail=words)


def splits_of_tars(tars: Sequence[str]) -> dict[str, str | None]:
    """Tar -> its split: by its folder, or by its name where the names tell several (cc3m-train-0000.tar)."""
    by_name = {tar: split_in_name(PurePosixPath(tar).name) for tar in tars}
    is_telling = len(set(by_name.values())) > 1 and None not in by_name.values()
    split_of = splits_in(tars)
    return {tar: split_of(tar) or (by_name[tar] if is_telling else None) for tar in tars}


def _with_texts_read(tar: OpenTar, samples: Sequence[TarSample]) -> OpenTar:
    """The same tar with all texts in memory, read in the order in which they lie there."""
    members = {member for sample in samples for member in sample.fields.values() if member.size <= MAX_TEXT_BYTES}
    texts = [member for member in members if ending_of(member.name).lower() not in PICTURE_FIELDS]
    texts.sort(key=lambda member: member.offset)
    contents = {(member.size, member.offset): tar.read(member.size, member.offset) for member in texts}
    return tar._replace(read=lambda size, at: contents[size, at])


def _record(
    tar: OpenTar, sample: TarSample, columns: Columns, notes: TarNotes, *, file: str, row: int, split: str | None
) -> Record:
    picture = None
    try:
        parts = parts_of_sample(sample, columns)
        image = parts.pop("image")
        picture = PicturePlace(str(tar.path), image.offset, image.size, is_compressed=tar.is_compressed)
        info = stated({part: tar.read(m.size, m.offset) for part, m in parts.items()}, columns)
    except UnusableSampleError as error:
        detail = f"{sample.key}: {error.detail}" if error.detail else sample.key
        return Record(file, row, picture, (), split=split, reject=str(error), detail=detail)
    if info.has_lines:
        notes.read_as.add(SEVERAL_CAPTIONS, f"{file}: {sample.key}")
    return Record(
        file,
        row,
        picture,
        info.captions,
        split=split,
        label=info.label,
        meta=info.meta,
        detail=": ".join(filter(None, (sample.key, "" if info.captions else info.without_captions))),
    )


class Stated(NamedTuple):
    """What the texts of a sample say about its picture. Training asks for captions alone, so the rest is read late."""

    captions: tuple[Caption, ...]
    fields: dict[str, Any]
    """KEY.json."""
    cls: str | None
    """KEY.cls."""

    has_lines: bool = False
    """KEY.txt holds several captions, one a line."""

    @property
    def without_captions(self) -> str:
        """What to say of a sample that has no captions."""
        keys = ", ".join(escaped(key) for key, value in self.fields.items() if captions_of(value))
        if keys:
            return f"KEY.json has {keys}; name one by --caption-column, or caption_column in a recipe"
        if self.fields:
            return f"KEY.json has {', '.join(map(escaped, self.fields))}, and no text in them"
        return "KEY.cls is a class and no caption" if self.cls is not None else ""

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


def stated(contents: Mapping[str, bytes], columns: Columns) -> Stated:
    """What the texts of a sample (txt, json, cls) say.

    Raises:
        UnusableSampleError: they are not UTF-8, or KEY.json is not a JSON object.
    """
    texts = {part: decode_text(content) for part, content in contents.items()}
    if None in texts.values():
        raise UnusableSampleError("caption is not UTF-8")
    try:
        fields = json.loads(texts["json"] or "null") if "json" in texts else {}
    except (ValueError, RecursionError):  # not only JSONDecodeError: a number may have too many digits
        raise UnusableSampleError("KEY.json is not JSON") from None
    if isinstance(fields, list) and captions_of(fields):
        fields = {"captions": fields}
    if not isinstance(fields, dict):
        raise UnusableSampleError("KEY.json is not a JSON object")
    captions, has_lines = _captions(fields, texts.get("txt"), columns)
    return Stated(captions, fields, texts.get("cls"), has_lines)


def _captions(fields: dict[str, Any], text: str | None, columns: Columns) -> tuple[tuple[Caption, ...], bool]:
    """The captions, and whether they are several lines of KEY.txt."""
    if columns.caption_key is not None:
        return captions_of(fields.get(columns.caption_key)), False
    names = ("captions", "caption") if columns.caption is None else ()
    for name in names:
        if (captions := captions_of(fields.get(name))) and (name == "captions" or text is None):
            return captions, False
    captions = captions_of_text(text) if text and text.strip() else ()
    return captions, len(captions) > 1
