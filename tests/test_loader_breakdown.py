"""What a sample costs the training loader, part by part."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import small_recipe
from shards_for_tests import make_dataset

from mlip_cli.data import loader
from mlip_cli.data.dataset import ShardDataset
from mlip_cli.data.open import open_prepared, open_sources
from mlip_cli.profiling import loader as loader_breakdown
from mlip_cli.profiling.loader import batch_seconds, measure_loader
from mlip_cli.profiling.result import LoaderFacts


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def data(tmp_path: Path) -> ShardDataset:
    return open_prepared(make_dataset(tmp_path / "data", n=20))


def test_every_part_is_timed_on_one_thread(
    data: ShardDataset, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    decode = loader.decode

    def spied(image: bytes, **options: Any) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return decode(image, **options)

    monkeypatch.setattr(loader, "decode", spied)
    cost = measure_loader(small_recipe(), [data], num_workers=2)
    assert set(seen) == {1}
    assert torch.get_num_threads() == 2
    assert list(cost.sample_seconds) == ["read", "decode", "transform", "tokenize and collate"]
    assert all(seconds > 0 for seconds in cost.sample_seconds.values())
    assert cost.num_samples == 12 * 20
    assert len(seen) == 13 * 20  # the first batch is not timed
    assert cost.bad_samples == 0


def test_seconds_are_those_of_one_sample(data: ShardDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def slow(function: Any, seconds: float) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal now
            now += seconds
            return function(*arguments, **named)

        return call

    class Time:
        perf_counter = thread_time = staticmethod(lambda: now)

    monkeypatch.setattr(loader_breakdown, "time", Time)
    monkeypatch.setattr(ShardDataset, "read", slow(ShardDataset.read, 1))
    monkeypatch.setattr(loader, "decode", slow(loader.decode, 2))
    monkeypatch.setattr(loader, "training_transform", slow(loader.training_transform, 4))
    monkeypatch.setattr(loader, "_choose_captions", slow(loader._choose_captions, 8))
    cost = measure_loader(small_recipe(), [data], num_workers=2)
    assert cost.sample_seconds == {"read": 1, "decode": 2, "transform": 4, "tokenize and collate": 8}
    assert cost.loader_images_per_s == 2 / 15


def test_tars_as_they_are_cost_the_same_parts(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "data", n=20)
    for path in (*folder.glob("*.idx"), folder / "dataset.json"):
        path.unlink()
    sources = {"train": [{"path": str(folder), "format": "webdataset"}], "cache": {"folder": str(tmp_path / "cache")}}
    recipe = small_recipe(data=sources)
    cost = measure_loader(recipe, open_sources(recipe.data.train, cache=recipe.data.cache), num_workers=0)
    assert cost.num_samples == 12 * 20
    assert all(seconds > 0 for seconds in cost.sample_seconds.values())


def test_a_bad_sample_is_replaced_and_counted(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "data", n=20, shard_size=20)
    data = open_prepared(folder)
    image = data.read(7).image
    data.close()
    [shard] = folder.glob("*.tar")
    content = shard.read_bytes()
    shard.write_bytes(content.replace(image, bytes(len(image))))
    recipe = small_recipe(data={"train": str(folder), "max_bad_share": 1.0})
    assert measure_loader(recipe, [data], num_workers=0).bad_samples >= 12  # once in every epoch that is timed


@pytest.mark.parametrize(("processes", "share"), [(0, 6), (1, 6), (2, 3)])
def test_processes_share_a_batch(processes: int, share: float) -> None:
    seconds = {"read": 1.0, "decode": 3.0}
    facts = LoaderFacts(
        num_samples=1, bad_samples=0, sample_seconds=seconds, loader_processes=processes, loader_images_per_s=1
    )
    assert batch_seconds(facts, 6) == {"read": share, "decode": 3 * share}
