"""A data set gives back what was written, whatever the order, and never pairs a picture with another's caption."""

import json
import os
import pickle
import resource
import shutil
import sys
import tarfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from shards_for_tests import give_checksums, index_shard, make_dataset

from mlip_cli.data import dataset as module
from mlip_cli.data.dataset import BadSampleError, ShardDataset, keep_open
from mlip_cli.data.index import HEADER, RECORD, WITHOUT_CHECKSUMS, index_path
from mlip_cli.data.open import open_prepared, open_sources
from mlip_cli.data.tokenizer import Tokenizer
from mlip_cli.errors import RunError, UsageError
from mlip_cli.recipe.config import Source

CAPTIONS = [f"picture number {i}" for i in range(20)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "set" / "train", n=20, shard_size=8, captions=CAPTIONS)


def overwrite(path: Path, at: int, content: bytes) -> None:
    """Change bytes in place: same size, as a failing disk does."""
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(content)


def rewrite_index(shard: Path, records: np.ndarray) -> None:
    """Change records of an index of the first format, which has no checksums."""
    header = np.fromfile(index_path(shard), HEADER, count=1)
    header["magic"], header["crc32"] = WITHOUT_CHECKSUMS, 0
    overwrite(index_path(shard), 0, header.tobytes() + records.tobytes())


def record_of(shard: Path, row: int) -> np.void:
    return np.fromfile(index_path(shard), RECORD, offset=HEADER.itemsize)[row]


@pytest.mark.parametrize("image_format", ["jpg", "png", "webp"])
def test_reads_what_tarfile_reads(tmp_path: Path, image_format: str) -> None:
    folder = make_dataset(tmp_path / "x", n=11, shard_size=4, image_format=image_format)
    dataset = open_prepared(folder)
    assert (dataset.num_samples, dataset.num_shards) == (11, 3)
    assert dataset.fingerprint == json.loads((folder / "dataset.json").read_text())["fingerprint"]
    for id in (10, 3, 4, 0, 7):
        sample = dataset.read(id)
        with tarfile.open(sample.shard) as tar:
            assert tar.extractfile(f"{sample.key}.{image_format}").read() == sample.image
            fields = json.loads(tar.extractfile(f"{sample.key}.json").read())
        assert [asdict(caption) for caption in sample.captions] == fields["captions"]
        assert (sample.info.label, sample.info.meta) == (fields["class"], fields["meta"])
        assert sample.key == f"00-{id:06d}"
        assert sample.shard == str(folder / f"train-{id // 4:06d}.tar")


def test_number_of_tokens_is_that_of_the_longest_caption(tmp_path: Path) -> None:
    dataset, tokenizer = open_prepared(make_dataset(tmp_path / "x", n=9, captions=3)), Tokenizer(77)
    expected = [max(tokenizer.count(caption.text) for caption in dataset.read(id).captions) for id in range(9)]
    assert dataset.num_tokens(np.arange(9)).tolist() == expected


def test_an_id_outside(folder: Path) -> None:
    for id in (-1, 20):
        with pytest.raises(IndexError, match=f"sample {id} of 20"):
            open_prepared(folder).read(id)


def test_few_shards_are_open_at_a_time(folder: Path) -> None:
    dataset = open_prepared(folder)
    dataset.keep_open(2)
    before = len(os.listdir("/dev/fd"))
    for id in (0, 8, 16, 1, 17, 9, 0):
        assert dataset.read(id).captions[0].text == CAPTIONS[id]
    assert len(os.listdir("/dev/fd")) - before == 4  # of each shard the tar and its index
    dataset.close()
    assert len(os.listdir("/dev/fd")) == before


def opened_by(work: Callable[[], object]) -> int:
    """How many files a piece of work opens."""
    opened: list[object] = []
    is_on = [True]
    sys.addaudithook(lambda event, arguments: opened.append(arguments) if is_on[0] and event == "open" else None)
    work()
    is_on[0] = False
    return len(opened)


def test_all_shards_stay_open_as_far_as_the_limit_lets_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_OPEN_SHARDS", 1)
    monkeypatch.setattr(module, "OTHER_FILES", 100)
    dataset, other = open_prepared(folder), open_prepared(folder)
    everything = [id for _ in range(3) for id in (0, 8, 16)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def read(of: ShardDataset) -> Callable[[], object]:
        return lambda: [of.read(id) for id in everything]

    assert opened_by(read(dataset)) == 2 * 9  # the tar and its index, each time
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
        keep_open([dataset, other])
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (100 + 2 * 6, hard)
        assert opened_by(read(dataset)) == opened_by(read(other)) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    dataset.close()
    monkeypatch.setattr(module, "allow_open_files", lambda _: 16)  # half for shards
    keep_open([dataset, other])  # two shards for each
    assert opened_by(lambda: dataset.read(0)) == 2
    assert opened_by(lambda: [dataset.read(id) for id in (8, 0, 8)]) == 2
    assert opened_by(lambda: dataset.read(16)) == 2
    assert opened_by(lambda: dataset.read(0)) == 2


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="only Linux can read ahead")
def test_samples_are_asked_for_ahead_of_reading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_prepared(folder)
    asked: list[tuple[int, int]] = []
    read: list[tuple[int, int]] = []
    advise, pread = os.posix_fadvise, os.pread
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *range: asked.append(range[:2]) or advise(fd, *range))
    monkeypatch.setattr(os, "pread", lambda fd, size, at: read.append((at, size)) or pread(fd, size, at))
    dataset.read_ahead([3, 12])
    assert read == []
    assert [dataset.read(id).captions[0].text for id in (3, 12)] == [CAPTIONS[3], CAPTIONS[12]]
    assert asked == read


def test_a_damaged_index_does_not_disturb_reading_ahead(folder: Path) -> None:
    shard = folder / "train-000000.tar"
    records = np.fromfile(index_path(shard), RECORD, offset=HEADER.itemsize)
    records["offset"][1] = 2**64 - 1
    rewrite_index(shard, records)
    open_prepared(folder).read_ahead(range(8))


def test_travels_to_another_process_without_its_open_files(folder: Path) -> None:
    dataset = open_prepared(folder)
    sample = dataset.read(12)
    copy = pickle.loads(pickle.dumps(dataset))  # noqa: S301 - our own bytes
    dataset.close()
    assert copy.read(12) == sample
    assert dataset.read(12) == sample


def test_a_damaged_header_is_a_bad_sample_and_the_others_stay_good(folder: Path) -> None:
    shard = folder / "train-000000.tar"
    record = record_of(shard, 3)
    overwrite(shard, int(record["offset"]) + int(record["json_offset"]) - 512, b"99-999999")
    dataset = open_prepared(folder)
    with pytest.raises(BadSampleError) as error:
        dataset.read(3)
    place = f"at byte {record['offset']}"
    at = int(record["offset"]) + int(record["json_offset"]) - 512
    assert str(error.value) == f"{shard}: sample {place}: no tar header at byte {at}: its checksum is wrong"
    assert [dataset.read(id).captions[0].text for id in (2, 4)] == [CAPTIONS[2], CAPTIONS[4]]


def test_a_damaged_record_is_a_bad_sample(folder: Path) -> None:
    shard = folder / "train-000000.tar"
    record = record_of(shard, 3)
    overwrite(shard, int(record["offset"]) + int(record["json_offset"]), b"[1, ")
    with pytest.raises(BadSampleError) as error:
        open_prepared(folder).read(3)
    assert str(error.value) == (
        f"{shard}: sample 00-000003: its bytes are not those that mlip prepare-data wrote: its checksum is wrong"
    )
    give_checksums(shard)
    with pytest.raises(BadSampleError, match=r"train-000000.tar: sample 00-000003: KEY.json is not JSON$"):
        open_prepared(folder).read(3)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("offset", 2**63, "the index places it behind the end of the shard"),
        ("image_size", 2**32 - 1, "the index places it behind the end of the shard"),
        ("format", 7, "the index names picture format 7; formats are 0 to 2"),
    ],
)
def test_a_damaged_index_record_is_a_bad_sample(folder: Path, field: str, value: int, reason: str) -> None:
    shard = folder / "train-000000.tar"
    records = np.fromfile(index_path(shard), RECORD, offset=HEADER.itemsize)
    records[field][1] = value
    rewrite_index(shard, records)
    with pytest.raises(BadSampleError) as error:
        open_prepared(folder).read(1)
    assert str(error.value) == f"{shard}: sample at byte {records['offset'][1]}: {reason}"


def test_swapped_samples_are_bad_samples_not_wrong_pairs(folder: Path) -> None:
    """A picture of one sample beside the caption of another, with whole headers, as a wrong index would pair them."""
    shard = folder / "train-000000.tar"
    records = np.fromfile(index_path(shard), RECORD, offset=HEADER.itemsize)
    distance = int(records["offset"][2] - records["offset"][1])
    records["image_offset"][1] += distance
    records["image_size"][1] = records["image_size"][2]
    rewrite_index(shard, records)
    with pytest.raises(BadSampleError) as error:
        open_prepared(folder).read(1)
    place = f"at byte {records['offset'][1]}"
    assert str(error.value) == f"{shard}: sample {place}: its parts belong to 00-000001 and 00-000002"


def test_an_index_of_another_shard(folder: Path) -> None:
    """Two tars of the same size, exchanged: every sample is bad or its own, never another's caption."""
    a, b = folder / "train-000000.tar", folder / "train-000001.tar"
    swapped = a.with_suffix(".swap")
    size = max(a.stat().st_size, b.stat().st_size)
    a.rename(swapped), b.rename(a), swapped.rename(b)
    for path in (a, b):
        os.truncate(path, size)
        header = np.fromfile(index_path(path), HEADER, count=1)
        header["tar_bytes"] = size
        overwrite(index_path(path), 0, header.tobytes())
    dataset = open_prepared(folder)
    num_bad = 0
    for id in range(16):
        try:
            sample = dataset.read(id)
            assert sample.captions[0].text == CAPTIONS[int(sample.key[-6:])]
        except BadSampleError:
            num_bad += 1
    assert num_bad > 0


def test_a_cut_shard(folder: Path) -> None:
    shard = folder / "train-000001.tar"
    size = shard.stat().st_size
    os.truncate(shard, size // 2)
    with pytest.raises(RunError) as error:
        open_prepared(folder)
    assert str(error.value) == (
        f"{shard}: {size // 2} bytes where the index says {size}; "
        "the shard was cut or changed: prepare the data again (mlip prepare-data)"
    )


def test_a_shard_cut_while_in_use(folder: Path) -> None:
    dataset = open_prepared(folder)
    dataset.read(8)
    os.truncate(folder / "train-000001.tar", 4000)
    with pytest.raises(BadSampleError, match=r"the shard ends \d+ bytes too early"):
        dataset.read(15)


def test_a_shard_without_index_or_of_another_length(folder: Path) -> None:
    index = index_path(folder / "train-000002.tar")
    index.rename(index.with_suffix(".away"))
    with pytest.raises(RunError, match=r"train-000002.idx: no index for train-000002.tar; prepare the data again"):
        open_prepared(folder)
    shutil.copy(folder / "train-000001.tar", folder / "train-000002.tar")
    index_shard(folder / "train-000002.tar", [8] * 8)
    with pytest.raises(
        RunError, match=r"train-000002.idx: 8 samples where dataset.json says 4; prepare the data again"
    ):
        open_prepared(folder)


def message(folder: Path) -> str:
    with pytest.raises(UsageError) as error:
        open_sources((Source(path=str(folder)),))
    return str(error.value)


def test_missing_folders(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a clone in which the demo ran has data/openmoji
    assert message(Path("data/openmoji/train")) == (
        "data/openmoji/train: no such folder; make it with: mlip prepare-data openmoji data/openmoji"
    )
    assert message(Path("data/cc3m/train")) == (
        "data/cc3m/train: no such folder; make it with: mlip prepare-data Train_GCC-training.tsv data/cc3m "
        "--preset cc3m"
    )
    assert message(Path("data/own/train")) == (
        "data/own/train: no such folder; make it with: mlip prepare-data SOURCE data/own"
    )
    above = folder.parent
    assert message(above) == f"{above}: no dataset.json here, but in {folder}; name one of these"
    file = tmp_path / "pictures.csv"
    file.write_text("a,b\n")
    assert message(file) == f"{file}: a file, not a folder of shards; prepare it: mlip prepare-data {file} OUT"
    (folder / "dataset.json").unlink()
    assert message(folder) == f"{folder}: shards without dataset.json; prepare it: mlip prepare-data {folder} OUT"
    for index in folder.glob("*.idx"):
        index.unlink()
    assert message(folder).startswith(f"{folder}: tars without index; prepare them: mlip prepare-data {folder} OUT, ")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert message(empty) == f"{empty}: no dataset.json; prepare it: mlip prepare-data {empty} OUT"


def test_a_dataset_json_that_mlip_did_not_write(folder: Path) -> None:
    card = folder / "dataset.json"
    card.write_text('{"shards": [{"n": 1}]}')
    assert message(folder) == (f"{card}: not written by mlip prepare-data (KeyError('name')); prepare the data again")
    card.write_text('{"shards": [], "fingerprint": "0"}')
    assert message(folder) == f"{folder}: the data set holds no samples; prepare it again (mlip prepare-data)"


def test_several_sources(tmp_path: Path, folder: Path) -> None:
    other = make_dataset(tmp_path / "other", n=4, seed=1)
    found = open_sources((Source(path=str(folder)), Source(path=str(other), weight=2.0)))
    assert [dataset.num_samples for dataset in found] == [20, 4]
    assert found[1].read(0).key == "01-000000"
