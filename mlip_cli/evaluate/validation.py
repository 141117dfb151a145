"""The pairs of `data.validation`: for measures, galleries and sweeps."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Generic, TypeVar

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
from mlip_cli.recipe.config import Recipe
from mlip_cli.types import Encoder

T = TypeVar("T")
BATCH_SIZE = 128
KEPT_BYTES = 1 << 30
"""Most bytes of decoded pictures that stay in memory between evaluations, for each data set and rank. Larger sets are
decoded each time."""

FEW_PICTURES = 1000
"""Fewer pictures than these are decoded sooner than loader processes start."""


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Token ids (n, L), L the length of the longest text: more padding would change nothing but the time."""
    token_ids = tokenizer.encode(texts)
    return token_ids[:, : int(token_ids.any(dim=0).nonzero().max()) + 1]


class ValidationPairs:
    """All pictures of `data.validation`, and their distinct captions. A caption of several pictures is right for each.

    For `beside` see `open_sources`.
    """

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: Tokenizer,
        *,
        device: torch.device | str,
        beside: Sequence[ShardDataset] = (),
    ) -> None:
        self.datasets = open_sources(recipe.data.validation or (), cache=recipe.data.cache, beside=beside)
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
        self._image_size = recipe.data.image_size
        self._num_batches = [-(-dataset.num_samples // BATCH_SIZE) for dataset in self.datasets]
        self._decoded = DecodedBatches(self._read, size=self._image_size)

    def _read(self, numbers: range) -> Iterator[Tensor]:
        """Batches by their numbers among the batches of all data sets. A batch holds pictures of one data set."""
        first = 0
        for dataset, num_batches in zip(self.datasets, self._num_batches, strict=True):
            own = range(max(numbers.start - first, 0), min(numbers.stop - first, num_batches))
            first += num_batches
            if own:
                is_few = len(own) * BATCH_SIZE < FEW_PICTURES
                yield from evaluation_loader(
                    dataset,
                    image_size=self._image_size,
                    batch_size=BATCH_SIZE,
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
            place=VALIDATION,
            on_batch=on_batch,
        )
        return normalized(images, "image", place=VALIDATION), texts


def validation_pairs(
    recipe: Recipe, tokenizer: Tokenizer, *, device: torch.device | str, beside: Sequence[ShardDataset] = ()
) -> ValidationPairs | None:
    """The pairs of the recipe's `data.validation`; None if it has none."""
    return ValidationPairs(recipe, tokenizer, device=device, beside=beside) if recipe.data.validation else None


class DecodedBatches(Generic[T]):
    """Batches that stay in memory once they are decoded, or are decoded each time where they need too much of it."""

    def __init__(self, read: Callable[[range], Iterable[T]], *, size: int) -> None:
        self._read = read
        self._most = KEPT_BYTES // (BATCH_SIZE * 3 * size * size)
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
    dataset: ShardDataset, *, image_size: int, batch_size: int, num_workers: int, numbers: range | None = None
) -> Iterator[Tensor]:
    """All pictures of a data set once, in order, resized and centre-cropped: uint8 (B, 3, S, S).

    The last batch may be smaller.

    Loader processes read them: for 1,200 JPEGs of 400 x 300 px one process took 2.3 s of CPU time, threads (as in
    `datasets.pictures.batches`) 3.7 s. Nothing is timed here, so reading ahead harms nothing.

    Args:
        numbers: numbers of the batches to make; None: all.

    Raises:
        RunError: (while iterating) a sample cannot be read; a measure over the others would be another measure.
    """
    dataset.fetch()
    batches = _EvaluationBatches(dataset, image_size, batch_size)
    everything = range(-(-dataset.num_samples // batch_size))
    return items_of(data_loader(batches, everything if numbers is None else numbers, num_workers))


class _EvaluationBatches(Dataset[Tensor | Exception]):
    """Item i is the i-th batch, or the error that prevented it."""

    def __init__(self, dataset: ShardDataset, image_size: int, batch_size: int) -> None:
        self.dataset, self.image_size, self.batch_size = dataset, image_size, batch_size

    def __getitem__(self, i: int) -> Tensor | Exception:
        ids = range(self.dataset.num_samples)[i * self.batch_size : (i + 1) * self.batch_size]
        size = self.image_size
        try:
            pictures = [decoded(self.dataset.read(id), least=least_size(None, size)) for id in ids]
            return torch.stack([evaluation_transform(picture, size=size) for picture in pictures])
        except (RunError, OSError) as error:
            return error
