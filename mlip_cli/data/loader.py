"""Batches for training: pure functions of (seed, step), made in worker processes."""

import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from mlip_cli.data.assembly import Part, whole_steps
from mlip_cli.data.bad_samples import BadSampleLimit, SlowPictures, place_and_reason
from mlip_cli.data.dataset import BadSampleError, RawSample, ShardDataset, keep_open
from mlip_cli.data.loader_processes import data_loader, items_of
from mlip_cli.data.order import MAX_ATTEMPTS, Order, Position, Positions, hash_of
from mlip_cli.data.pictures import RejectedPictureError, open_picture
from mlip_cli.data.sources.records import Caption
from mlip_cli.data.tokenizer import Tokenizer
from mlip_cli.data.transforms import decode, least_size, training_crop, training_transform
from mlip_cli.data.workers import Need, check_shared_memory, fitted, ranks_here, samples_at_once
from mlip_cli.errors import RunError, UsageError
from mlip_cli.recipe.config import Data
from mlip_cli.types import BadSample, Batch, PartOf

STEPS_READY = 2
"""Most steps that wait, put together, for the training, besides what loader processes hold."""
READ_SAMPLE, DECODE_PICTURE, TRANSFORM_PICTURE = "read", "decode", "transform"
"""Parts of the work on a sample; the rest is captions, tokens and stacking."""
_AUGMENTATION = 4  # sets these draws apart from those of `order`


def training_loader(
    datasets: Sequence[ShardDataset],
    order: Order,
    *,
    data: Data,
    tokenizer: Tokenizer,
    steps: range,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
    with_labels: bool = False,
    with_other_crop: bool = False,
    part: PartOf = nullcontext,
) -> Iterator[Batch]:
    """This rank's share of the batches of these steps; closing the iterator ends the workers.

    Workers make a step in parts, which a thread of this process puts together. The batches are the same for any number
    of workers and any size of the parts, and the shares of all ranks together are the same for any number of ranks.
    Text is as wide as the longest caption of the global batch needs, equal on all ranks.
    A bad sample is named in `Batch.bad_samples` and replaced by another of its source; a longer caption of that one is
    cut to the width. With labels, samples of one concept (see `label_of`) have one label. With another crop, every
    picture comes a second time, changed by draws of its own. `part` opens a context around each part of the work on a
    sample.

    Args:
        num_workers: where `data.num_workers` is null, fewer start if shared memory has no room for so many.
        pin_memory: batches lie in pinned memory, from which copies to a GPU need not wait.

    Raises:
        UsageError: the global batch does not divide by the ranks.
        RunError: the workers of this machine's ranks need more shared memory than there is, or (while iterating) there
            are too many bad samples, or a worker process died.
    """
    check_divides(order.global_batch_size, world_size)
    share = order.global_batch_size // world_size
    sample_bytes = _sample_bytes(data, tokenizer, with_other_crop=with_other_crop)
    part_size = samples_at_once(share, sample_bytes)
    need = Need(ranks_here(world_size), num_workers, part_size * sample_bytes)
    if data.num_workers is None:
        num_workers = fitted(need)
    else:
        check_shared_memory(need)
    for dataset in datasets:
        dataset.fetch()
    keep_open(datasets)
    parts = _Parts(
        datasets=datasets,
        order=order,
        data=data,
        tokenizer=tokenizer,
        with_labels=with_labels,
        with_other_crop=with_other_crop,
        part=part,
    )
    places = range(rank * share, (rank + 1) * share)
    items = parts.of_steps(steps, places, part_size if num_workers else share)
    join = partial(whole_steps, size=share, pin_memory=pin_memory)
    return _training_batches(data_loader(parts, items, num_workers), join, BadSampleLimit(data.max_bad_share))


def _sample_bytes(data: Data, tokenizer: Tokenizer, *, with_other_crop: bool) -> int:
    """Bytes of a sample in a batch, at most: pixels, token ids and a label."""
    pixels = 3 * data.image_size**2 * (2 if with_other_crop else 1)
    return pixels + 8 * (data.captions_per_image * tokenizer.context_length + 1)


def check_divides(global_batch_size: int, world_size: int) -> None:
    remainder = global_batch_size % world_size
    if remainder:
        lower, upper = global_batch_size - remainder, global_batch_size - remainder + world_size
        cure = f"{lower} or {upper}" if lower else f"{upper}"
        raise UsageError(
            f"train.global_batch_size: {global_batch_size} does not divide by {world_size} ranks; use {cure}"
        )


def decoded(sample: RawSample, *, least: tuple[int, int] | None = None) -> Tensor:
    """The picture of a sample: (3, H, W) uint8, possibly decoded smaller, but not below `least` (H, W).

    Raises:
        BadSampleError: it cannot be decoded.
    """
    with _bad_sample_named(sample):
        return decode(open_picture(sample.image), least=least)


@contextmanager
def _bad_sample_named(sample: RawSample) -> Iterator[None]:
    try:
        yield
    except RejectedPictureError as error:
        raise BadSampleError(sample.shard, sample.key, str(error)) from error


@dataclass(frozen=True)
class _Example:
    image: Tensor
    captions: tuple[str, ...]
    key: str
    label: int | None
    """None if labels were not asked for."""
    other_image: Tensor | None
    """None if no other crop was asked for."""
    slow: tuple[BadSample, ...]
    """The sample itself, if only Pillow could decode its picture."""


@dataclass(frozen=True)
class _Item:
    """Samples of one step that a worker makes at once."""

    t: NDArray[np.int64]
    """(n,): their positions in the run."""
    positions: Positions
    """The samples that stand there."""
    length: int
    """Width of the texts of the step."""


@dataclass(frozen=True, kw_only=True)
class _Parts(Dataset[Part | Exception]):
    """Gives an item's samples, or the error that prevented them."""

    datasets: Sequence[ShardDataset]
    order: Order
    data: Data
    tokenizer: Tokenizer
    with_labels: bool
    with_other_crop: bool
    part: PartOf

    def of_steps(self, steps: range, places: range, size: int) -> Iterator[_Item]:
        """The items of these steps: of each global batch the positions `places`, `size` at once."""
        global_batch_size = self.order.global_batch_size
        for step in steps:
            t = step * global_batch_size + np.arange(global_batch_size)
            positions = self.order.positions(t)
            length = self.tokenizer.padded_length(self._longest(positions))
            for start in range(places.start, places.stop, size):
                here = slice(start, min(start + size, places.stop))
                yield _Item(t[here], positions.at(here), length)

    def __getitem__(self, item: _Item) -> Part | Exception:
        try:
            return self._part(item)
        except (RunError, OSError) as error:  # sent as a value: torch would wrap a raised one in the worker's traceback
            return error

    def _part(self, item: _Item) -> Part:
        self._read_ahead(item.positions)
        examples, bad_samples, replaced = [], [], []
        for i, t in enumerate(item.t.tolist()):
            example, bad = self._example_or_replacement(t, _position(item.positions, i))
            examples.append(example)
            bad_samples += bad
            replaced.append(bool(bad))
        texts = [text for example in examples for text in example.captions]
        other_images = [example.other_image for example in examples if example.other_image is not None]
        batch = Batch(
            images=default_collate([example.image for example in examples]),  # in shared memory at once in a worker
            token_ids=self.tokenizer.encode(texts, length=item.length),
            keys=tuple(example.key for example in examples),
            bad_samples=tuple(bad_samples),
            labels=torch.tensor([example.label for example in examples]) if self.with_labels else None,
            other_images=default_collate(other_images) if other_images else None,
            text_lengths=self.tokenizer.lengths(texts, length=item.length),
        )
        return Part(batch, tuple(replaced), sum((example.slow for example in examples), ()))

    def _read_ahead(self, positions: Positions) -> None:
        with self.part(READ_SAMPLE):
            for source in np.unique(positions.source).tolist():
                self.datasets[source].read_ahead(positions.index[positions.source == source].tolist())

    def _longest(self, positions: Positions) -> int:
        """Tokens of the longest caption of the global batch, from the indexes alone."""
        return max(
            int(self.datasets[source].num_tokens(positions.index[positions.source == source]).max())
            for source in np.unique(positions.source).tolist()
        )

    def _example_or_replacement(self, t: int, position: Position) -> tuple[_Example, list[BadSample]]:
        bad: list[BadSample] = []
        for attempt in range(MAX_ATTEMPTS + 1):
            try:
                return self._example(position if attempt == 0 else self.order.replacement(t, attempt)), bad
            except BadSampleError as error:
                bad.append(BadSample(error.shard, error.key, error.reason))
        raise RunError(
            f"{place_and_reason(bad[-1])}; {len(bad)} samples in a row could not be read; prepare the data again "
            "(mlip prepare-data)"
        )

    def _example(self, position: Position) -> _Example:
        with self.part(READ_SAMPLE):
            raw = self.datasets[position.source].read(position.index)
        seed = hash_of(self.order.seed, _AUGMENTATION, position.source, position.epoch, position.index)
        draws = torch.Generator().manual_seed(seed >> 1)
        captions = _choose_captions(raw.captions, self.data, draws)
        slow: list[BadSample] = []
        with self.part(DECODE_PICTURE), _bad_sample_named(raw):
            picture = open_picture(raw.image)
            crops = [training_crop(picture.height, picture.width, data=self.data, generator=draws)]
            if self.with_other_crop:
                crops.append(training_crop(picture.height, picture.width, data=self.data, generator=draws))
            least = [least_size(crop, self.data.image_size) for crop in crops]
            pixels = decode(
                picture,
                least=(max(height for height, _ in least), max(width for _, width in least)),
                on_fallback=lambda reason: slow.append(BadSample(raw.shard, raw.key, reason)),
            )
        with self.part(TRANSFORM_PICTURE):
            image, *other = (training_transform(pixels, crop=crop, data=self.data, generator=draws) for crop in crops)
        label = label_of(raw.info.meta, captions[0]) if self.with_labels else None
        return _Example(image, captions, raw.key, label, other[0] if other else None, tuple(slow))


def _position(positions: Positions, place: int) -> Position:
    return Position(int(positions.source[place]), int(positions.index[place]), int(positions.epoch[place]))


def _choose_captions(captions: Sequence[Caption], data: Data, generator: torch.Generator) -> tuple[str, ...]:
    """The first caption, or `data.captions_per_image` drawn by weight; none comes twice before all came once."""
    if data.captions == "first":
        return (captions[0].text,)
    chosen: list[str] = []
    left = list(captions)
    for _ in range(data.captions_per_image):
        left = left or list(captions)
        drawn = _draw_caption(left, generator)
        chosen.append(drawn.text)
        left.remove(drawn)
    return tuple(chosen)


def _draw_caption(captions: Sequence[Caption], generator: torch.Generator) -> Caption:
    ends = list(accumulate(caption.weight for caption in captions))
    drawn = torch.rand((), dtype=torch.float64, generator=generator).item() * ends[-1]
    return next((caption for caption, end in zip(captions, ends, strict=True) if drawn < end), captions[-1])


def _training_batches(
    loader: DataLoader[Any], join: Callable[[Iterator[Part]], Iterator[Part]], limit: BadSampleLimit
) -> Generator[Batch, None, None]:
    with SlowPictures() as slow, closing(items_of(loader, join, most=STEPS_READY)) as steps:
        for step in steps:
            limit.check(step.replaced, step.batch.bad_samples)
            slow.count(step.slow)
            yield step.batch


def label_of(meta: Mapping[str, Any], caption: str) -> int:
    """63 bits that stand for the concept of a sample (`concept` of its meta), or for the caption if it states none.

    Equal for equal values in every process and version; a concept never equals a caption. Captions are compared without
    case and spacing, because their tokens do not show these either.
    """
    concept = meta.get("concept")
    kind, value = ("caption", " ".join(caption.lower().split())) if concept in (None, "") else ("concept", concept)
    text = f"{kind}\0{value}".encode(errors="surrogatepass")  # JSON may hold halves of surrogate pairs
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
