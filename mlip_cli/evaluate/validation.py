"""Pairs of pictures and captions, such as those of `data.validation`: for measures, galleries, sweeps and retrieval."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from mlip_cli.data.assembly import Rows
from mlip_cli.data.dataset import RawSample, ShardDataset
from mlip_cli.data.loader import decoded
from mlip_cli.data.loader_processes import data_loader, items_of
from mlip_cli.data.open import open_sources
from mlip_cli.data.tokenizer import Tokenizer
from mlip_cli.data.transforms import evaluation_transform, least_size
from mlip_cli.data.workers import Need, default_num_workers, free_shared_memory, ranks_here, samples_at_once
from mlip_cli.distributed import world_size
from mlip_cli.errors import RunError
from mlip_cli.evaluate.together import OnBatch, on_all_ranks
from mlip_cli.evaluate.wanted import VALIDATION
from mlip_cli.evaluate.zeroshot import normalized, text_features
from mlip_cli.recipe.config import Data, Recipe
from mlip_cli.types import Encoder

T = TypeVar("T")
BATCH_SIZE = 128
KEPT_BYTES = 1 << 30
"""Most bytes of decoded pictures that stay in memory between evaluations, for each data set and rank. Larger sets are
decoded each time."""

FEW_PICTURES = 1000
"""Fewer pictures than these are decoded sooner than loader processes start."""


def tokenize(tokenizer: Tokenizer, device: torch.device, texts: Sequence[str]) -> Tensor:
    """Token ids (n, L), L the length of the longest text: more padding would change nothing but the time.

    For CUDA, L is the next of the lengths that training has: there each new shape chooses or compiles kernels.
    Where padding does change the features, L is always the context length.
    """
    token_ids = tokenizer.encode(texts)
    if tokenizer.whole:
        return token_ids
    longest = int(token_ids.any(dim=0).nonzero().max()) + 1
    return token_ids[:, : tokenizer.padded_length(longest) if device.type == "cuda" else longest]


class PairSet(Protocol):
    """A data set of pictures with captions, such as a ShardDataset."""

    card: dict[str, Any]
    fingerprint: str

    @property
    def place(self) -> str:
        """The absolute folder, or the URL."""

    @property
    def num_samples(self) -> int:
        """Number of pictures."""

    def fetch(self) -> None:
        """Bring what lies elsewhere to this machine."""

    def read(self, id: int) -> RawSample:
        """One sample; raises BadSampleError."""


Set = TypeVar("Set", bound=PairSet)


class ValidationPairs(Generic[Set]):
    """All pictures of some data sets, and their distinct captions. A caption of several pictures is right for each.

    Args:
        data: how the encoder sees pictures.
        place: name of the pairs in messages.
        batch_size: pictures in one forward pass.
    """

    def __init__(
        self,
        datasets: Sequence[Set],
        tokenizer: Tokenizer,
        *,
        data: Data,
        device: torch.device | str,
        place: str = VALIDATION,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        self.datasets, self.place = datasets, place
        self.device = torch.device(device)
        self._tokenizer = tokenizer
        captions = [
            [caption.text for caption in dataset.read(id).captions]
            for dataset in self.datasets
            for id in range(dataset.num_samples)
        ]
        self.num_pictures = len(captions)
        self.texts: list[str] = sorted(
            {text for own in captions for text in own}, key=lambda text: (len(text), text)
        )  # texts of one length need little padding
        number = {text: i for i, text in enumerate(self.texts)}
        self.own_texts = [[number[text] for text in own] for own in captions]
        """For each picture the numbers of its texts."""
        self._data, self._batch_size = data, batch_size
        self._num_batches = [-(-dataset.num_samples // batch_size) for dataset in self.datasets]
        self._decoded = DecodedBatches(self._read, size=data.image_size, batch_size=batch_size)

    def _read(self, numbers: range) -> Iterator[Tensor]:
        """Batches by their numbers among the batches of all data sets. A batch holds pictures of one data set."""
        first = 0
        for dataset, num_batches in zip(self.datasets, self._num_batches, strict=True):
            own = range(max(numbers.start - first, 0), min(numbers.stop - first, num_batches))
            first += num_batches
            if own:
                is_few = len(own) * self._batch_size < FEW_PICTURES
                yield from evaluation_loader(
                    dataset,
                    data=self._data,
                    batch_size=self._batch_size,
                    num_workers=0 if is_few else default_num_workers(world_size()),
                    numbers=own,
                )

    @property
    def fingerprint(self) -> str:
        """Of all data sets."""
        return " ".join(dataset.fingerprint for dataset in self.datasets)

    def sample(self, number: int) -> RawSample:
        """The sample of a picture, by its number among all.

        Raises:
            BadSampleError: it cannot be read.
        """
        for dataset in self.datasets:
            if number < dataset.num_samples:
                return dataset.read(number)
            number -= dataset.num_samples
        raise IndexError(number)

    @torch.no_grad()
    def features(self, encoder: Encoder, *, on_batch: OnBatch = lambda _: None) -> tuple[Tensor, Tensor]:
        """Unit vectors of all pictures and of all texts: (I, E), (T, E) fp32, by all ranks and on every rank.

        Raises:
            RunError: some features are not finite; says how many.
        """

        def encode(numbers: range) -> Iterator[Tensor]:
            for images in self._decoded.of(numbers):
                features = encoder.encode_image(images.to(self.device)).cpu()
                on_batch(len(images))
                yield features

        images = torch.cat(on_all_ranks(encode, num_batches=sum(self._num_batches))).to(self.device)
        texts = text_features(
            self.texts,
            tokenize=partial(tokenize, self._tokenizer, self.device),
            encode_text=encoder.encode_text,
            device=self.device,
            place=self.place,
            on_batch=on_batch,
        )
        return normalized(images, "image", place=self.place), texts


def validation_pairs(
    recipe: Recipe, tokenizer: Tokenizer, *, device: torch.device | str, beside: Sequence[ShardDataset] = ()
) -> ValidationPairs[ShardDataset] | None:
    """The pairs of the recipe's `data.validation`; None if it has none. For `beside` see `open_sources`."""
    if not recipe.data.validation:
        return None
    datasets = open_sources(recipe.data.validation, cache=recipe.data.cache, beside=beside)
    return ValidationPairs(datasets, tokenizer, data=recipe.data, device=device)


class DecodedBatches(Generic[T]):
    """Batches that stay in memory once they are decoded, or are decoded each time where they need too much of it."""

    def __init__(self, read: Callable[[range], Iterable[T]], *, size: int, batch_size: int = BATCH_SIZE) -> None:
        self._read = read
        self._most = KEPT_BYTES // (batch_size * 3 * size * size)
        self._batches: dict[int, T] = {}

    def of(self, numbers: range) -> Iterator[T]:
        """The batches with these numbers, in order."""
        missing = next((number for number in numbers if number not in self._batches), numbers.stop)
        yield from (self._batches[number] for number in range(numbers.start, missing))
        if missing < numbers.stop:
            for number, batch in enumerate(self._read(range(missing, numbers.stop)), start=missing):
                if len(numbers) <= self._most:
                    self._batches[number] = batch
                yield batch


def evaluation_loader(
    dataset: PairSet, *, data: Data, batch_size: int, num_workers: int, numbers: range | None = None
) -> Iterator[Tensor]:
    """All pictures of a data set once, in order, resized as `data` says: uint8 (B, 3, S, S).

    The last batch may be smaller.

    Loader processes read them: for 1,200 JPEGs of 400 x 300 px one process took 2.3 s of CPU time, threads (as in
    `datasets.pictures.batches`) 3.7 s. Nothing is timed here, so reading ahead harms nothing.

    Args:
        num_workers: the most loader processes; there are fewer where shared memory has no room for the work of all.
        numbers: numbers of the batches to make; None: all.

    Raises:
        RunError: (while iterating) a sample cannot be read; a measure over the others would be another measure.
    """
    dataset.fetch()
    picture_bytes = 3 * data.image_size**2
    at_once = samples_at_once(batch_size, picture_bytes)
    need, free = Need(ranks_here(world_size()), num_workers, at_once * picture_bytes), free_shared_memory()
    # the loader processes of a training live on, and may take as much again
    num_workers = num_workers if free is None else need.fitting(free - need.num_bytes)
    starts = range(0, dataset.num_samples, batch_size)
    numbers = range(len(starts)) if numbers is None else numbers
    batches = [range(dataset.num_samples)[starts[i] : starts[i] + batch_size] for i in numbers]
    parts = [part for batch in batches for part in _parts(batch, at_once if num_workers else batch_size)]
    join = partial(_whole_batches, sizes=[len(batch) for batch in batches])
    return items_of(data_loader(_EvaluationPictures(dataset, data), parts, num_workers), join, most=1)


def _parts(batch: range, size: int) -> Iterator[range]:
    return (batch[start : start + size] for start in range(0, len(batch), size))


def _whole_batches(parts: Iterator[Tensor], sizes: Sequence[int]) -> Iterator[Tensor]:
    """Join pictures (b, 3, S, S) into batches of these sizes."""
    for size in sizes:
        rows = Rows(size)
        while rows.num_filled < size:
            rows.add(next(parts))
        yield rows.tensor


class _EvaluationPictures(Dataset[Tensor | Exception]):
    """Pictures of the samples with these numbers, or the error that prevented them."""

    def __init__(self, dataset: PairSet, data: Data) -> None:
        self.dataset, self.data = dataset, data

    def __getitem__(self, ids: range) -> Tensor | Exception:
        size, resize = self.data.image_size, self.data.resize
        try:
            pictures = [decoded(self.dataset.read(id), least=least_size(None, size)) for id in ids]
            images = [evaluation_transform(picture, size=size, resize=resize) for picture in pictures]
            return cast(Tensor, default_collate(images))  # in shared memory at once in a loader process
        except (RunError, OSError) as error:
            return error
