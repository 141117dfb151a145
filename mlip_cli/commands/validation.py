"""The pairs of `data.validation`, ready to be encoded again and again: for measures, galleries and sweeps."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from mlip_cli.config import Recipe, Source
from mlip_cli.data.dataset import RawSample, open_sources
from mlip_cli.data.loader import default_num_workers, evaluation_loader
from mlip_cli.data.tokenizer import Tokenizer
from mlip_cli.evaluate.retrieval import image_text_retrieval
from mlip_cli.evaluate.zeroshot import normalized, text_features
from mlip_cli.types import Encoder

T = TypeVar("T")
OnBatch = Callable[[int], None]
"""Told of the number of pictures that are done now, of 0 before texts. It may raise, to end an evaluation."""

VALIDATION = "validation"
"""Name of the run's own validation set."""

BATCH_SIZE = 128
KEPT_BYTES = 1 << 30
"""Decoded pictures up to this many bytes a data set stay in memory between evaluations; more are decoded each time."""

FEW_PICTURES = 1000
"""Below this many, starting loader processes takes longer than decoding."""


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Token ids (n, L), L the length of the longest text: columns of padding change nothing but the time."""
    token_ids = tokenizer.encode(texts)
    return token_ids[:, : int(token_ids.any(dim=0).nonzero().max()) + 1]


def interruptible(tokenizer: Tokenizer, on_batch: OnBatch) -> Callable[[Sequence[str]], Tensor]:
    """`tokenize`, with a word to `on_batch` before each batch of texts."""

    def tokenize_batch(texts: Sequence[str]) -> Tensor:
        on_batch(0)
        return tokenize(tokenizer, texts)

    return tokenize_batch


class ValidationPairs:
    """All pictures of some data sets and their distinct captions; a caption of several pictures is right for each."""

    def __init__(
        self, sources: Sequence[Source], tokenizer: Tokenizer, *, image_size: int, device: torch.device
    ) -> None:
        self.datasets = open_sources(sources)
        self.device = device
        self._tokenizer = tokenizer
        captions = [
            [caption["text"] for caption in dataset.read(id).record["captions"]]
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
        self._image_size = image_size
        self._decoded = Kept(self._read, num_pictures=self.num_pictures, size=image_size)

    def _read(self) -> Iterator[Tensor]:
        for dataset in self.datasets:
            loader = evaluation_loader(
                dataset,
                image_size=self._image_size,
                batch_size=BATCH_SIZE,
                num_workers=0 if dataset.num_samples < FEW_PICTURES else default_num_workers(1),
            )
            yield from (batch.images for batch in loader)

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

    def features(self, encoder: Encoder, *, on_batch: OnBatch = lambda _: None) -> tuple[Tensor, Tensor]:
        """Unit vectors of all pictures and of all texts: (I, E), (T, E) fp32.

        Raises:
            RunError: some features are not finite; says how many.
        """
        parts = []
        for images in self._decoded:
            with torch.no_grad():
                parts.append(encoder.encode_image(images.to(self.device)))
            on_batch(len(images))
        tokenize_batch = interruptible(self._tokenizer, on_batch)
        texts = text_features(
            self.texts,
            tokenize=tokenize_batch,
            encode_text=encoder.encode_text,
            device=self.device,
            place=VALIDATION,
        )
        return normalized(torch.cat(parts), "image", place=VALIDATION), texts

    def scores(self, encoder: Encoder, *, on_batch: OnBatch = lambda _: None) -> Mapping[str, dict[str, Any]]:
        """Recall both ways (see `image_text_retrieval`)."""
        return image_text_retrieval(*self.features(encoder, on_batch=on_batch), self.own_texts)


def validation_pairs(recipe: Recipe, tokenizer: Tokenizer, *, device: torch.device | str) -> ValidationPairs | None:
    """Those of the recipe's `data.validation`, or None where it names none."""
    sources = recipe.data.validation
    if sources is None:
        return None
    return ValidationPairs(sources, tokenizer, image_size=recipe.data.image_size, device=torch.device(device))


class Kept(Generic[T]):
    """Batches that are decoded the first time and kept, or decoded each time where they need too much memory."""

    def __init__(self, read: Callable[[], Iterable[T]], *, num_pictures: int, size: int) -> None:
        self._read = read
        self._keep = num_pictures * 3 * size * size <= KEPT_BYTES
        self._batches: list[T] | None = None

    def __iter__(self) -> Iterator[T]:
        if self._batches is not None:
            yield from self._batches
            return
        batches = []
        for batch in self._read():
            if self._keep:
                batches.append(batch)
            yield batch
        if self._keep:  # all of them: an evaluation that was left keeps nothing
            self._batches = batches
