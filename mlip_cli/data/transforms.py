"""Pictures to uint8 tensors of the model's size. Normalising is the model's, on its device.

JPEGs are decoded by simplejpeg where it is installed (the extra `fast`), everything else by torchvision while it has
decoders (0.29 announces their removal), and what these cannot read, turned JPEGs and transparent pictures by Pillow.
Whole pictures are the same to the bit by all three for what `mlip prepare-data` writes, 8-bit RGB JPEG, PNG and WebP.
What only simplejpeg does is to decode a JPEG at a half, a third or less of its size where that is still large enough
for what is cut from it: such a picture differs slightly from one that was decoded whole and then made smaller.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from mlip_cli.data.pictures import ORIENTATIONS, UNDECODABLE, PictureHeader, UndecodableError, read_header
from mlip_cli.recipe.config import Augment

try:
    from torchvision.io import ImageReadMode
    from torchvision.io import decode_image as torchvision_decode
except ImportError:
    torchvision_decode = None
try:
    from simplejpeg import decode_jpeg as simplejpeg_decode
except ImportError:
    simplejpeg_decode = None

STORED_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
"""Pillow's names for what shards hold; its other decoders never see a file."""

MANY_BITS = "more than 8 bits a channel"
LEAST_FACTOR = 2
"""Decoding at 7/8 or 5/8 takes longer than decoding the whole and resizing it (640x480: 2.1 against 1.6 ms)."""

CROP_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10


@dataclass(frozen=True)
class Crop:
    """A part of a picture, in pixels of the whole picture as it is stored."""

    top: int
    left: int
    height: int
    width: int
    of: tuple[int, int]
    """(H, W) of the picture."""

    def least(self, size: int) -> tuple[int, int]:
        """Least (H, W) of the picture, made smaller, from which this part has `size` pixels each way."""
        height, width = self.of
        return math.ceil(height * (size + 1) / self.height), math.ceil(width * (size + 1) / self.width)

    def within(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Top, left, height and width of the part in the picture made smaller to `height` and `width`."""
        vertical, horizontal = height / self.of[0], width / self.of[1]
        top, left = round(self.top * vertical), round(self.left * horizontal)
        bottom, right = round((self.top + self.height) * vertical), round((self.left + self.width) * horizontal)
        return top, left, bottom - top, right - left


def jpeg_decoder() -> str:
    """Name and version of what decodes JPEGs here. Runs that go on with another one see slightly other pictures."""
    decoders = (("simplejpeg", simplejpeg_decode), ("torchvision", torchvision_decode), ("pillow", Image))
    name = next(name for name, decoder in decoders if decoder is not None)
    return f"{name} {version(name)}"


def decode(
    image: bytes, *, least: tuple[int, int] | None = None, on_fallback: Callable[[str], None] = lambda _: None
) -> Tensor:
    """JPEG, PNG or WebP -> uint8 (3, H, W), upright and with white where it is transparent, as prepared data are.

    Args:
        least: (H, W) that is large enough; a picture of at least twice that may come smaller, but not below it.
        on_fallback: told why the fast decoder could not read a picture that Pillow could.

    Raises:
        UndecodableError: truncated, damaged, empty, of another format or of more than 64 megapixels; says which.
    """
    header = read_header(image)
    pixels = _decode(image, header, least, on_fallback)
    height, width = pixels.shape[-2:]
    is_smaller = least is not None and least[0] <= height <= header.height and least[1] <= width <= header.width
    if (height, width) != (header.height, header.width) and not is_smaller:
        raise UndecodableError(f"{width} x {height} pixels where its header says {header.width} x {header.height}")
    return pixels


def _decode(
    image: bytes, header: PictureHeader, least: tuple[int, int] | None, on_fallback: Callable[[str], None]
) -> Tensor:
    if not header.is_as_stored:
        try:
            return _pillow_decode(image, header)
        except UNDECODABLE as error:
            raise UndecodableError(_reason(error)) from error
    reason = None
    try:
        if simplejpeg_decode is not None and header.format == "jpg" and header.is_plain:
            height, width = least or (header.height, header.width)
            pixels = simplejpeg_decode(image, min_height=height, min_width=width, min_factor=LEAST_FACTOR)
            return torch.from_numpy(pixels).permute(2, 0, 1)
        if torchvision_decode is not None:
            return _torchvision_decode(image)
    except (RuntimeError, ValueError) as error:
        reason = _reason(error)
    try:
        whole = _pillow_decode(image, header)
    except UNDECODABLE as error:
        raise UndecodableError(reason or _reason(error)) from error
    if reason is not None:
        on_fallback(reason)
    return whole


def _torchvision_decode(image: bytes) -> Tensor:
    pixels = torchvision_decode(torch.frombuffer(bytearray(image), dtype=torch.uint8), ImageReadMode.RGB)
    if pixels.dtype != torch.uint8:
        raise ValueError(MANY_BITS)
    return pixels


def _pillow_decode(image: bytes, header: PictureHeader) -> Tensor:
    picture = Image.open(io.BytesIO(image), formats=[STORED_FORMATS[header.format]])
    if picture.mode.startswith(("I", "F")):
        raise ValueError(MANY_BITS)
    pixels = pil_to_uint8(picture)
    if header.orientation == 1:
        return pixels
    return F.pil_to_tensor(F.to_pil_image(pixels).transpose(ORIENTATIONS[header.orientation]))


def _reason(error: Exception) -> str:
    """The first line of what a decoder says, without the place in its source."""
    return (str(error).split(".cpp:")[-1].partition(", ")[2] or str(error)).splitlines()[0]


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


def training_crop(height: int, width: int, *, augment: Augment, generator: torch.Generator) -> Crop | None:
    """What training cuts from a picture of this size, drawn from `generator`; None: what evaluation cuts."""
    if augment.crop_scale is None:
        return None
    return Crop(*_draw_crop(height, width, augment.crop_scale, generator), of=(height, width))


def least_size(crop: Crop | None, size: int) -> tuple[int, int]:
    """Least (H, W) of a picture that is large enough for `crop`, resized to `size`."""
    return (size, size) if crop is None else crop.least(size)


def training_transform(
    image: Tensor, *, crop: Crop | None, size: int, augment: Augment, generator: torch.Generator
) -> Tensor:
    """uint8 (3, H, W) -> (3, size, size): `crop` resized, then changed at random, all draws from `generator`.

    The picture may be a smaller one than `crop` was made for.
    """
    if crop is None:
        image = evaluation_transform(image, size=size)
    else:
        place = crop.within(*image.shape[-2:])
        image = F.resized_crop(image, *place, [size, size], interpolation=InterpolationMode.BICUBIC, antialias=True)
    if augment.flip and _uniform(0, 1, generator) < 0.5:
        image = F.horizontal_flip(image)
    if augment.color_jitter is not None:
        image = _jitter(image, augment.color_jitter, generator)
    return image


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
