"""Pairs of pictures and captions, such as those of `data.validation`: for measures, galleries, sweeps and retrieval."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mlip_cli.data.dataset import RawSample, ShardDataset
from mlip_cli.data.loader import decoded, default_num_workers
from mlip_cli.data.loader_processes import data_loader, items_of
from mlip_cli.data.open import open_sources
from mlip_cli.data.tokenizer import Tokenizer
from mlip_cli.data.transforms import evaluation_transform, least_size
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


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Token ids (n, L), L as in a training batch of these texts: more padding would change nothing but the time.

    So few widths occur, for which a GPU makes its plans once. Where padding does change the features, L is always the
    context length.
    """
    token_ids = tokenizer.encode(texts)
    if tokenizer.whole:
        return token_ids
    longest = int(token_ids.any(dim=0).nonzero().max()) + 1
    return token_ids[:, : tokenizer.padded_length(longest)]


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
            tokenize=partial(tokenize, self._tokenizer),
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
        numbers: numbers of the batches to make; None: all.

    Raises:
        RunError: (while iterating) a sample cannot be read; a measure over the others would be another measure.
    """
    dataset.fetch()
    batches = _EvaluationBatches(dataset, data, batch_size)
    everything = range(-(-dataset.num_samples // batch_size))
    return items_of(data_loader(batches, everything if numbers is None else numbers, num_workers))


class _EvaluationBatches(Dataset[Tensor | Exception]):
    """Item i is the i-th batch, or the error that prevented it."""

    def __init__(self, dataset: PairSet, data: Data, batch_size: int) -> None:
        self.dataset, self.data, self.batch_size = dataset, data, batch_size

    def __getitem__(self, i: int) -> Tensor | Exception:
        ids = range(self.dataset.num_samples)[i * self.batch_size : (i + 1) * self.batch_size]
        size, resize = self.data.image_size, self.data.resize
        try:
            pictures = [decoded(self.dataset.read(id), least=least_size(None, size)) for id in ids]
            return torch.stack([evaluation_transform(picture, size=size, resize=resize) for picture in pictures])
        except (RunError, OSError) as error:
            return error
