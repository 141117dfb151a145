"""Some samples of prepared data, drawn by a fixed permutation of them all, for its card."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from mlip_cli.data.dataset import BadSampleError
from mlip_cli.data.open import open_prepared
from mlip_cli.data.order import hash_of, permute
from mlip_cli.data.pictures import RejectedPictureError, open_picture, to_rgb

MOST_EXAMPLES = 24
SIDE = 160
"""Longest side of a shown picture in pixels."""


@dataclass(frozen=True)
class Example:
    """A sample to look at."""

    split: str
    key: str
    captions: tuple[str, ...]
    picture: bytes | None
    """A small WebP; None where the sample cannot be read."""


def examples_of(out: Path, splits: Sequence[str]) -> list[Example]:
    """At most MOST_EXAMPLES samples of all splits, the same each time, in the order in which they lie there.

    Raises:
        UsageError: a split is not prepared data.
        RunError: an index is damaged.
    """
    datasets = {split: open_prepared(out / split) for split in splits}
    ends = list(accumulate(dataset.num_samples for dataset in datasets.values()))
    chosen = permute(np.arange(min(MOST_EXAMPLES, ends[-1])), ends[-1], hash_of(len(splits)))
    examples = []
    for number in sorted(chosen.tolist()):
        place = next(place for place, end in enumerate(ends) if number < end)
        split = splits[place]
        try:
            sample = datasets[split].read(number - (ends[place - 1] if place else 0))
            texts = tuple(caption.text for caption in sample.captions)
            examples.append(Example(split, sample.key, texts, _small(sample.image)))
        except BadSampleError as error:
            examples.append(Example(split, error.key, (error.reason,), None))
    return examples


def _small(content: bytes) -> bytes | None:
    try:
        image = to_rgb(open_picture(content), least=(SIDE, SIDE))
    except RejectedPictureError:
        return None
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80)
    return file.getvalue()
