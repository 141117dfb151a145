"""Faults in data, on real files: no hang, no picture with another's caption, the place named, counts that add up."""

import errno
import io
import json
import os
import random
import resource
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from shards_for_tests import batches_of, give_checksums, index_shard, make_dataset

from mlip_cli.data import dataset as dataset_module
from mlip_cli.data.dataset import BadSampleError, RawSample, ShardDataset
from mlip_cli.data.index import HEADER, RECORD, index_path
from mlip_cli.data.open import open_prepared, open_sources
from mlip_cli.data.order import Order
from mlip_cli.data.prepare.shards import sample_parts, tar_writer
from mlip_cli.data.tokenizer import Tokenizer
from mlip_cli.errors import RunError
from mlip_cli.files import write_json
from mlip_cli.recipe.config import Augment, Cache, Source
from mlip_cli.types import Batch

N, G = 24, 8
CAPTIONS = [f"the picture of number {i}" for i in range(N)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One shard of N samples, each with a caption of its own."""
    return make_dataset(
        tmp_path_factory.mktemp("whole") / "train", n=N, shard_size=N, captions=CAPTIONS, image_format="jpg"
    )


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    copy = tmp_path / "train"
    copy.mkdir()
    for path in whole.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def samples(dataset: ShardDataset) -> list[RawSample | BadSampleError]:
    """Every sample, or why there is none."""
    found: list[RawSample | BadSampleError] = []
    for id in range(dataset.num_samples):
        try:
            found.append(dataset.read(id))
        except BadSampleError as error:
            found.append(error)
    return found


def batches(dataset: ShardDataset, steps: int, *, num_workers: int = 0) -> Iterator[Batch]:
    data = {"augment": Augment(crop_scale=None), "image_size": 32, "max_bad_share": 1.0}
    return batches_of(dataset, range(steps), batch_size=G, num_workers=num_workers, **data)


def check_pairs(found: Sequence[Batch], whole: Path) -> int:
    """Each picture and caption are those of its key in the whole data; how many samples were replaced."""
    augment = Augment(crop_scale=None)
    good = next(batches_of(open_prepared(whole), range(1), batch_size=N, augment=augment, image_size=32))
    pictures = dict(zip(good.keys, good.images, strict=True))
    for batch in found:
        assert len(batch.keys) == len(batch.images) == len(batch.token_ids) == G
        for key, image, ids in zip(batch.keys, batch.images, batch.token_ids, strict=True):
            assert torch.equal(image, pictures[key])
            assert torch.equal(ids, Tokenizer(16).encode([CAPTIONS[int(key[-6:])]], length=len(ids))[0])
    return sum(len(batch.bad_samples) for batch in found)


def test_shards_cut_at_200_random_places_while_they_are_read(folder: Path, whole: Path) -> None:
    shard = folder / "train-000000.tar"
    content = shard.read_bytes()
    expected = samples(open_prepared(whole))
    dataset = open_prepared(folder)
    dataset.read(0)
    for length in sorted(random.Random(0).sample(range(len(content)), 200), reverse=True):
        os.truncate(shard, length)
        for good, found in zip(expected, samples(dataset), strict=True):
            assert isinstance(good, RawSample)
            if isinstance(found, RawSample):
                assert found == good._replace(shard=str(shard))
            else:
                assert found.shard == str(shard)
                assert found.reason.startswith("the shard ends ")
    assert all(isinstance(found, BadSampleError) for found in samples(dataset))
    with pytest.raises(
        RunError, match=rf"^{shard}: {length} bytes where the index says {len(content)}; the shard was cut"
    ):
        open_prepared(folder)


@pytest.mark.slow
def test_plain_tars_cut_at_200_random_places(whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The samples before the cut, all of them but perhaps the last, and one line that names the tar and the place."""
    content = (whole / "train-000000.tar").read_bytes()
    with tarfile.open(whole / "train-000000.tar") as tar:
        ends = [member.offset_data + member.size for member in tar if member.name.endswith(".jpg")]
        last = max(member.offset_data + member.size for member in tar)
    expected = samples(open_prepared(whole))
    cut = tmp_path / "cut" / "0.tar"
    cut.parent.mkdir()
    places = random.Random(1).sample(range(ends[2] + 2048, len(content)), 200)
    monkey = pytest.MonkeyPatch()
    said: list[str] = []
    with monkey.context() as patch:
        patch.setattr("mlip_cli.data.plain_tars.warn", said.append)
        patch.setattr("mlip_cli.data.plain_tars.count_tokens", lambda _: 9)  # which takes most of the time
        for length in places:
            cut.write_bytes(content[:length])
            os.utime(cut, ns=(length, length))
            [dataset] = open_sources(
                [Source(path=str(cut), format="webdataset")], cache=Cache(folder=str(tmp_path / "cache"))
            )
            found = samples(dataset)
            whole_samples = sum(end <= length for end in ends)
            assert whole_samples - 1 <= len(found) <= whole_samples
            for sample, good in zip(found, expected, strict=False):
                assert isinstance(sample, RawSample)
                assert isinstance(good, RawSample)
                assert (sample.key, sample.image) == (good.key, good.image)
                assert sample.captions == good.captions
            damage = said.pop() if length < last + 512 else ""
            assert damage.startswith(f"{cut}: cut at byte {length}: ") == bool(damage)
            assert damage == "" or damage.endswith(f"; {len(found)} samples before it are used")
            said.clear()


def said(sample: RawSample) -> tuple[Any, ...]:
    """What the texts of a sample state."""
    return sample.captions, sample.info.label, sample.info.meta


@pytest.mark.slow
def test_bytes_flipped_at_500_random_places_of_a_shard(folder: Path, whole: Path) -> None:
    """A sample is the one that was written, or it is bad and named."""
    shard = folder / "train-000000.tar"
    content = shard.read_bytes()
    expected = {sample.key: sample for sample in samples(open_prepared(whole)) if isinstance(sample, RawSample)}
    dataset = open_prepared(folder)
    generator, num_bad = random.Random(2), 0
    with open(shard, "r+b", buffering=0) as file:
        for _ in range(500):
            at, bit = generator.randrange(len(content)), 1 << generator.randrange(8)
            file.seek(at)
            file.write(bytes([content[at] ^ bit]))
            found = samples(dataset)
            good = [sample for sample in found if isinstance(sample, RawSample)]
            bad = [error for error in found if isinstance(error, BadSampleError)]
            assert len(good) >= N - 1
            num_bad += len(bad)
            assert all(error.shard == str(shard) and error.reason for error in bad)
            assert all(sample == expected[sample.key]._replace(shard=str(shard)) for sample in good)
            file.seek(at)
            file.write(content[at : at + 1])
    assert 100 < num_bad < 400  # the others are padding and KEY.txt, which nobody reads


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_on_a_shard_of_flipped_bytes(folder: Path, whole: Path, num_workers: int) -> None:
    """Headers and JSON in ruins: the others take their places, batches stay full, and the counts add up."""
    shard = folder / "train-000000.tar"
    records = np.fromfile(index_path(shard), RECORD, offset=HEADER.itemsize)
    ruined = (2, 7, 8, 19)
    with open(shard, "r+b") as file:
        for row in ruined:
            part = "json" if row % 2 else "image"
            file.seek(int(records["offset"][row]) + int(records[f"{part}_offset"][row]) - 512 + 150)
            file.write(b"\xff")
    found = list(batches(open_prepared(folder), 6, num_workers=num_workers))
    assert len(found) == 6
    num_bad = check_pairs(found, whole)
    bad = [bad for batch in found for bad in batch.bad_samples]
    assert num_bad == len(bad) >= 2 * len(ruined)  # two epochs, and now and then a bad one in the place of another
    assert {b.shard for b in bad} == {str(shard)}
    assert {b.key for b in bad} == {f"at byte {records['offset'][row]}" for row in ruined}
    assert not {int(key[-6:]) for batch in found for key in batch.keys} & set(ruined)


def test_bits_flipped_at_200_random_places_of_an_index(folder: Path) -> None:
    """An index that changed is refused when it is opened: it also says how wide the text of a batch is."""
    index = index_path(folder / "train-000000.tar")
    content = index.read_bytes()
    generator = random.Random(3)
    refused = 0
    for _ in range(200):
        at = generator.randrange(len(content))
        index.write_bytes(content[:at] + bytes([content[at] ^ 1 << generator.randrange(8)]) + content[at + 1 :])
        with pytest.raises(RunError, match=r"train-000000\.(idx|tar): .*prepare the data again"):
            open_prepared(folder)
        refused += 1
    assert refused > 150


def test_members_swapped_in_a_shard(folder: Path, whole: Path) -> None:
    """Pictures and captions in another order, whole tars of the same size: bad samples, never wrong pairs."""
    shard = folder / "train-000000.tar"
    dataset = open_prepared(folder)
    dataset.read(0)
    with tarfile.open(whole / shard.name) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    expected = {sample.key: sample for sample in samples(open_prepared(whole)) if isinstance(sample, RawSample)}
    generator, num_good, num_bad = random.Random(4), 0, 0
    for _ in range(20):
        for _ in range(3):
            i, j = generator.sample(range(len(members)), 2)
            members[i], members[j] = members[j], members[i]
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for member, data in members:
                tar.addfile(member, io.BytesIO(data))
        with open(shard, "r+b") as file:
            file.write(content.getvalue())
        for sample in samples(dataset):
            if isinstance(sample, BadSampleError):
                assert sample.shard == str(shard)
                num_bad += 1
                continue
            num_good += 1
            own = expected[sample.key]
            assert (sample.image, said(sample)) == (own.image, said(own))
    assert num_good > 20
    assert num_bad > 20


def write_shard(
    folder: Path,
    pictures: Sequence[bytes],
    *,
    captions: Sequence[Any] = (),
    format: str = "jpg",
    label: str | None = None,
) -> Path:
    """A data set of one shard of these encoded pictures, whatever they are; `captions` overwrite those of KEY.json."""
    folder.mkdir()
    path = folder / "train-000000.tar"
    fields = {"captions": [{"text": "words", "weight": 1.0}], "class": label, "meta": {"room": " " * 999}}
    fields |= dict.fromkeys(("width", "height", "original_width", "original_height"), 32)
    with tar_writer(path) as writer:
        for i, picture in enumerate(pictures):
            writer.write(sample_parts(f"00-{i:06d}", image=picture, format=format, fields=fields))
    lines = [index_shard(path, [10] * len(pictures))]
    write_json(folder / "dataset.json", {"num_samples": len(pictures), "fingerprint": "x", "shards": lines})
    records = np.fromfile(index_path(path), RECORD, offset=HEADER.itemsize)
    with open(path, "r+b") as file:
        for record, own in zip(records, captions, strict=False):
            file.seek(int(record["offset"]) + int(record["json_offset"]))
            file.write(json.dumps({"captions": own}).encode().ljust(int(record["json_size"])))
    give_checksums(path)
    return folder


def encoded(image: Image.Image, image_format: str) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format)
    return file.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("image_format", ["jpg", "png", "webp"])
def test_decompression_bombs_cost_neither_memory_nor_time(tmp_path: Path, image_format: str) -> None:
    small = encoded(Image.new("RGB", (32, 32), "red"), {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[image_format])
    if image_format == "jpg":
        at = small.index(b"\xff\xc0") + 5
        bomb = small[:at] + b"\xff\xdc\xff\xdc" + small[at + 4 :]
    elif image_format == "png":
        bomb = encoded(Image.new("1", (10_000, 9_000)), "PNG")  # a real one: 90 megapixels in some KB
    else:
        canvas = b"VP8X" + (10).to_bytes(4, "little") + bytes(4) + (16_382).to_bytes(3, "little")
        bomb = small[:12] + canvas + (4_999).to_bytes(3, "little") + small[12:]
    pictures = [bomb if i == 5 else small for i in range(16)]
    dataset = open_prepared(write_shard(tmp_path / "x", pictures, format=image_format))
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found = list(batches(dataset, 2))
    assert time.process_time() - started < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
    bad = {(bad.key, bad.reason) for batch in found for bad in batch.bad_samples}
    reason = {
        "jpg": "picture too large: over 64 megapixels",
        "png": "picture too large: 10,000 x 9,000 pixels, over 64 megapixels",
        "webp": "picture too large: 16,383 x 5,000 pixels, over 64 megapixels",
    }[image_format]
    assert bad == {("00-000005", reason)}


@pytest.mark.parametrize(
    ("captions", "reason"),
    [
        ([], "no caption"),
        ([{"text": "", "weight": 1.0}], "no caption"),
        ([{"text": " \n\t", "weight": 1.0}], "no caption"),
        ([{"text": "x", "weight": 0}], "caption weight is not positive"),
        ([{"text": "x", "weight": "heavy"}], "caption weight is not positive"),
        ([{"text": "x", "weight": 10**80}, {"text": "y", "weight": 10**400}], "caption weight is not positive"),
        ([{"text": "half \ud83d", "weight": 1.0}], "caption is not UTF-8"),
        ([{"weight": 1.0}], "no caption"),
        ([3], "no caption"),
        (None, "no caption"),
    ],
)
def test_empty_and_broken_captions_are_bad_samples(tmp_path: Path, captions: Any, reason: str) -> None:
    picture = encoded(Image.new("RGB", (32, 32), "red"), "JPEG")
    dataset = open_prepared(write_shard(tmp_path / "x", [picture] * 16, captions=[captions]))
    found = list(batches(dataset, 2))
    assert {(bad.key, bad.reason) for batch in found for bad in batch.bad_samples} == {("00-000000", reason)}
    assert all(len(batch.keys) == G for batch in found)


def test_a_blank_caption_beside_others_is_never_drawn(tmp_path: Path) -> None:
    picture = encoded(Image.new("RGB", (32, 32), "red"), "JPEG")
    captions = [[{"text": " ", "weight": 99.0}, {"text": "words", "weight": 1.0}]] * 16
    dataset = open_prepared(write_shard(tmp_path / "x", [picture] * 16, captions=captions))
    words = Tokenizer(16).encode(["words"])[0]
    for batch in batches(dataset, 4):
        assert all(torch.equal(ids, words[: len(ids)]) for ids in batch.token_ids)
        assert batch.bad_samples == ()


def test_json_of_ten_thousand_brackets_is_a_bad_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_shard(tmp_path / "x", [encoded(Image.new("RGB", (32, 32)), "JPEG")] * 8)

    def too_deep(_: bytes) -> None:
        raise RecursionError("maximum recursion depth exceeded")

    dataset = open_prepared(folder)
    monkeypatch.setattr("mlip_cli.data.sources.tars.json.loads", too_deep)
    with pytest.raises(BadSampleError, match=r"train-000000\.tar: sample 00-000000: KEY.json is not JSON$"):
        dataset.read(0)


def test_a_bad_block_of_the_disk_is_a_bad_sample(folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    records = np.fromfile(index_path(folder / "train-000000.tar"), RECORD, offset=HEADER.itemsize)
    broken = int(records["offset"][11])

    def failing(descriptor: int, size: int, at: int) -> bytes:
        if at == broken:
            raise OSError(errno.EIO, "Input/output error")
        return pread(descriptor, size, at)

    monkeypatch.setattr(os, "pread", failing)
    found = list(batches(open_prepared(folder), 3))
    monkeypatch.undo()
    assert check_pairs(found, whole) >= 1
    bad = {(bad.shard, bad.key, bad.reason) for batch in found for bad in batch.bad_samples}
    assert bad == {(str(folder / "train-000000.tar"), f"at byte {broken}", "[Errno 5] Input/output error")}


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("ending", [".tar", ".idx"])
def test_a_shard_removed_during_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int, ending: str
) -> None:
    """What is open is read on; what is not ends the run with a line that names it."""
    monkeypatch.setattr(dataset_module, "allow_open_files", lambda _: 64)
    dataset = open_prepared(make_dataset(tmp_path / "x", n=96, size=16, shard_size=2))
    gone = sorted((tmp_path / "x").glob(f"*{ending}"))
    with closing(batches(dataset, 1000, num_workers=num_workers)) as run:  # type: ignore[type-var]
        next(run)
        for path in gone:
            path.unlink()
        with pytest.raises(RunError) as error:
            list(run)
    text = str(error.value)
    assert any(text.startswith(f"{path}: ") for path in gone)
    assert "missing" in text or "no index" in text
    assert "\n" not in text


def test_removed_shards_that_are_open_are_read_to_the_end(folder: Path, whole: Path) -> None:
    dataset = open_prepared(folder)
    run = batches(dataset, 30)
    first = next(run)
    (folder / "train-000000.tar").unlink()
    assert check_pairs([first, *run], whole) == 0


def test_counts_add_up_over_epochs(folder: Path, whole: Path) -> None:
    """Every epoch meets each bad sample once in its own place; what else is bad stood in another's place."""
    shard = folder / "train-000000.tar"
    records = np.fromfile(index_path(shard), RECORD, offset=HEADER.itemsize)
    ruined = list(range(0, N, 4))
    with open(shard, "r+b") as file:
        for row in ruined:
            file.seek(int(records["offset"][row]) + int(records["image_offset"][row]))
            file.write(bytes(100))
    found = list(batches(open_prepared(folder), 12))
    order = Order([N], None, seed=0, global_batch_size=G)
    met = {f"00-{row:06d}": 0 for row in ruined}
    num_replaced = 0
    for step, batch in enumerate(found):
        own = [f"00-{id:06d}" for id in order.positions(step * G + np.arange(G)).index]
        replaced = [key for key, seen in zip(own, batch.keys, strict=True) if key != seen]
        assert sorted(replaced) == sorted(key for key in own if key in met)
        num_replaced += len(replaced)
        for bad in batch.bad_samples:
            met[bad.key] += 1
    assert num_replaced == 4 * len(ruined)
    assert check_pairs(found, whole) == sum(met.values()) >= num_replaced
    assert all(times >= 4 for times in met.values())
