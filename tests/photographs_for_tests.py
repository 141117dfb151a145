"""Photographs: parts of the two that scikit-learn brings along."""

import io
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images


def photographs(n: int, *, size: tuple[int, int] = (300, 240), seed: int = 0) -> list[Image.Image]:
    """Different parts of photographs, each of `size`: width and height up to 640 x 427."""
    pictures = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    random, (width, height), found = np.random.default_rng(seed), size, []
    for i in range(n):
        x, y = int(random.integers(0, 640 - width + 1)), int(random.integers(0, 427 - height + 1))
        found.append(pictures[i % 2].crop((x, y, x + width, y + height)))
    return found


def encoded(picture: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """The bytes of a file."""
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()
