"""Shards at URLs: fetched whole and checked, shared by processes, refused where they exceed the cache."""

import json
import multiprocessing
import os
import pwd
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations
from locks_for_tests import held_elsewhere
from models_for_tests import small_recipe
from shards_for_tests import batches_of, make_dataset

from mlip_cli.data import remote as module
from mlip_cli.data import transfers
from mlip_cli.data.cache import ShardCache
from mlip_cli.data.dataset import ShardDataset
from mlip_cli.data.open import open_prepared, open_sources
from mlip_cli.data.order import Order
from mlip_cli.errors import RunError, UsageError
from mlip_cli.evaluate.validation import evaluation_loader
from mlip_cli.files import GIB
from mlip_cli.recipe.config import Cache, Data, Source
from mlip_cli.recipe.load import absolute_paths
from mlip_cli.terminal.output import size_in_words
from mlip_cli.train.facts import preflight
from mlip_cli.types import Batch

N, G = 40, 8
CURE = "check network and credentials, then try again"


class Trouble:
    """Failures of fsspec's memory file system that a test orders, and the files it was asked for."""

    def __init__(self) -> None:
        self.fails: Callable[[str], Exception | None] = lambda _: None
        """File name -> the error that opening it raises."""
        self.asked: list[str] = []
        self.url = "memory://bucket/train"

    def content(self, name: str) -> bytes:
        return bytes(MemoryFileSystem().cat_file(f"/bucket/train/{name}"))

    def replace(self, name: str, content: bytes) -> None:
        MemoryFileSystem().pipe_file(f"/bucket/train/{name}", content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "elsewhere" / "train", n=N, shard_size=8)


@pytest.fixture
def trouble(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trouble]:
    """The folder in memory, where tests decide what goes wrong."""
    made = Trouble()
    for path in folder.iterdir():
        made.replace(path.name, path.read_bytes())

    def spied(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: MemoryFileSystem, path: str, *arguments: Any, **options: Any) -> Any:
            name = path.rpartition("/")[2]
            made.asked.append(name)
            if error := made.fails(name):
                raise error
            return method(self, path, *arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("open", "cat_file"):
            patch.setattr(MemoryFileSystem, name, spied(getattr(MemoryFileSystem, name)))
        yield made
    MemoryFileSystem.store.clear()


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(folder=str(tmp_path / "cache"))


def opened(url: str, cache: Cache) -> ShardDataset:
    [dataset] = open_sources([Source(path=url)], cache=cache)
    return dataset


def copies(cache: Cache, pattern: str = "*.tar") -> set[str]:
    return {path.name for path in Path(cache.folder or "").glob(f"*/{pattern}")}


def batches(dataset: ShardDataset, *, start: int = 0, stop: int = 5, num_workers: int = 0) -> list[Batch]:
    return list(batches_of(dataset, range(start, stop), batch_size=G, num_workers=num_workers, image_size=16))


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_those_of_the_folder_itself(folder: Path, cache: Cache, num_workers: int) -> None:
    here, there = open_prepared(folder), opened(f"file://{folder}/", cache)
    assert (there.fingerprint, there.num_samples) == (here.fingerprint, N)
    assert (there.name, there.place, here.place) == (f"file://{folder}", f"file://{folder}", str(folder.resolve()))
    assert np.array_equal(there.num_tokens(range(N)), here.num_tokens(range(N)))
    for a, b in zip(batches(here), batches(there, num_workers=num_workers), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.token_ids, b.token_ids)
        assert a.keys == b.keys
    [a], [b] = (
        list(evaluation_loader(d, data=Data(train=(), image_size=16), batch_size=N, num_workers=0))
        for d in (here, there)
    )
    assert torch.equal(a, b)


@pytest.mark.parametrize("form", ["file://{folder}", "file://elsewhere/train"])
def test_a_folder_of_a_shared_disk_is_staged_and_then_not_read_again(
    tmp_path: Path, folder: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = batches(open_prepared(folder))
    dataset = opened(form.format(folder=folder), cache)
    dataset.fetch()
    shutil.rmtree(folder)
    for a, b in zip(expected, batches(dataset), strict=True):
        assert torch.equal(a.images, b.images)
        assert a.keys == b.keys
    assert Path(dataset.read(0).shard).is_relative_to(cache.folder or "")


def test_opening_fetches_indexes_and_reading_the_shard(trouble: Trouble, cache: Cache, capsys: Any) -> None:
    dataset = opened(trouble.url, cache)
    assert copies(cache) == set()
    assert len(copies(cache, "*.idx")) == 5
    assert preflight([dataset], Order([N], None, seed=0, global_batch_size=G), 1)[0] == (
        f"{trouble.url}: 40 samples in 5 shards"
    )
    assert copies(cache) == {"train-000000.tar"}
    assert dataset.read(17).key == "00-000017"
    assert copies(cache) == {"train-000000.tar", "train-000002.tar"}
    trouble.asked.clear()
    again = opened(trouble.url, cache)
    assert again.read(17) == dataset.read(17)
    assert trouble.asked == ["dataset.json"]


def test_a_run_fetches_every_shard_before_its_first_batch_and_then_asks_for_nothing(
    trouble: Trouble, cache: Cache
) -> None:
    dataset = opened(trouble.url, cache)
    trouble.asked.clear()
    found = iter(batches(dataset, stop=1))
    assert sorted(trouble.asked) == sorted(copies(cache)) == [f"train-00000{i}.tar" for i in range(5)]
    trouble.asked.clear()
    next(found)
    batches(dataset, start=1)
    assert trouble.asked == []


def test_what_an_interrupted_run_fetched_is_not_fetched_again(trouble: Trouble, cache: Cache) -> None:
    trouble.fails = lambda name: KeyboardInterrupt() if name == "train-000004.tar" else None
    with pytest.raises(KeyboardInterrupt):
        opened(trouble.url, cache).fetch(range(5))
    there = copies(cache)
    trouble.fails = lambda _: None
    trouble.asked.clear()
    opened(trouble.url, cache).fetch()
    assert "train-000004.tar" not in there
    assert sorted(trouble.asked) == sorted({"dataset.json", *copies(cache)} - there)


def test_a_failure_that_passes_is_not_seen_where_the_backend_does_not_retry(
    trouble: Trouble, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "https" in transfers.WITHOUT_RETRIES
    monkeypatch.setattr(transfers, "WITHOUT_RETRIES", ("memory",))
    monkeypatch.setattr(transfers, "WAITS_S", (0.0, 0.0))
    left = {"train-000003.tar": 2, "train-000001.idx": 1}

    def fails(name: str) -> Exception | None:
        left[name] = left.get(name, 0) - 1
        return ConnectionResetError("reset by peer") if left[name] >= 0 else None

    trouble.fails = fails
    opened(trouble.url, cache).fetch()
    assert len(copies(cache)) == 5
    assert trouble.asked.count("train-000003.tar") == 3


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "train-000003.tar",
            ConnectionError("no route\nto host"),
            f"no route; {CURE}",
        ),
        ("train-000003.tar", ValueError(), f"ValueError; {CURE}"),
        (
            "train-000001.idx",
            PermissionError("Forbidden"),
            f"Forbidden; {CURE}",
        ),
        ("train-000002.tar", FileNotFoundError("x"), "no such file; upload it again"),
    ],
)
def test_a_failure_that_stays_is_one_line_with_the_url(
    trouble: Trouble, cache: Cache, name: str, error: Exception, message: str
) -> None:
    trouble.fails = lambda asked: error if asked == name else None
    with pytest.raises(RunError) as found:
        opened(trouble.url, cache).fetch()
    assert str(found.value) == f"{trouble.url}/{name}: {message}"
    assert trouble.asked.count(name) == 1
    assert copies(cache, ".*.tmp") == set()
    trouble.fails = lambda _: None
    opened(trouble.url, cache).fetch()
    assert len(copies(cache)) == 5


def test_wrong_content_never_gets_its_name(trouble: Trouble, cache: Cache) -> None:
    for name in ("train-000001.tar", "train-000002.idx"):
        content = bytearray(trouble.content(name))
        content[30] ^= 1
        trouble.replace(name, bytes(content))
    with pytest.raises(RunError) as error:
        opened(trouble.url, cache)
    assert str(error.value) == (
        f"{trouble.url}/train-000002.idx: not the index of train-000002.tar in dataset.json; upload it again"
    )
    trouble.replace("train-000002.idx", trouble.content("train-000003.idx"))
    with pytest.raises(RunError, match=r"not the index of train-000002\.tar in dataset\.json"):
        opened(trouble.url, cache)
    assert "train-000002.idx" not in copies(cache, "*.idx")


def test_a_shard_with_another_sha256(trouble: Trouble, cache: Cache) -> None:
    content = bytearray(trouble.content("train-000001.tar"))
    content[-1] ^= 1
    trouble.replace("train-000001.tar", bytes(content))
    dataset = opened(trouble.url, cache)
    with pytest.raises(RunError) as error:
        dataset.read(9)
    shard = dataset.card["shards"][1]
    assert str(error.value).startswith(f"{trouble.url}/train-000001.tar: {shard['bytes']} bytes with sha256 ")
    assert str(error.value).endswith(
        f"... where dataset.json says {shard['bytes']} with {shard['sha256'][:12]}...; upload the shard again"
    )
    assert copies(cache) == set()


def test_a_copy_that_was_cut_is_fetched_again(trouble: Trouble, cache: Cache) -> None:
    dataset = opened(trouble.url, cache)
    expected = dataset.read(9)
    dataset.close()
    os.truncate(dataset.tars[1], 1000)
    os.truncate(dataset.indexes[3], 100)
    assert opened(trouble.url, cache).read(9) == expected


def test_names_that_lead_out_of_the_cache_are_refused(trouble: Trouble, cache: Cache, tmp_path: Path) -> None:
    card = json.loads(trouble.content("dataset.json"))
    for name in ("../../x.tar", "/tmp/x.tar", ".x.tar", "a/b.tar", "x.py"):
        card["shards"][1]["name"] = name
        trouble.replace("dataset.json", json.dumps(card).encode())
        with pytest.raises(UsageError) as error:
            opened(trouble.url, cache)
        assert str(error.value) == (
            f"{trouble.url}/dataset.json: no plain name, sizes and sha256 of shard {name!r}; prepare it again"
        )
    assert not (tmp_path / "cache").exists()


def test_urls_without_a_data_set_are_refused(trouble: Trouble, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def message(url: str) -> str:
        with pytest.raises(UsageError) as error:
            opened(url, cache)
        return str(error.value)

    assert message("memory://bucket") == (
        "memory://bucket: no dataset.json there; correct the URL, or upload a folder that mlip prepare-data wrote "
        "(OUT/train, say)"
    )
    assert message("nonsense://bucket/train") == (
        "nonsense://bucket/train: fsspec knows no protocol nonsense://; copy the data to a disk"
    )
    monkeypatch.setitem(known_implementations, "far", {"class": "far_fs.FarFileSystem", "err": "Install far_fs"})
    assert message("far://bucket") == "far://bucket: far:// needs another package; pip install far_fs"
    trouble.replace("dataset.json", b"<html>")
    assert message(trouble.url).startswith(
        f"{trouble.url}/dataset.json: not written by mlip prepare-data (JSONDecodeError"
    )


def tar_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.tar"))


def test_data_that_the_cache_cannot_hold_are_refused_at_once(trouble: Trouble, folder: Path, cache: Cache) -> None:
    small = cache.model_copy(update={"gib": tar_bytes(folder) * 1.5 / GIB})
    opened(trouble.url, small)
    with pytest.raises(UsageError) as error:
        open_sources([Source(path=trouble.url), Source(path=f"file://{folder}")], cache=small)
    assert str(error.value) == (
        f"data.cache.gib: {small.gib:g} is less than the {size_in_words(2 * tar_bytes(folder))} of {trouble.url}, "
        f"file://{folder}, which a run fetches whole; set it to 1 or more, or copy the data to a disk that all nodes "
        "see"
    )
    # for validation, beside what training reads
    with pytest.raises(UsageError, match=r"[KM]iB of memory:.*, file://"):
        open_sources([Source(path=f"file://{folder}")], cache=small, beside=[opened(trouble.url, small)])
    assert copies(cache) == set()


def test_what_exceeds_the_cache_is_refused_and_what_may_be_deleted_is_named(tmp_path: Path, cache: Cache) -> None:
    urls = [f"file://{make_dataset(tmp_path / f'set{i}', n=16, shard_size=4, seed=i)}" for i in range(3)]
    own = tar_bytes(tmp_path / "set0")
    room = cache.model_copy(update={"gib": own * 2.6 / GIB})
    first, second, third = (opened(url, room) for url in urls)
    first.fetch()
    second.fetch()
    with pytest.raises(RunError) as error:
        third.fetch()
    before, deletable = str(error.value).split("; set it higher, or delete folders that no run reads ")
    assert before == (
        f"data.cache.gib: {cache.folder} holds {size_in_words(2 * own)} of shards, and "
        f"{size_in_words(own)} more exceed the {room.gib:g} allowed"
    )
    assert sorted(re.split(r"(?<=iB), ", deletable.strip("()"))) == sorted(
        f"{dataset.remote.folder.name} from {dataset.name}, {size_in_words(own)}" for dataset in (first, second)
    )
    assert [len(list(dataset.remote.folder.glob("*.tar"))) for dataset in (first, second, third)] == [4, 4, 0]
    shutil.rmtree(first.remote.folder)
    third.fetch()
    assert third.read(15).key == "02-000015"


def read_all(url: str, cache: Cache, keys: Any, fetched: Any) -> None:
    fetch_file = module.RemoteShards._fetch_file

    def spied(self: module.RemoteShards, name: str, transfers: transfers.Transfers) -> None:
        fetched.put(name)
        fetch_file(self, name, transfers)

    module.RemoteShards._fetch_file = spied  # type: ignore[method-assign]
    dataset = opened(url, cache)
    dataset.fetch()
    keys.put([dataset.read(id).key for id in range(N)])


@pytest.mark.slow
def test_processes_fetch_a_shard_once(folder: Path, cache: Cache) -> None:
    context = multiprocessing.get_context("fork")
    keys, fetched = context.Queue(), context.Queue()
    processes = [context.Process(target=read_all, args=(f"file://{folder}", cache, keys, fetched)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [keys.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert found == [[f"00-{i:06d}" for i in range(N)]] * 4
    assert sorted(fetched.get(timeout=5) for _ in range(10)) == sorted(copies(cache) | copies(cache, "*.idx"))
    assert fetched.empty()
    assert copies(cache, ".*.tmp") == set()


def test_a_second_process_waits_for_the_first_and_fetches_nothing(
    trouble: Trouble, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = opened(trouble.url, cache)
    caplog.clear()  # opening fetched the indexes
    with caplog.at_level("INFO", logger="mlip_cli"):
        waiting = threading.Thread(target=dataset.fetch)
        with held_elsewhere(Path(cache.folder or "") / "lock"):
            waiting.start()
            waiting.join(0.2)
            assert waiting.is_alive()
            for shard in dataset.card["shards"]:
                (dataset.remote.folder / shard["name"]).write_bytes(trouble.content(shard["name"]))
            trouble.asked.clear()
        waiting.join()
    assert caplog.messages == [f"another process writes to {cache.folder}; waiting for it"]
    assert trouble.asked == []
    assert dataset.read(39).key == "00-000039"


def test_half_written_files_of_a_killed_process_are_removed(trouble: Trouble, cache: Cache) -> None:
    dataset = opened(trouble.url, cache)
    torn = dataset.remote.folder / ".train-000001.tar.12345.tmp"
    torn.write_bytes(b"half")
    dataset.read(0)
    assert not torn.exists()


def test_a_full_disk_is_reported(trouble: Trouble, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = opened(trouble.url, cache)
    trouble.fails = lambda _: OSError(28, "No space left on device")
    with pytest.raises(RunError, match=r"cache: No space left on device; make room, or set data\.cache\.folder$"):
        dataset.fetch()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1024})())
    with pytest.raises(RunError, match=r"[KM]iB needed, 1\.0 KiB free on this disk; make room, or set data"):
        dataset.fetch()


def test_a_cache_that_cannot_be_made(trouble: Trouble, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError) as error:
        opened(trouble.url, Cache(folder=str(tmp_path / "file" / "cache")))
    assert str(error.value) == (
        f"data.cache.folder: {tmp_path}/file/cache: Not a directory; name a folder on a local disk of this machine"
    )


def test_the_users_own_cache(trouble: Trouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    [dataset] = open_sources([Source(path=trouble.url)])
    assert dataset.remote.folder.parent == tmp_path / "own" / "mlip"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    [dataset] = open_sources([Source(path=trouble.url)], cache=Cache())
    assert dataset.remote.folder.parent == tmp_path / "home" / ".cache" / "mlip"


def test_a_user_without_an_account_and_a_home_is_told_to_name_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_account(key: object) -> None:
        raise KeyError(key)

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("getpwuid", "getpwnam"):
        monkeypatch.setattr(pwd, name, no_account)
    with pytest.raises(UsageError) as error:
        ShardCache.of(Cache())
    assert str(error.value) == (
        "data.cache.folder: this account has no home folder for a cache; set it, or $XDG_CACHE_HOME, to a folder"
    )


def test_urls_of_a_recipe_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = small_recipe(data={"train": ["s3://bucket/x", "here"], "cache": {"folder": "c"}})
    found = absolute_paths(recipe).data
    assert [source.path for source in found.train] == ["s3://bucket/x", str(tmp_path / "here")]
    assert found.cache.folder == str(tmp_path / "c")
    assert absolute_paths(small_recipe()).data.cache.folder is None
