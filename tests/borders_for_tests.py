"""Random sources, whole and damaged, of pictures whose pixels say which caption is theirs."""

import csv
import gzip
import io
import json
import re
import tarfile
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from PIL import Image

from mlip_cli.data.open import open_sources
from mlip_cli.errors import RunError, UsageError
from mlip_cli.recipe.config import Cache, Source

SIDE = 16
HALF = SIDE // 2
MOST = 7
"""Pairs of a source."""
FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
CAPTION = re.compile(r"(\d{4})[a-z] is the number")
Draw = Callable[[st.SearchStrategy[Any]], Any]


class Files(dict[str, bytes]):
    """Contents by name."""

    def __repr__(self) -> str:
        return repr(
            {name: content if len(content) < 400 else f"{len(content)} bytes" for name, content in self.items()}
        )


def numbered(number: int, ending: str) -> bytes:
    """A picture of four plain quarters, whose twelve channels are the bits of `number`."""
    bits = np.array([number >> bit & 1 for bit in range(12)], np.uint8).reshape(2, 2, 3) * 255
    file = io.BytesIO()
    Image.fromarray(bits.repeat(HALF, 0).repeat(HALF, 1)).save(file, FORMATS[ending])
    return file.getvalue()


def number_of(content: bytes) -> int:
    """The number that `numbered` drew."""
    with Image.open(io.BytesIO(content)) as image:
        assert image.size == (SIDE, SIDE)
        middles = np.asarray(image.convert("RGB"))[HALF // 2 :: HALF, HALF // 2 :: HALF]
    return sum(int(channel > 127) << bit for bit, channel in enumerate(middles.reshape(-1)))


def is_wrong(image: bytes, caption: str) -> bool:
    """Whether a whole caption belongs to another picture. Damage may have cut or lengthened the caption itself."""
    stated = CAPTION.fullmatch(caption)
    return stated is not None and int(stated[1]) != number_of(image)


@dataclass(frozen=True)
class Pair:
    """A picture with its captions, which all name its number."""

    number: int
    ending: str
    captions: tuple[str, ...]

    @property
    def content(self) -> bytes:
        """The encoded picture."""
        return numbered(self.number, self.ending)


def _pairs(draw: Draw, *, most_captions: int) -> list[Pair]:
    numbers = draw(st.lists(st.integers(0, 4095), min_size=1, max_size=MOST, unique=True))
    counts = [draw(st.integers(1, most_captions)) for _ in numbers]
    return [
        Pair(
            number,
            draw(st.sampled_from(sorted(FORMATS))),
            tuple(f"{number:04d}{chr(97 + k)} is the number" for k in range(n)),
        )
        for number, n in zip(numbers, counts, strict=True)
    ]


def _names(draw: Draw, pairs: Sequence[Pair]) -> list[str]:
    folder = draw(st.sampled_from(("", "i/", "Images/", "a b/caf\u00e9/")))
    stem = draw(st.sampled_from(("{:05d}", "p{}", "it's {}", "caf\u00e9 {}")))
    return [f"{folder}{stem.format(pair.number)}.{pair.ending}" for pair in pairs]


def _rows(draw: Draw, names: Sequence[str], pairs: Sequence[Pair]) -> list[tuple[str, str]]:
    rows = [(name, caption) for name, pair in zip(names, pairs, strict=True) for caption in pair.captions]
    return draw(st.permutations(rows))


def _pictures(names: Sequence[str], pairs: Sequence[Pair]) -> dict[str, bytes]:
    return {name: pair.content for name, pair in zip(names, pairs, strict=True)}


@st.composite
def tables(draw: Draw) -> Files:
    """A table with separators, encodings and endings of all kinds, beside its pictures."""
    pairs = _pairs(draw, most_captions=3)
    names = _names(draw, pairs)
    separator = draw(st.sampled_from((",", "\t", ";", "|")))
    quoting = draw(st.sampled_from((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)))
    text = io.StringIO()
    writer = csv.writer(
        text, delimiter=separator, quoting=quoting, lineterminator=draw(st.sampled_from(("\n", "\r\n")))
    )
    header = draw(st.sampled_from((("image", "caption"), ("filepath", "title"), ("file_name", "text"), None)))
    writer.writerows(([header] if header else []) + _rows(draw, names, pairs))
    content = text.getvalue().encode(draw(st.sampled_from(("utf-8", "utf-8", "utf-8-sig", "utf-16"))))
    name = draw(st.sampled_from(("metadata", "captions", "results"))) + (".tsv" if separator == "\t" else ".csv")
    if draw(st.integers(0, 4)) == 0:
        name, content = f"{name}.gz", gzip.compress(content, mtime=0)
    return Files(_pictures(names, pairs) | {name: content})


@st.composite
def object_tables(draw: Draw) -> Files:
    """JSON Lines, one JSON array, COCO's JSON, Parquet of paths, or Parquet with the pictures inside."""
    pairs = _pairs(draw, most_captions=3)
    names = _names(draw, pairs)
    rows = [{"image": name, "caption": caption} for name, caption in _rows(draw, names, pairs)]
    lists = [{"file_name": name, "captions": list(pair.captions)} for name, pair in zip(names, pairs, strict=True)]
    kind = draw(st.sampled_from(("lines", "array", "lists", "coco", "paths", "inside")))
    files = {} if kind == "inside" else _pictures(names, pairs)
    if kind in ("lines", "lists"):
        chosen = rows if kind == "lines" else lists
        return Files(files | {"metadata.jsonl": "".join(json.dumps(row) + "\n" for row in chosen).encode()})
    if kind == "array":
        return Files(files | {"metadata.json": json.dumps(rows).encode()})
    if kind == "coco":
        return Files(files | {"captions_train2017.json": _coco(names, pairs, draw)})
    if kind == "inside":
        rows = [
            {"image": {"bytes": pair.content, "path": Path(name).name}, "caption": pair.captions[0]}
            for name, pair in zip(names, pairs, strict=True)
        ]
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=draw(st.integers(1, 4)))
    return Files(files | {"train-00000-of-00001.parquet": file.getvalue()})


def _coco(names: Sequence[str], pairs: Sequence[Pair], draw: Draw) -> bytes:
    images = [{"id": pair.number, "file_name": name} for name, pair in zip(names, pairs, strict=True)]
    said = [{"image_id": pair.number, "id": k, "caption": c} for pair in pairs for k, c in enumerate(pair.captions)]
    return json.dumps({"images": draw(st.permutations(images)), "annotations": draw(st.permutations(said))}).encode()


@st.composite
def sidecars(draw: Draw) -> Files:
    """A text beside each picture, of one caption or of a caption a line."""
    pairs = _pairs(draw, most_captions=2)
    names = _names(draw, pairs)
    ending = draw(st.sampled_from((".txt", ".caption")))
    texts = {
        str(Path(n).with_suffix(ending)): "\n".join(p.captions).encode() for n, p in zip(names, pairs, strict=True)
    }
    return Files(_pictures(names, pairs) | texts)


@st.composite
def class_trees(draw: Draw) -> Files:
    """A folder a class, named as the caption of its pictures."""
    pairs = _pairs(draw, most_captions=1)
    above = draw(st.sampled_from(("", "train/", "images/", "val_256/", "data/images/")))
    spelled = draw(st.sampled_from((" ", "_")))
    return Files(
        (f"{above}{pair.captions[0].replace(' ', spelled)}/{k}.{pair.ending}", pair.content)
        for pair in pairs
        for k in range(draw(st.integers(1, 2)))
    )


@st.composite
def tars(draw: Draw) -> Files:
    """Tars of samples, their members in order or in none."""
    pairs = _pairs(draw, most_captions=3)
    prefix = draw(st.sampled_from(("", "./", "pairs/", "./a.b/")))
    picture, text = draw(st.sampled_from((("", "txt"), ("input.", "outputs.txt"), ("", "json"), ("", "captions"))))
    dotted = () if picture else ("s.{}",)  # no rule tells a dotted key from a field of two parts
    stem = draw(st.sampled_from(("{:06d}", "x{}", *dotted)))
    half = draw(st.integers(1, len(pairs)))
    form = draw(st.sampled_from((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)))
    files = Files()
    for number, own in enumerate(filter(None, (pairs[:half], pairs[half:]))):
        members = []
        for pair in own:
            key = prefix + stem.format(pair.number)
            said = (
                json.dumps({"captions": [{"text": caption} for caption in pair.captions]})
                if text == "captions"
                else json.dumps({"caption": pair.captions[0]})
                if text == "json"
                else pair.captions[0]
            )
            members.append((f"{key}.{picture}{pair.ending}", pair.content))
            members.append((f"{key}.{'json' if text == 'captions' else text}", said.encode()))
        files[f"{number}.tar"] = _tar(draw(st.permutations(members)) if draw(st.booleans()) else members, form)
    return files


def _tar(members: Iterable[tuple[str, bytes]], form: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


JUNK = (b"", b"\0", b"\n", b'"', b",", b"\t", b"\xff\xfe", b"\x1b[2J", b"[", b"{}", b"nan", b"\r\n\r\n", bytes(512))
LEFT_BEHIND = ("._0.jpg", ".DS_Store", "__MACOSX/i/._0.png", "i/.ipynb_checkpoints/0.png", "Thumbs.db", "photo.heic")


def _is_picture(name: str) -> bool:
    return Path(name).suffix[1:] in FORMATS


@st.composite
def damaged(draw: Draw, sources: st.SearchStrategy[Files]) -> Files:
    """A source with up to three faults: of a disk, an editor, a system, or a hand."""
    files = Files(draw(sources))
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(files)))
        content = files[name]
        at = draw(st.integers(0, len(content)))
        match draw(st.sampled_from(("cut", "junk", "gone", "html", "empty", "left behind", "spelled", "twice"))):
            case "cut":
                files[name] = content[:at]
            case "junk" if not _is_picture(name):  # in a picture it may change pixels and nothing else
                files[name] = content[:at] + draw(st.sampled_from(JUNK)) + content[at:]
            case "gone" if len(files) > 1:
                del files[name]
            case "html" if _is_picture(name):
                files[name] = b"<!DOCTYPE html><html>403 Forbidden</html>"
            case "empty":
                files[name] = b""
            case "left behind":
                files[draw(st.sampled_from(LEFT_BEHIND))] = b"\x00\x05\x16\x07" + bytes(60)
            case "spelled":
                files[unicodedata.normalize("NFD", name)] = files.pop(name)
            case "twice" if Path(name).suffix in (".csv", ".tsv", ".jsonl"):
                files[name] = content + content[at:]
    return files


def outcome_of(work: Callable[[], Any]) -> Any:
    """What `work` returns, or the one line in which it refuses; any other error is a fault of ours."""
    try:
        return work()
    except (UsageError, RunError) as error:
        message = str(error)
        assert message.isprintable() or set(filter(lambda c: not c.isprintable(), message)) <= set("\u200b"), repr(
            message
        )
        return error


def training_pairs(folder: Path, cache: Path) -> list[tuple[bytes, str]]:
    """(picture, caption) of all samples that training reads from tars as they are; unusable ones are left out."""
    (dataset,) = open_sources([Source(path=str(folder), format="webdataset")], cache=Cache(folder=str(cache)))
    pairs = []
    for id in range(dataset.num_samples):
        found = outcome_of(lambda id=id: dataset.read(id))
        if not isinstance(found, Exception):
            pairs += [(found.image, caption.text) for caption in found.captions]
    return pairs
