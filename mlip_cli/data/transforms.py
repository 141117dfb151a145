"""Pictures become uint8 tensors of the model's size. The model normalises them, on its device."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional as F

from mlip_cli.data.pictures import EncodedPicture, to_array
from mlip_cli.recipe.config import Data, Resize

CROP_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
MOST_SQUARES = 64
"""So many short sides of a picture are resized at most: the whole of one of 1 x 16,383 pixels would take gigabytes."""


@dataclass(frozen=True)
class Crop:
    """A part of a picture, in pixels of the whole picture."""

    top: int
    left: int
    height: int
    width: int
    of: tuple[int, int]
    """(H, W) of the picture."""

    def least(self, size: int) -> tuple[int, int]:
        """The least (H, W) to which the picture may shrink so that this part keeps `size` pixels each way."""
        height, width = self.of
        return math.ceil(height * (size + 1) / self.height), math.ceil(width * (size + 1) / self.width)

    def within(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Top, left, height and width of the part once the picture has shrunk to `height` and `width`."""
        vertical, horizontal = height / self.of[0], width / self.of[1]
        top, left = round(self.top * vertical), round(self.left * horizontal)
        bottom, right = round((self.top + self.height) * vertical), round((self.left + self.width) * horizontal)
        return top, left, bottom - top, right - left


def decode(
    picture: EncodedPicture,
    *,
    least: tuple[int, int] | None = None,
    on_fallback: Callable[[str], None] = lambda _: None,
) -> Tensor:
    """The pixels of a picture, uint8 (3, H, W), upright; arguments and errors are those of `to_array`."""
    return torch.from_numpy(to_array(picture, least=least, on_fallback=on_fallback)).permute(2, 0, 1)


def evaluation_transform(image: Tensor, *, size: int, resize: Resize = "crop") -> Tensor:
    """uint8 (3, H, W) -> (3, size, size): short side resized (bicubic, antialiased), centre cropped.

    With `resize` squash both sides are resized to `size`.
    """
    if resize == "squash":
        return _resized(image, size, size)
    image = _middle(image)
    height, width = image.shape[-2:]
    short = min(height, width)
    height, width = size * height // short, size * width // short
    top, left = round((height - size) / 2), round((width - size) / 2)
    return _resized(image, height, width)[:, top : top + size, left : left + size]


def _middle(image: Tensor) -> Tensor:
    """(3, H, W) -> the same without the ends of a very long picture, which a crop of its middle leaves out."""
    height, width = image.shape[-2:]
    most = MOST_SQUARES * min(height, width)
    top, left = max(0, height - most) // 2, max(0, width - most) // 2
    return image[:, top : height - top, left : width - left]


def training_crop(height: int, width: int, *, data: Data, generator: torch.Generator) -> Crop | None:
    """Draw the part of a picture that training uses; None where training uses the whole, as evaluation does."""
    scale = data.augment.crop_scale
    return None if scale is None else Crop(*_draw_crop(height, width, scale, generator), of=(height, width))


def least_size(crop: Crop | None, size: int) -> tuple[int, int]:
    """The least (H, W) to which a picture may shrink before `crop` is resized to `size`."""
    return (size, size) if crop is None else crop.least(size)


def training_transform(image: Tensor, *, crop: Crop | None, data: Data, generator: torch.Generator) -> Tensor:
    """uint8 (3, H, W) -> (3, size, size): `crop` resized, then changed at random, all draws from `generator`.

    The picture may have shrunk since `crop` was drawn.
    """
    size, augment = data.image_size, data.augment
    if crop is None:
        image = evaluation_transform(image, size=size, resize=data.resize)
    else:
        top, left, height, width = crop.within(*image.shape[-2:])
        part = image[:, top : top + height, left : left + width]
        image = _resized(part, size, size)
    if augment.flip and _uniform(0, 1, generator) < 0.5:
        image = image.flip(-1)
    if augment.color_jitter is not None:
        image = _jitter(image, augment.color_jitter, generator)
    return image


def _resized(image: Tensor, height: int, width: int) -> Tensor:
    """What torchvision's `resize` makes of uint8 pixels, in less time: of a small picture it is half of the work."""
    if image.shape[-2:] == (height, width):
        return image
    return interpolate(image[None], (height, width), mode="bicubic", align_corners=False, antialias=True)[0]


def _draw_crop(
    height: int, width: int, scale: tuple[float, float], generator: torch.Generator
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop with a random share of the area and a random aspect ratio.

    The draws are those of torchvision's RandomResizedCrop, in the same order.
    """
    for _ in range(CROP_ATTEMPTS):
        area = height * width * _uniform(*scale, generator)
        ratio = math.exp(_uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1]), generator))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return _randint(height - h + 1, generator), _randint(width - w + 1, generator), h, w
    ratio = min(max(width / height, CROP_RATIO[0]), CROP_RATIO[1])  # a very long picture: take its centre
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (height - h) // 2, (width - w) // 2, h, w


def _jitter(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Brightness, contrast and saturation, in a random order, each by a factor in [1 - strength, 1 + strength]."""
    changes = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
    for i in torch.randperm(len(changes), generator=generator).tolist():
        image = changes[i](image, _uniform(1 - strength, 1 + strength, generator))
    return image


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return torch.empty(1).uniform_(low, high, generator=generator).item()


def _randint(stop: int, generator: torch.Generator) -> int:
    return int(torch.randint(stop, (), generator=generator).item())
