"""Pictures to uint8 tensors of the model's size. Normalising is the model's, on its device.

Decoding is torchvision's while it lasts (0.29 announces its removal), then Pillow's. For what `mlip prepare-data`
writes, 8-bit RGB JPEG, PNG and WebP, both give the same pixels; torchvision takes 40 to 80 % of the time.
"""

import io
import math

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from mlip_cli.config import Augment

try:
    from torchvision.io import ImageReadMode
    from torchvision.io import decode_image as torchvision_decode
except ImportError:
    torchvision_decode = None

STORED_FORMATS = ("JPEG", "PNG", "WEBP")
"""Pillow's names for what shards hold; its other decoders never see a file."""

CROP_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10


def decode(image: bytes) -> Tensor:
    """JPEG, PNG or WebP -> uint8 (3, H, W).

    Raises:
        ValueError: truncated, damaged, empty or of another format; says which.
    """
    try:
        pixels = _pillow_decode(image) if torchvision_decode is None else _torchvision_decode(image)
    except (RuntimeError, OSError, SyntaxError) as error:  # Pillow's decoders raise SyntaxError for broken PNGs
        reason = str(error).split(".cpp:")[-1].partition(", ")[2] or str(error)
        raise ValueError(f"the picture cannot be decoded: {reason.splitlines()[0]}") from error
    if pixels is None:
        raise ValueError("the picture cannot be decoded: more than 8 bits a channel")
    return pixels


def _torchvision_decode(image: bytes) -> Tensor | None:
    encoded = torch.frombuffer(bytearray(image), dtype=torch.uint8) if image else torch.empty(0, dtype=torch.uint8)
    pixels = torchvision_decode(encoded, ImageReadMode.RGB)
    return pixels if pixels.dtype == torch.uint8 else None


def _pillow_decode(image: bytes) -> Tensor | None:
    picture = Image.open(io.BytesIO(image), formats=STORED_FORMATS)
    return F.pil_to_tensor(picture.convert("RGB")) if not picture.mode.startswith(("I", "F")) else None


def pil_to_uint8(image: Image.Image) -> Tensor:
    """A Pillow picture of any mode -> uint8 (3, H, W); what is transparent becomes white, as in prepared data."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return F.pil_to_tensor(image.convert("RGB"))


def evaluation_transform(image: Tensor, *, size: int) -> Tensor:
    """uint8 (3, H, W) -> (3, size, size): short side resized (bicubic, antialiased), centre cropped."""
    resized = F.resize(image, [size], interpolation=InterpolationMode.BICUBIC, antialias=True)
    return F.center_crop(resized, [size, size])


def training_transform(image: Tensor, *, size: int, augment: Augment, generator: torch.Generator) -> Tensor:
    """uint8 (3, H, W) -> (3, size, size), changed at random as `augment` says; all draws are from `generator`."""
    if augment.crop_scale is None:
        image = evaluation_transform(image, size=size)
    else:
        top, left, height, width = _draw_crop(image, augment.crop_scale, generator)
        image = F.resized_crop(
            image, top, left, height, width, [size, size], interpolation=InterpolationMode.BICUBIC, antialias=True
        )
    if augment.flip and _uniform(0, 1, generator) < 0.5:
        image = F.horizontal_flip(image)
    if augment.color_jitter is not None:
        image = _jitter(image, augment.color_jitter, generator)
    return image


def _draw_crop(image: Tensor, scale: tuple[float, float], generator: torch.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop with a random share of the area and a random aspect ratio.

    The draws are those of torchvision's RandomResizedCrop, in the same order.
    """
    height, width = image.shape[-2:]
    for _ in range(CROP_ATTEMPTS):
        area = height * width * _uniform(*scale, generator)
        ratio = math.exp(_uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1]), generator))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return _randint(height - h + 1, generator), _randint(width - w + 1, generator), h, w
    ratio = min(max(width / height, CROP_RATIO[0]), CROP_RATIO[1])  # nothing fits a very long picture: the centre
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
    return int(torch.randint(0, stop, (1,), generator=generator).item())
