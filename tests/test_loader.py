"""Batches depend on (seed, step) alone: not on workers, ranks or where a run was resumed."""

import multiprocessing
import os
import pickle
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from multiprocessing import resource_sharer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks_for_tests import FORKS
from shards_for_tests import give_checksums, make_dataset
from torch.utils.data import DataLoader, Dataset

from mlip_cli.data import bad_samples, loader_processes, pictures, workers
from mlip_cli.data import loader as module
from mlip_cli.data.dataset import ShardDataset
from mlip_cli.data.index import HEADER, RECORD, index_path
from mlip_cli.data.loader import label_of, training_loader
from mlip_cli.data.loader_processes import data_loader, items_of
from mlip_cli.data.open import open_prepared
from mlip_cli.data.order import Order
from mlip_cli.data.pictures import open_picture
from mlip_cli.data.tokenizer import Tokenizer
from mlip_cli.data.transforms import decode, evaluation_transform
from mlip_cli.devices import full_memory_named
from mlip_cli.errors import RunError, UsageError
from mlip_cli.evaluate.validation import evaluation_loader
from mlip_cli.profiling import subject as profile_subject
from mlip_cli.recipe.config import Augment, Data, Source
from mlip_cli.train.facts import preflight
from mlip_cli.types import Batch

G = 8
AUGMENT = Augment(crop_scale=(0.3, 1.0), flip=True, color_jitter=0.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "train", n=42, size=(24, 20), captions=3)


def batches(
    datasets: Sequence[ShardDataset],
    start: int = 0,
    stop: int = 8,
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    context_length: int = 24,
    with_labels: bool = False,
    with_other_crop: bool = False,
    pin_memory: bool = False,
    **data: Any,
) -> Iterator[Batch]:
    settings = {"augment": AUGMENT, "image_size": 16} | data
    order = Order([d.num_samples for d in datasets], weights, seed=seed, global_batch_size=G)
    return training_loader(
        datasets,
        order,
        data=Data(train=(Source(path="unused"),), **settings),
        tokenizer=Tokenizer(context_length),
        rank=rank,
        world_size=world_size,
        steps=range(start, stop),
        num_workers=num_workers,
        with_labels=with_labels,
        with_other_crop=with_other_crop,
        pin_memory=pin_memory,
    )


def assert_equal(a: Batch, b: Batch) -> None:
    assert a.tensors().keys() == b.tensors().keys()
    for name, tensor in a.tensors().items():
        assert torch.equal(tensor, b.tensors()[name]), name
    assert (a.keys, a.bad_samples) == (b.keys, b.bad_samples)


def spoil(folder: Path, row: int, part: str = "image") -> None:
    """Overwrite a sample's picture (or record) with zeros, as if it had been written so."""
    shards = sorted(folder.glob("*.tar"))
    for shard in shards:
        records = np.fromfile(index_path(shard), RECORD, offset=HEADER.itemsize)
        if row < len(records):
            break
        row -= len(records)
    record = records[row]
    at, size = int(record["offset"]) + int(record[f"{part}_offset"]), int(record[f"{part}_size"])
    with open(shard, "r+b") as file:
        file.seek(at)
        file.write(bytes(size))
    give_checksums(shard)


def test_shapes(folder: Path) -> None:
    found = list(batches([open_prepared(folder)], 0, 3))
    assert len(found) == 3
    for batch in found:
        assert (batch.images.shape, batch.images.dtype) == ((G, 3, 16, 16), torch.uint8)
        assert (batch.token_ids.shape[0], batch.token_ids.dtype) == (G, torch.int64)
        assert len(set(batch.keys)) == G
        assert batch.bad_samples == ()


@pytest.mark.slow
@pytest.mark.parametrize("samples", [1, 3, 5])
@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("captions_per_image", [1, 2])
def test_parts_of_any_size_give_the_batches_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: int, num_workers: int, captions_per_image: int
) -> None:
    """With a sample that is replaced, labels and a second crop; also where a run is resumed, and on two ranks."""
    folder = make_dataset(tmp_path / "x", n=40, captions=3)
    spoil(folder, 21)
    options = {"with_labels": True, "with_other_crop": True, "captions_per_image": captions_per_image}
    expected = list(batches([open_prepared(folder)], 0, 6, **options))
    assert sum(len(batch.bad_samples) for batch in expected) >= 1
    handed = []
    items_of_steps = module._Parts.of_steps

    def recorded(*arguments: Any) -> Iterator[Any]:
        for item in items_of_steps(*arguments):
            handed.append(len(item.t))
            yield item

    monkeypatch.setattr(module._Parts, "of_steps", recorded)
    sample_bytes = 2 * 3 * 16 * 16 + 8 * (captions_per_image * 24 + 1)
    monkeypatch.setattr(workers, "ITEM_BYTES", samples * sample_bytes)
    options["num_workers"] = num_workers
    for a, b in zip(expected, batches([open_prepared(folder)], 0, 6, **options), strict=True):
        assert_equal(a, b)
    assert max(handed) == samples if samples < 5 else handed == [4] * 12  # 8 = 5 + 3 would be uneven
    assert sum(handed) == 6 * G
    for a, b in zip(expected[4:], batches([open_prepared(folder)], 4, 6, **options), strict=True):
        assert_equal(a, b)
    ranks = [batches([open_prepared(folder)], 0, 6, rank=rank, world_size=2, **options) for rank in range(2)]
    for whole, *shares in zip(expected, *ranks, strict=True):
        for name, tensor in whole.tensors().items():
            assert torch.equal(tensor, torch.cat([share.tensors()[name] for share in shares]))
        assert whole.keys == shares[0].keys + shares[1].keys
        assert whole.bad_samples == shares[0].bad_samples + shares[1].bad_samples


@pytest.mark.slow
@pytest.mark.parametrize("weights", [None, (1.0, 2.0)])
def test_workers_change_nothing(tmp_path: Path, folder: Path, weights: tuple[float, ...] | None) -> None:
    datasets = [open_prepared(folder), open_prepared(make_dataset(tmp_path / "other", n=12, seed=1))]
    with_workers = list(batches(datasets, num_workers=2, weights=weights))
    for a, b in zip(batches(datasets, weights=weights), with_workers, strict=True):
        assert_equal(a, b)


@pytest.mark.slow
def test_jpegs_that_are_decoded_smaller_depend_on_the_step_alone(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "x", n=24, size=(90, 70), image_format="jpg")
    here = list(batches([open_prepared(folder)], 0, 6))
    for a, b in zip(here, batches([open_prepared(folder)], 0, 6, num_workers=2), strict=True):
        assert_equal(a, b)
    for a, b in zip(here[4:], batches([open_prepared(folder)], 4, 6), strict=True):
        assert_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1])
def test_pictures_that_only_pillow_reads_are_counted_and_the_first_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    folder = make_dataset(tmp_path / "x", n=24, image_format="jpg")
    expected = list(batches([open_prepared(folder)], 0, 4))

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("not in the mood")

    said: list[str] = []
    monkeypatch.setattr(bad_samples, "warn", said.append)
    monkeypatch.setattr(pictures, "simplejpeg_decode", refuse)
    for a, b in zip(expected, batches([open_prepared(folder)], 0, 4, num_workers=num_workers), strict=True):
        assert_equal(a, b)
    first = expected[0].keys[0]
    assert said == [
        f"{folder}/train-00000{int(first[-6:]) // 16}.tar: sample {first}: only Pillow, which is slower, "
        "can decode this picture (not in the mood); later ones are only counted",
        "only Pillow could decode 32 pictures of this rank's share, the first named above",
    ]


@pytest.mark.slow
def test_resuming_is_the_tail_of_an_uninterrupted_run(folder: Path) -> None:
    whole = list(batches([open_prepared(folder)], 0, 12))
    for a, b in zip(whole[7:], batches([open_prepared(folder)], 7, 12), strict=True):
        assert_equal(a, b)


@pytest.mark.slow
def test_labels_are_those_of_the_chosen_captions_on_every_rank(folder: Path) -> None:
    dataset = open_prepared(folder)
    captions = {sample.key: sample.captions for sample in map(dataset.read, range(dataset.num_samples))}
    one = batches([dataset], with_labels=True, captions="first", num_workers=1)
    ranks = [batches([dataset], with_labels=True, captions="first", rank=rank, world_size=2) for rank in range(2)]
    for whole, *parts in zip(one, *ranks, strict=True):
        assert whole.labels is not None
        texts = [captions[key][0].text for key in whole.keys]
        assert whole.labels.tolist() == [label_of({}, text) for text in texts]
        assert torch.equal(whole.labels, torch.cat([part.labels for part in parts]))
    drawn = next(batches([dataset], with_labels=True))
    assert drawn.labels is not None
    among = [{label_of({}, caption.text) for caption in captions[key]} for key in drawn.keys]
    assert all(label in labels for label, labels in zip(drawn.labels.tolist(), among, strict=True))


def test_labels_are_made_only_where_they_are_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "label_of", lambda *_: pytest.fail("made"))
    assert next(batches([open_prepared(folder)])).labels is None


def test_a_batch_is_pinned_whole_for_a_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)  # what shows without a GPU
    zeros = torch.zeros(2, dtype=torch.int64)
    for labels, expected in ((zeros, [1, 1]), (None, None)):
        batch = Batch(zeros[:, None], zeros[:, None], ("a", "b"), labels=labels)
        pinned = profile_subject.pinned(batch, torch.device("cuda"))
        assert (pinned.images.tolist(), pinned.token_ids.tolist()) == ([[1], [1]], [[1], [1]])
        assert (pinned.labels if pinned.labels is None else pinned.labels.tolist()) == expected
        assert pinned.keys == ("a", "b")
        assert profile_subject.pinned(batch, torch.device("cpu")).images.tolist() == [[0], [0]]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("item_bytes", [2000, 10**9])
def test_all_tensors_of_a_batch_are_pinned(
    folder: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int, item_bytes: int
) -> None:
    """Whatever the size of the parts. Without a GPU the request for pinned memory shows, and nothing more."""
    monkeypatch.setattr(workers, "ITEM_BYTES", item_bytes)
    expected = list(batches([open_prepared(folder)], 0, 3, with_labels=True, with_other_crop=True))
    pinned: list[int] = []
    empty = torch.empty

    def recorded(*arguments: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        made = empty(*arguments, **options)
        if pin_memory:
            pinned.append(made.data_ptr())
        return made

    monkeypatch.setattr(torch, "empty", recorded)
    options = {"with_labels": True, "with_other_crop": True, "pin_memory": True, "num_workers": num_workers}
    found = list(batches([open_prepared(folder)], 0, 3, **options))
    for a, b in zip(expected, found, strict=True):
        assert_equal(a, b)
        assert {tensor.data_ptr() for tensor in b.tensors().values()} <= set(pinned)
    assert len(pinned) == 3 * 4


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_what_one_rank_would_see(folder: Path, world_size: int) -> None:
    one = batches([open_prepared(folder)])
    ranks = [batches([open_prepared(folder)], rank=rank, world_size=world_size) for rank in range(world_size)]
    for whole, *parts in zip(one, *ranks, strict=True):
        assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
        assert torch.equal(whole.token_ids, torch.cat([part.token_ids for part in parts]))
        assert whole.keys == sum((part.keys for part in parts), ())


@pytest.mark.slow
def test_text_is_as_wide_as_the_global_batch_needs_on_every_rank(tmp_path: Path) -> None:
    texts = ["short"] * 15 + ["a " * 12 + "long one"]
    dataset = open_prepared(make_dataset(tmp_path / "x", n=64, captions=texts))
    ranks = [list(batches([dataset], rank=rank, world_size=4, context_length=77)) for rank in range(4)]
    widths = [[batch.token_ids.shape[1] for batch in rank] for rank in ranks]
    assert widths[0] == widths[1] == widths[2] == widths[3]
    assert set(widths[0]) == {8, 16}
    for step, width in enumerate(widths[0]):
        longest = max(int((rank[step].token_ids != 0).sum(1).max()) for rank in ranks)
        assert width == (8 if longest <= 8 else 16)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_lengths_of_captions_travel_with_them(tmp_path: Path, num_workers: int) -> None:
    texts = [f"{'a ' * (i % 5)}dog" for i in range(64)]
    dataset = open_prepared(make_dataset(tmp_path / "x", n=64, captions=texts))
    for batch in batches([dataset], context_length=6, num_workers=num_workers):
        assert batch.token_ids.shape == (G, 6)
        assert batch.text_lengths == tuple((batch.token_ids != 0).sum(1).tolist())
        assert max(batch.text_lengths) == 6


def test_long_captions_are_cut_at_the_context_length_and_keep_their_end(tmp_path: Path) -> None:
    dataset = open_prepared(make_dataset(tmp_path / "x", n=8, captions=["word " * 100]))
    batch = next(batches([dataset], context_length=20))
    assert torch.equal(batch.token_ids, Tokenizer(20).encode(["word " * 100] * G))


def test_epochs_and_seeds_differ_in_order_crops_and_captions(folder: Path) -> None:
    dataset = open_prepared(folder)
    whole = list(batches([dataset], 0, 10))
    by_key: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for batch in whole:
        for key, image, ids in zip(batch.keys, batch.images, batch.token_ids, strict=True):
            by_key.setdefault(key, []).append((image, ids))
    twice = [seen for seen in by_key.values() if len(seen) == 2]
    assert len(twice) > 30
    assert sum(torch.equal(a[0], b[0]) for a, b in twice) < len(twice) / 4
    same_caption = sum(torch.equal(a[1], b[1]) for a, b in twice)
    assert len(twice) * 0.1 < same_caption < len(twice) * 0.6
    assert next(batches([dataset], seed=1)).keys != whole[0].keys


def test_several_captions_come_once_before_they_come_again(folder: Path) -> None:
    dataset = open_prepared(folder)
    tokenizer = Tokenizer(24)
    own = {
        raw.key: [tokenizer.encode([caption.text])[0].tolist() for caption in raw.captions]
        for raw in map(dataset.read, range(dataset.num_samples))
    }
    for count in (2, 3, 5):
        orders = set()
        for batch in batches([dataset], captions_per_image=count):
            assert len(batch.token_ids) == count * G
            for key, ids in zip(batch.keys, batch.token_ids.split(count), strict=True):
                width = ids.shape[1]
                drawn = [own[key].index(row + [0] * (24 - width)) for row in ids.tolist()]
                assert sorted(drawn[:3]) == sorted(set(drawn[:3]))
                assert len(set(drawn[3:])) == len(drawn[3:])
                orders.add(tuple(drawn))
        assert len(orders) > 3


def test_another_crop_leaves_all_else_as_it_is(folder: Path) -> None:
    dataset = open_prepared(folder)
    plain = {"augment": Augment(crop_scale=(0.3, 1.0))}
    for one, two in zip(batches([dataset], **plain), batches([dataset], with_other_crop=True, **plain), strict=True):
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.token_ids, two.token_ids)
        assert one.other_images is None
        assert two.other_images is not None
        assert two.other_images.shape == two.images.shape
        assert not torch.equal(two.other_images, two.images)
    shares = [next(batches([dataset], rank=rank, world_size=2, with_other_crop=True)) for rank in range(2)]
    whole = next(batches([dataset], with_other_crop=True)).other_images
    assert torch.equal(torch.cat([share.other_images for share in shares]), whole)


def test_first_caption(folder: Path) -> None:
    dataset = open_prepared(folder)
    captions = {(sample := dataset.read(id)).key: sample.captions for id in range(42)}
    for batch in batches([dataset], 0, 5, captions="first"):
        texts = [captions[key][0].text for key in batch.keys]
        assert torch.equal(batch.token_ids, Tokenizer(24).encode(texts, length=batch.token_ids.shape[1]))


def test_the_global_generators_are_left_alone(folder: Path) -> None:
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(batches([open_prepared(folder)], num_workers=1))
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


def test_the_training_keeps_its_threads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that puts parts together must not set how many threads PyTorch has: that holds for all threads."""
    monkeypatch.setattr(workers, "ITEM_BYTES", 2000)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        list(batches([open_prepared(folder)], 0, 3, num_workers=1))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_closing_ends_the_workers(folder: Path) -> None:
    others = set(multiprocessing.active_children())
    with closing(batches([open_prepared(folder)], 0, 1000, num_workers=2)) as run:
        next(run)
        assert len(set(multiprocessing.active_children()) - others) == 2
    assert set(multiprocessing.active_children()) <= others


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("part", ["image", "json"])
def test_a_spoiled_sample_is_replaced_and_named(tmp_path: Path, num_workers: int, part: str) -> None:
    folder = make_dataset(tmp_path / "x", n=40)
    spoil(folder, 21, part)
    found = list(batches([open_prepared(folder)], 0, 10, num_workers=num_workers, max_bad_share=0.01))
    assert all(len(batch.images) == len(batch.keys) == G for batch in found)
    bad = [bad for batch in found for bad in batch.bad_samples]
    assert len(bad) == 2  # once an epoch
    assert {b.shard for b in bad} == {str(folder / "train-000001.tar")}
    assert {b.key for b in bad} == {"00-000021"}
    reason = {"image": "not a picture: ", "json": "KEY.json is not JSON"}[part]
    assert all(b.reason.startswith(reason) for b in bad)
    assert not any("00-000021" in batch.keys for batch in found)


def test_ranks_replace_alike(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "x", n=40)
    for row in (3, 17, 21):
        spoil(folder, row)
    whole = list(batches([open_prepared(folder)], 0, 5))
    parts = [list(batches([open_prepared(folder)], 0, 5, rank=rank, world_size=2)) for rank in range(2)]
    assert sum(len(batch.bad_samples) for batch in whole) >= 3
    for batch, *shares in zip(whole, *parts, strict=True):
        assert torch.equal(batch.images, torch.cat([share.images for share in shares]))
        assert batch.bad_samples == sum((share.bad_samples for share in shares), ())


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_bad_samples_end_the_run(tmp_path: Path, num_workers: int) -> None:
    folder = make_dataset(tmp_path / "x", n=40)
    for row in range(0, 40, 8):
        spoil(folder, row)
    run = batches([open_prepared(folder)], 0, 1000, num_workers=num_workers, max_bad_share=0.0008)
    with pytest.raises(RunError) as error, closing(run):
        list(run)
    found = str(error.value)
    assert re.fullmatch(
        rf"{folder}/train-00000\d.tar: sample 00-0000\d\d: not a picture: .+; "
        r"(9|1\d) of the last \d\d samples were bad, data.max_bad_share 0.0008 allows 8 of so many",
        found,
    )


def test_a_row_of_bad_samples_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bad_samples, "MAX_BAD_IN_A_ROW", 3)
    folder = make_dataset(tmp_path / "x", n=40)
    for row in range(0, 40, 2):
        spoil(folder, row)
    with pytest.raises(RunError, match=r"; the last 3 samples were all bad; prepare the data again$"):
        list(batches([open_prepared(folder)], 0, 100, max_bad_share=1.0))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_nothing_but_bad_samples_ends_the_run_at_once(tmp_path: Path, num_workers: int) -> None:
    folder = make_dataset(tmp_path / "x", n=16)
    for row in range(16):
        spoil(folder, row)
    dataset = open_prepared(folder)
    with (
        pytest.raises(RunError) as error,
        closing(batches([dataset], num_workers=num_workers, max_bad_share=1.0)) as run,
    ):
        next(run)
    assert str(error.value).endswith(
        "; 9 samples in a row could not be read; prepare the data again (mlip prepare-data)"
    )
    assert "Traceback" not in str(error.value)
    with pytest.raises(RunError, match=r"train-000000.tar: sample 00-000000: not a picture"):
        preflight([dataset], Order([16], None, seed=0, global_batch_size=G), 1)


@pytest.mark.slow
def test_a_worker_that_dies_is_one_clear_error(folder: Path) -> None:
    others = set(multiprocessing.active_children())
    with closing(batches([open_prepared(folder)], 0, 1000, num_workers=1)) as run:
        next(run)
        (worker,) = set(multiprocessing.active_children()) - others
        assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL  # a death interrupts nothing but the loader
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(RunError, match=r"^a loader process died: .+ or use data.num_workers=0$"):
            list(run)


@pytest.mark.parametrize(
    ("words", "kind", "expected"),
    [
        (
            "a mistake of ours",
            RuntimeError,
            r"^Caught RuntimeError in DataLoader worker process 0.(.|\n)*a mistake of ours",
        ),
        (
            "DefaultCPUAllocator: can't allocate memory",
            RunError,
            "^a loader process ran out of memory for",
        ),
    ],
)
def test_an_error_inside_a_worker_is_not_a_death(words: str, kind: type[Exception], expected: str) -> None:
    with pytest.raises(kind, match=expected) as error, full_memory_named("a", "b", "c"), closing(failing(words)) as run:
        next(run)
    assert type(error.value) is kind


class Failing(Dataset[int]):
    def __init__(self, words: str) -> None:
        self.words = words

    def __getitem__(self, i: int) -> int:
        raise RuntimeError(self.words)


def failing(words: str) -> Iterator[int]:
    return items_of(data_loader(Failing(words), range(3), 1))


class Stuck(Dataset[int]):
    """Makes one item, and then hangs as a network disk does."""

    def __getitem__(self, i: int) -> int:
        if i:
            time.sleep(600)
        return i


@pytest.mark.slow
def test_closing_kills_a_worker_that_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_processes, "PATIENCE_S", 0.1)
    others = set(multiprocessing.active_children())
    run = items_of(data_loader(Stuck(), range(3), 1))
    assert next(run) == 0
    began = time.monotonic()
    run.close()
    assert time.monotonic() - began < 30  # PyTorch looks for dead workers every five seconds
    assert set(multiprocessing.active_children()) <= others


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_what_changes_the_items_is_raised_where_they_are_taken(num_workers: int) -> None:
    def doubled(items: Iterator[int]) -> Iterator[int]:
        for item in items:
            if item == 2:
                raise RunError("two is too much")
            yield 2 * item

    loader = data_loader(range(4), range(4), num_workers)  # type: ignore[arg-type]
    with closing(items_of(loader, doubled, most=9)) as run:
        assert [next(run), next(run)] == [0, 2]
        with pytest.raises(RunError, match=r"^two is too much$"):
            next(run)


def in_a_fork(work: Callable[[], object], folder: Path) -> tuple[str, str]:
    """What `work` prints to stdout and stderr in a process of its own that need not import torch again."""
    pid = os.fork()
    if pid == 0:
        for number, name in enumerate(("stdout", "stderr"), start=1):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        try:
            print(work(), flush=True)
        except BaseException:  # noqa: BLE001 - the child must not return into pytest
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(0)
    os.waitpid(pid, 0)
    return (folder / "stdout").read_text(), (folder / "stderr").read_text()


def test_workers_outlive_a_signal_to_the_whole_group(tmp_path: Path) -> None:
    """As torchrun, timeout and service managers send it: the training has to end its step, and to save."""

    def work() -> bool:
        os.setsid()
        signal.signal(signal.SIGTERM, lambda *_: None)
        items = items_of(data_loader(range(40), range(40), 2))  # type: ignore[arg-type]
        first = [next(items), next(items)]  # one of each: both have begun
        os.killpg(0, signal.SIGTERM)
        return [*first, *items] == list(range(40))

    assert in_a_fork(work, tmp_path) == ("True\n", "")


class Handed(Dataset[tuple[torch.Tensor, Any]]):
    """Tensors, each with the address at which the worker hands its tensors over."""

    def __getitem__(self, i: int) -> tuple[torch.Tensor, Any]:
        return torch.full((), i), resource_sharer._resource_sharer._address  # type: ignore[attr-defined]


def test_workers_say_nothing_where_the_main_process_hangs_up(tmp_path: Path) -> None:
    """As it does when a second Ctrl-C, a kill or an error ends it just when it takes a tensor."""

    def work() -> bool:
        items = items_of(data_loader(Handed(), range(40), 1))
        first, address = next(items)
        while address is None:  # until the worker has handed a tensor over
            first, address = next(items)
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(address)
        return [i.item() for i, _ in items] == list(range(int(first) + 1, 40))

    assert in_a_fork(work, tmp_path) == ("True\n", "")


@pytest.mark.slow
def test_a_worker_that_gets_its_data_pickled_makes_the_same_batches(folder: Path) -> None:
    """As spawned workers do; the server that forks this one has imported torch, so it begins sooner than those."""
    dataset = open_prepared(folder)
    order = Order([42], None, seed=0, global_batch_size=G)
    data = Data(train=(Source(path="unused"),), augment=AUGMENT, image_size=16)
    parts = module._Parts(
        datasets=[dataset], order=order, data=data, tokenizer=Tokenizer(24),
        with_labels=False, with_other_crop=False, part=nullcontext,
    )  # fmt: skip
    [item] = parts.of_steps(range(3, 4), range(G), G)
    here = parts[item].batch
    assert_equal(pickle.loads(pickle.dumps(parts))[item].batch, here)  # noqa: S301 - our own bytes
    loader = DataLoader(parts, sampler=[item], batch_size=None, num_workers=1, multiprocessing_context=FORKS)
    assert_equal(next(iter(loader)).batch, here)


def test_a_batch_that_does_not_divide(folder: Path) -> None:
    with pytest.raises(UsageError) as error:
        batches([open_prepared(folder)], world_size=3)
    assert str(error.value) == "train.global_batch_size: 8 does not divide by 3 ranks; use 6 or 9"


def test_preflight_says_what_was_found(tmp_path: Path, folder: Path) -> None:
    one = open_prepared(folder)
    assert preflight([one], Order([42], None, seed=0, global_batch_size=G), 2) == [
        f"{folder}: 42 samples in 3 shards",
        "42 samples / 8 = 5 steps an epoch; 2 samples are left out, others each epoch",
        "8 / 2 ranks = 4 samples a rank",
    ]
    two = open_prepared(make_dataset(tmp_path / "other", n=6, seed=1))
    assert preflight([one, two], Order([42, 6], None, seed=0, global_batch_size=G), 1) == [
        f"{folder}: 42 samples in 3 shards",
        f"{two.name}: 6 samples in 1 shard",
        "48 samples / 8 = 6 steps an epoch",
    ]
    assert preflight([one, two], Order([42, 6], (3.0, 1.0), seed=0, global_batch_size=G), 1) == [
        f"{folder}: 42 samples in 3 shards, 75.0% of what is seen",
        f"{two.name}: 6 samples in 1 shard, 25.0% of what is seen",
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_reads_everything_once_in_order(folder: Path, num_workers: int) -> None:
    dataset = open_prepared(folder)
    found = list(evaluation_loader(dataset, data=Data(train=(), image_size=16), batch_size=20, num_workers=num_workers))
    assert [len(images) for images in found] == [20, 20, 2]
    samples = [dataset.read(id) for id in range(42)]
    expected = torch.stack([evaluation_transform(decode(open_picture(sample.image)), size=16) for sample in samples])
    assert torch.equal(torch.cat(found), expected)


def test_evaluation_refuses_to_leave_a_sample_out(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "x", n=16)
    spoil(folder, 5)
    with pytest.raises(RunError, match=r"train-000000.tar: sample 00-000005: not a picture: "):
        list(evaluation_loader(open_prepared(folder), data=Data(train=(), image_size=16), batch_size=4, num_workers=0))
