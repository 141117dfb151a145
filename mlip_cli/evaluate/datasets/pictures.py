"""The pictures of an evaluation set, one by one or in batches, with their classes and the texts that name them."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mlip_cli.data.pictures import RejectedPictureError, open_picture
from mlip_cli.data.sources.class_names import some
from mlip_cli.data.sources.listing import PassedOver
from mlip_cli.data.transforms import decode, evaluation_transform
from mlip_cli.errors import RunError
from mlip_cli.machine import usable_cores
from mlip_cli.recipe.config import Data
from mlip_cli.terminal.output import plural

MAX_THREADS = 16


@dataclass(frozen=True)
class Names:
    """Texts for retrieval of names; some of them are right for each picture."""

    texts: tuple[str, ...]
    accepted: tuple[tuple[int, ...], ...]
    """For each picture, in order, the numbers of its right texts."""


@dataclass(frozen=True)
class Pictures:
    """An opened evaluation set. One thread takes the items, which may read files; any thread may load an item."""

    class_names: tuple[str, ...]
    """By class number; names may repeat (two of ImageNet's do)."""
    templates: tuple[str, ...]
    """Texts with `{c}` in the place of the class name."""
    items: Sequence[Any]
    load: Callable[[Any], tuple[Tensor, int]]
    """Item -> uint8 (3, H, W), class."""
    names: Names | None = None
    passed_over: PassedOver = field(default_factory=PassedOver)

    @property
    def asks_names_alone(self) -> bool:
        """Whether each name is a class: then retrieval says everything."""
        return self.names is not None and self.names.texts == self.class_names

    @property
    def num_pictures(self) -> int:
        """Pictures in the set."""
        return len(self.items)

    def in_words(self) -> str:
        """`4 pictures in 2 classes: cat, dog; prompts like 'a photo of a cat.'`, and what is passed over."""
        classes = f"{plural(len(self.class_names), 'class', 'classes')}: {some(self.class_names)}"
        prompt = self.templates[0].replace("{c}", self.class_names[0])
        words = f"{plural(self.num_pictures, 'picture')} in {classes}; prompts like {prompt!r}"
        return f"{words}; passed over: {self.passed_over.in_words()}" if self.passed_over.counts else words


def batches(
    pictures: Pictures, numbers: range, *, data: Data, batch_size: int, read_ahead: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """uint8 (B, 3, S, S) and int64 (B,), in order; the last batch may be smaller.

    Args:
        data: how the encoder sees pictures.
        numbers: numbers of the batches to make.
        read_ahead: decode the next batch while this one is used. That is faster on a GPU; on a CPU it would slow down
            the encoder whose speed is being measured. Loader processes would always read ahead.

    Raises:
        RunError: a picture cannot be read, or a label is not a class.
    """

    def load(item: Any) -> tuple[Tensor, int]:
        image, label = pictures.load(item)
        if not 0 <= label < len(pictures.class_names):
            raise RunError(f"class {label} in a data set of {len(pictures.class_names)} classes; its labels are wrong")
        return evaluation_transform(image, size=data.image_size, resize=data.resize), label

    chosen = range(pictures.num_pictures)[numbers.start * batch_size : numbers.stop * batch_size]
    waiting: list[list[Future[tuple[Tensor, int]]]] = []
    with ThreadPoolExecutor(min(MAX_THREADS, usable_cores())) as pool:
        try:
            for start in chosen[::batch_size]:
                end = min(start + batch_size, chosen.stop)
                waiting.append([pool.submit(load, pictures.items[i]) for i in range(start, end)])
                if len(waiting) > read_ahead:
                    yield _collated(waiting.pop(0))
            for futures in waiting:
                yield _collated(futures)
        finally:
            pool.shutdown(cancel_futures=True)


def _collated(futures: Sequence[Future[tuple[Tensor, int]]]) -> tuple[Tensor, Tensor]:
    loaded = [future.result() for future in futures]
    return torch.stack([image for image, _ in loaded]), torch.tensor([label for _, label in loaded])


def read_picture(content: bytes, *, where: str) -> Tensor:
    """Pixels of a picture: uint8 (3, H, W).

    Raises:
        RunError: it cannot be decoded; `where` says which picture it is.
    """
    try:
        return decode(open_picture(content))
    except RejectedPictureError as error:
        raise RunError(f"{where}: {error}; repair this picture or remove it") from error
