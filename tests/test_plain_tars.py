"""webdataset tars that mlip did not write: read in place, in any order, each picture with its own caption."""

import io
import json
import os
import random
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from shards_for_tests import batches_of

from mlip_cli.data import plain_tars as module
from mlip_cli.data.dataset import BadSampleError, ShardDataset
from mlip_cli.data.open import open_sources
from mlip_cli.data.sources.records import Caption
from mlip_cli.data.sources.tar_samples import Columns
from mlip_cli.data.tokenizer import Tokenizer
from mlip_cli.errors import UsageError
from mlip_cli.evaluate.validation import evaluation_loader
from mlip_cli.recipe.config import Augment, Cache, Data, Source
from mlip_cli.types import Batch

G = 4


def picture(i: int, image_format: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20 + i % 3, 16), (i * 7 % 256, i * 31 % 256, 90)).save(file, image_format)
    return file.getvalue()


SEVENTH_EDITION = -7


def write_tar(path: Path, members: Mapping[str, bytes | str], *, format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT if format == SEVENTH_EDITION else format) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content := content.encode() if isinstance(content, str) else content)
            info.mtime = 1.5 if format == tarfile.PAX_FORMAT else 1  # a fraction makes a PAX header, as webdataset's
            tar.addfile(info, io.BytesIO(content))
    if format == SEVENTH_EDITION:
        path.write_bytes(without_magic(path.read_bytes()))
    return path


def without_magic(archive: bytes) -> bytes:
    """Headers as tar wrote them before POSIX: nothing behind the name of the link."""
    found = bytearray(archive)
    at = 0
    while found[at]:
        found[at + 257 : at + 512] = bytes(255)
        found[at + 148 : at + 156] = b" " * 8
        found[at + 148 : at + 156] = b"%06o\0 " % sum(found[at : at + 512])
        at += 512 + -(-int(found[at + 124 : at + 135], 8) // 512) * 512
    return bytes(found)


def plain(numbers: range) -> dict[str, bytes | str]:
    members: dict[str, bytes | str] = {}
    for i in numbers:
        members |= {f"{i:05d}.jpg": picture(i), f"{i:05d}.txt": f"picture number {i}"}
    return members


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for tar in range(3):
        write_tar(tmp_path / "tars" / f"{tar:04d}.tar", plain(range(tar * 8, tar * 8 + 8)))
    return tmp_path / "tars"


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(folder=str(tmp_path / "cache"))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said and warned of."""
    lines: list[str] = []
    for name in ("say", "warn"):
        monkeypatch.setattr(module, name, lines.append)
    return lines


def opened(path: Path | str, cache: Cache) -> ShardDataset:
    [dataset] = open_sources([Source(path=str(path), format="webdataset")], cache=cache)
    return dataset


def captions(dataset: ShardDataset) -> list[list[str]]:
    return [[caption.text for caption in dataset.read(id).captions] for id in range(dataset.num_samples)]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT, SEVENTH_EDITION])
def test_samples_are_those_of_the_tars(folder: Path, cache: Cache, format: int) -> None:
    write_tar(folder / "0003.tar", plain(range(24, 29)), format=format)
    dataset = opened(folder, cache)
    assert (dataset.num_samples, dataset.num_shards, dataset.place) == (29, 4, str(folder.resolve()))
    for id in (28, 3, 8, 0, 27, 15):
        sample = dataset.read(id)
        assert (sample.key, sample.image) == (f"{id:05d}", picture(id))
        assert sample.shard == str(folder / f"{id // 8:04d}.tar")
        assert sample.captions == (Caption(f"picture number {id}", 1.0),)
    lengths = [Tokenizer(77).count(f"picture number {i}") for i in range(29)]
    assert dataset.num_tokens(range(29)).tolist() == lengths


def test_names_texts_and_endings_of_all_kinds(tmp_path: Path, cache: Cache, said: list[str]) -> None:
    long = "folder/" * 20 + "long"
    write_tar(
        tmp_path / "in" / "a.tar",
        {
            "dots.in.key.jpg": picture(0),
            "dots.in.key.txt": "dots",
            "dots.in.jpg": picture(1),
            "dots.in.txt": "fewer dots",
            "program.pyd": b"cos\nsystem\n(S'touch /tmp/owned'\ntR.",
            "program.jpg": picture(2),
            "program.json": json.dumps({"caption": "from json", "url": "x", "width": 3, "class": "thing"}),
            f"{long}.jpeg": picture(3),
            f"{long}.txt": "long name",
            "\u56fe.PNG": picture(4, "PNG"),
            "\u56fe.caption": " not ASCII ",
            "both.webp": picture(5, "WEBP"),
            "both.json": json.dumps({"captions": [{"text": "one", "weight": 2}, {"text": " "}, "two"], "caption": "x"}),
            "both.txt": "text",
        },
    )
    dataset = opened(tmp_path / "in", cache)
    assert [dataset.read(id).image for id in range(6)] == [
        picture(i, {4: "PNG", 5: "WEBP"}.get(i, "JPEG")) for i in range(6)
    ]
    found = captions(dataset)
    assert found == [["dots"], ["fewer dots"], ["from json"], ["long name"], ["not ASCII"], ["one", "two"]]
    assert dataset.read(2).info.label == "thing"
    assert dataset.read(2).info.meta == {"url": "x"}
    assert dataset.read(0).key == "dots.in.key"
    assert said == [
        f"{tmp_path}/in: indexing 1 tar, 40.0 KiB; this is done once",
        f"{tmp_path}/in: not read: 1 .pyd member (first: program.pyd)",
    ]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_names_that_are_not_text(tmp_path: Path, cache: Cache, said: list[str], format: int) -> None:
    """Each is one sample, used once and refused never."""
    latin = [b"caf\xe9".decode(errors="surrogateescape"), b"\xff".decode(errors="surrogateescape")]
    members = {f"{name}.{end}": what for name in latin for end, what in (("jpg", picture(0)), ("txt", "coffee"))}
    write_tar(tmp_path / "in" / "a.tar", members, format=format)
    dataset = opened(tmp_path / "in", cache)
    assert captions(dataset) == [["coffee"], ["coffee"]]
    assert [dataset.read(id).key for id in range(2)] == [r"caf\udce9", r"\udcff"]
    assert said == [f"{tmp_path}/in: indexing 1 tar, 10.0 KiB; this is done once"]


def test_what_webdataset_writes(tmp_path: Path, cache: Cache) -> None:
    with webdataset.TarWriter(str(tmp_path / "w.tar")) as writer:
        for i in range(5):
            writer.write({"__key__": f"k{i}", "jpg": picture(i), "txt": f"caption {i}", "json": {"caption": "other"}})
    dataset = opened(tmp_path / "w.tar", cache)
    assert captions(dataset) == [[f"caption {i}"] for i in range(5)]
    assert [dataset.read(i).image for i in range(5)] == [picture(i) for i in range(5)]


def batches(dataset: ShardDataset, start: int, stop: int, **options: Any) -> list[Batch]:
    augment = Augment(flip=True)
    return list(batches_of(dataset, range(start, stop), batch_size=G, augment=augment, image_size=16, **options))


@pytest.mark.slow
def test_order_and_resume_are_exact(folder: Path, cache: Cache) -> None:
    whole = batches(opened(folder, cache), 0, 9)
    assert sorted(key for batch in whole[:6] for key in batch.keys) == [f"{i:05d}" for i in range(24)]
    resumed = batches(opened(folder, cache), 4, 9, num_workers=2)
    shares = [batches(opened(folder, cache), 4, 9, rank=rank, world_size=2) for rank in (0, 1)]
    for a, b, *parts in zip(whole[4:], resumed, *shares, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.token_ids, b.token_ids)
        assert a.keys == b.keys == parts[0].keys + parts[1].keys
        expected = Tokenizer(16).encode([f"picture number {int(key)}" for key in a.keys])
        assert torch.equal(a.token_ids, expected[:, : a.token_ids.shape[1]])
    evaluated = evaluation_loader(opened(folder, cache), data=Data(train=(), image_size=8), batch_size=9, num_workers=0)
    assert sum(map(len, evaluated)) == 24


def test_unusable_samples_are_counted(folder: Path, cache: Cache, said: list[str]) -> None:
    members = plain(range(8)) | {
        "twice.jpg": picture(1),
        "twice.png": picture(1, "PNG"),
        "bare.jpg": picture(1),
        "blank.jpg": picture(1),
        "blank.txt": " \n",
        "text.txt": "no picture",
        "gif.gif": picture(1, "GIF"),
        "gif.txt": "moving",
        "latin.jpg": picture(1),
        "latin.txt": b"caf\xe9",
        "list.jpg": picture(1),
        "list.json": "[1]",
        "empty.jpg": b"",
        "empty.txt": "empty",
        "readme": "no ending",
    }
    tar = write_tar(folder / "0000.tar", members)
    dataset = opened(folder, cache)
    assert captions(dataset) == [*([f"picture number {i}"] for i in range(8)), ["moving"]] + [
        [f"picture number {i}"] for i in range(8, 24)
    ]
    assert said[1:] == [
        f"{folder}: not read: 1 member without ending (first: readme)",
        f"{folder}: 7 samples cannot be used and 25 can: 2 no caption, 1 KEY.json is not a JSON object, "
        "1 caption is not UTF-8, 1 empty picture, 1 no picture, 1 several pictures "
        f"(first: {tar}: sample twice: several pictures: jpg, png; name one by --image-column, or image_column in a "
        "recipe)",
    ]


def test_damaged_tars_are_named_and_what_stands_before_the_damage_is_used(
    folder: Path, cache: Cache, said: list[str]
) -> None:
    content = bytearray((folder / "0001.tar").read_bytes())
    with tarfile.open(folder / "0001.tar") as tar:
        at = tar.getmember("00012.jpg").offset  # of the PAX header before it
    content[at + 2] ^= 1
    (folder / "0001.tar").write_bytes(content)
    os.truncate(folder / "0002.tar", 700)
    dataset = opened(folder, cache)
    assert captions(dataset) == [[f"picture number {i}"] for i in range(11)]
    assert said[1:] == [
        f"{folder}/0001.tar: no tar header at byte {at}: its checksum is wrong; 3 samples before it are used",
        f"{folder}/0002.tar: cut at byte 700: no end-of-archive block; 0 samples before it are used",
    ]


def test_an_index_is_made_once_and_again_for_a_tar_that_changed(
    folder: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[str] = []
    index_one = module._index_one

    def spied(pair: tuple[Path, Path], columns: Columns) -> None:
        made.append(pair[0].name)
        index_one(pair, columns)

    monkeypatch.setattr(module, "_index_one", spied)
    first = opened(folder, cache)
    assert opened(f"{folder}/{{0000..0002}}.tar", cache).fingerprint == first.fingerprint
    assert opened(f"{folder}/*.tar", cache).fingerprint == first.fingerprint
    assert made == ["0000.tar", "0001.tar", "0002.tar"]
    os.utime(folder / "0001.tar", (1, 1))
    assert opened(folder, cache).fingerprint == first.fingerprint
    assert made[3:] == ["0001.tar"]
    shutil.copytree(folder, tmp_path / "moved")
    assert opened(tmp_path / "moved", cache).fingerprint == first.fingerprint
    write_tar(folder / "0001.tar", plain(range(8, 16)) | {"00015.txt": "another caption of another length"})
    assert opened(folder, cache).fingerprint != first.fingerprint


def test_a_tar_that_changes_while_it_is_read_gives_bad_samples_never_wrong_pairs(folder: Path, cache: Cache) -> None:
    """Members of one tar are put into another order, in place, again and again."""
    dataset = opened(folder, cache)
    dataset.read(0)
    members = list(plain(range(8)).items())
    shuffle, num_bad = random.Random(0), 0
    for _ in range(30):
        shuffle.shuffle(members)
        content = write_tar(folder.parent / "other.tar", dict(members)).read_bytes()
        with open(folder / "0000.tar", "r+b") as file:
            file.write(content)
        for id in range(8):
            try:
                sample = dataset.read(id)
            except BadSampleError as error:
                num_bad += error.shard == f"{folder}/0000.tar" and error.key.startswith("at byte ")
                continue
            assert sample.image == picture(int(sample.key))
            assert sample.captions[0].text == f"picture number {int(sample.key)}"
    assert 30 < num_bad < 240


def test_what_cannot_be_read_in_any_order_is_refused(folder: Path, cache: Cache, tmp_path: Path) -> None:
    def message(path: Path | str) -> str:
        with pytest.raises(UsageError) as error:
            opened(path, cache)
        return str(error.value)

    for split in ("train", "test"):
        shutil.copytree(folder, tmp_path / "both" / split)
    cure = "name the folder of one, or a pattern"
    assert message(tmp_path / "both").endswith(f"/both: tars of several splits (test, train); {cure}")
    assert opened(tmp_path / "both" / "train", cache).num_samples == 24
    write_tar(tmp_path / "no" / "0.tar", {"a.jpg": picture(0), "b.txt": "alone"})
    assert message(tmp_path / "no") == (
        f"{tmp_path}/no: no sample of 1 tar can be used: 1 no caption, 1 no picture (first: {tmp_path}/no/0.tar: "
        "sample a: no caption); a sample is a picture with KEY.txt or KEY.json; mlip prepare-data lists the samples "
        "that it rejects"
    )
    assert message(tmp_path / "gone").startswith(f"{tmp_path}/gone: no such file or folder")


def test_without_its_format_the_folder_is_refused_with_both_cures(folder: Path) -> None:
    with pytest.raises(UsageError) as error:
        open_sources([Source(path=str(folder))])
    assert str(error.value) == (
        f"{folder}: tars without index; prepare them: mlip prepare-data {folder} OUT, or read them as they are: "
        f"data.train: [{{path: {folder}, format: webdataset}}]"
    )


def test_the_first_255_captions_of_a_sample_are_read(tmp_path: Path, cache: Cache, said: list[str]) -> None:
    texts = [f"caption {i}" for i in range(300)]
    tar = write_tar(tmp_path / "x.tar", {"a.jpg": picture(0), "a.json": json.dumps({"captions": texts})})
    dataset = opened(tar, cache)
    assert captions(dataset) == [texts[:255]]
    assert said[1:] == [f"{tar}: 1 sample with more than 255 captions, of which the first are read (first: {tar}: a)"]


def test_tokens_of_all_captions_count(tmp_path: Path, cache: Cache) -> None:
    texts = ["short", "a much longer caption of eight words or so"]
    write_tar(tmp_path / "x.tar", {"a.jpg": picture(0), "a.json": json.dumps({"captions": texts})})
    dataset = opened(tmp_path / "x.tar", cache)
    assert dataset.num_tokens(np.array([0])).tolist() == [Tokenizer(77).count(texts[1])]
