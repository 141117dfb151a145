"""Odd headers of tars: training, mlip prepare-data and evaluation read tars by one parser, so all three agree."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mlip_cli.data.open import open_sources
from mlip_cli.data.sources.listing import PassedOver
from mlip_cli.data.sources.tar_samples import GUESSED, TarNotes
from mlip_cli.data.sources.tars import tar_records
from mlip_cli.data.tar import DamagedTarError
from mlip_cli.evaluate.datasets import clip_benchmark
from mlip_cli.recipe.config import Cache, Source

Edit = Callable[[bytearray], None]
"""Changes a header in place; its checksum is written afterwards."""


def picture(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


FIRST, ODD = picture(10), picture(200)


def member(name: str, content: bytes, *, edit: Edit = lambda _: None, checksum: str = "%06o\0 ") -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    edit(header)
    header[148:156] = b" " * 8
    header[148:156] = (checksum.encode() % sum(header)).ljust(8, b"\0")
    return bytes(header) + content + bytes(-len(content) % 512)


def pax(**fields: str) -> bytes:
    """A PAX header for the next member."""
    content = b""
    for key, value in fields.items():
        record = f" {key}={value}\n".encode()
        length = next(n for n in range(len(record), len(record) + 9) if n == len(record) + len(str(n)))
        content += str(length).encode() + record
    return member("pax", content, edit=put(156, b"x"))


def put(at: int, content: bytes) -> Edit:
    def edit(header: bytearray) -> None:
        header[at : at + len(content)] = content

    return edit


def two(odd: bytes) -> bytes:
    """A plain sample, a text alone (so that the sample before it is seen to end), and a sample with an odd picture."""
    texts = [member(f"{key}.{ending}", b"1") for key in ("a", "b") for ending in ("cls", "txt")]
    return (
        member("a.png", FIRST)
        + texts[0]
        + texts[1]
        + member("alone.txt", b"text")
        + odd
        + texts[2]
        + texts[3]
        + bytes(1024)
    )


SIZE = str(len(ODD))
TABLE: dict[str, tuple[bytes, list[bytes] | str]] = {
    "plain": (member("b.png", ODD), [FIRST, ODD]),
    "no magic": (member("b.png", ODD, edit=put(257, bytes(255))), [FIRST, ODD]),
    "other magic": (member("b.png", ODD, edit=put(257, b"wrong")), [FIRST, ODD]),
    "spaces around numbers": (
        member("b.png", ODD, edit=put(124, (b" %o" % len(ODD)).ljust(12)), checksum="%o \0"),
        [FIRST, ODD],
    ),
    "size in base 256": (member("b.png", ODD, edit=put(124, b"\x80" + len(ODD).to_bytes(11))), [FIRST, ODD]),
    "size stated by PAX": (pax(size=SIZE) + member("b.png", ODD, edit=put(124, b"%011o\0" % 0)), [FIRST, ODD]),
    "name stated by PAX": (pax(path="b.png") + member("c.txt", ODD), [FIRST, ODD]),
    "GNU long name": (member("L", b"b.png\0", edit=put(156, b"L")) + member("c.txt", ODD), [FIRST, ODD]),
    "name of 100 bytes": (pax(path="b.png") + member("p" * 100, ODD), [FIRST, ODD]),
    "upper-case ending": (member("b.PNG", ODD), [FIRST, ODD]),
    "contiguous file": (member("b.png", ODD, edit=put(156, b"7")), [FIRST, ODD]),
    "link that states a size": (
        member("b.jpg", b"", edit=lambda header: (put(156, b"1")(header), put(124, b"%011o\0" % 999)(header))),
        [FIRST],
    ),
    "link with a PAX size": (pax(size="999") + member("b.jpg", b"", edit=put(156, b"2")), [FIRST]),
    "folder": (member("b.png/", b"", edit=put(156, b"5")), [FIRST]),
    "sparse file": (member("b.png", ODD, edit=put(156, b"S")), [FIRST]),
    "negative size": (member("b.png", ODD, edit=put(124, b"-%010o\0" % 600)), "b'-0000001130\\x00' is not a number"),
    "size that is not octal": (member("b.png", ODD, edit=put(124, b"12_34\0")), "is not a number"),
    "wrong checksum": (member("b.png", ODD, checksum="%o1\0"), "its checksum is wrong"),
    "size beyond the end": (member("b.png", ODD, edit=put(124, b"77777777777\0")), "cut at byte"),
    "damaged PAX header": (member("pax", b"9 size\n", edit=put(156, b"x")) + member("b.png", ODD), "damaged PAX"),
    "PAX size that is not a number": (pax(size="\u00b2") + member("b.png", ODD), "damaged PAX"),
}


def by_training(path: Path, cache: Path, said: list[str]) -> list[bytes] | str:
    [dataset] = open_sources([Source(path=str(path), format="webdataset")], cache=Cache(folder=str(cache)))
    damage = [line for line in said if line.startswith(f"{path}: ") and "before it are used" in line]
    found = [dataset.read(id).image for id in range(dataset.num_samples)]
    assert not damage or found == [FIRST]
    return damage[0].partition(";")[0] if damage else found


def by_preparing(path: Path) -> list[bytes] | str:
    try:
        records = list(tar_records(path.parent, [path.name], GUESSED, TarNotes()))
    except DamagedTarError as error:
        return str(error)
    content = path.read_bytes()
    pictures = [record.picture for record in records if record.picture and record.picture.size and not record.reject]
    return [content[picture.offset : picture.offset + picture.size] for picture in pictures if picture.size]


def by_evaluation(path: Path) -> list[bytes] | str:
    try:
        items = list(clip_benchmark.labelled_pictures(path, TarNotes(), PassedOver()))
    except DamagedTarError as error:
        return str(error)
    content = path.read_bytes()
    return [content[offset : offset + size] for _, offset, size, _ in items]


@pytest.mark.parametrize("name", TABLE)
def test_three_readers_give_one_answer(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd, expected = TABLE[name]
    said: list[str] = []
    monkeypatch.setattr("mlip_cli.data.plain_tars.warn", said.append)
    path = tmp_path / "x.tar"
    path.write_bytes(two(odd))
    trained = by_training(path, tmp_path / "cache", said)
    assert trained == by_preparing(path) == by_evaluation(path)
    if isinstance(expected, str):
        assert isinstance(trained, str)
        assert trained.startswith(f"{path}: ")
        assert expected in trained
    else:
        assert trained == expected


def test_members_far_from_each_other_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large member that mlip does not read lies between picture and caption; training never loads it."""
    between = member("b.npy", bytes(1 << 20))
    texts = member("b.txt", b"words")
    path = tmp_path / "x.tar"
    path.write_bytes(member("b.png", ODD) + between + texts + bytes(1024))
    [dataset] = open_sources([Source(path=str(path), format="webdataset")], cache=Cache(folder=str(tmp_path / "cache")))
    from mlip_cli.data import dataset as module

    sizes: list[int] = []
    pread = module.os.pread
    monkeypatch.setattr(module.os, "pread", lambda fd, size, at: sizes.append(size) or pread(fd, size, at))
    sample = dataset.read(0)
    assert (sample.image, sample.captions[0].text) == (ODD, "words")
    assert max(sizes) <= max(512, len(ODD))
