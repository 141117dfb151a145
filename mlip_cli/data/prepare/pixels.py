"""What a shard stores of a picture: its pixels at the stored size, encoded again so that no metadata is left.

A JPEG is stored as JPEG of quality 92, everything else as lossless WebP.
"""

import hashlib
import io
import struct
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from mlip_cli.data.pictures import RejectedPictureError, open_picture, to_same_array

MAX_SIDE = 16_383
"""The longest side that WebP can store."""
JPEG_QUALITY = 92


@dataclass(frozen=True)
class StoredPicture:
    """A picture as it goes into a shard."""

    content: bytes
    format: str
    """jpg or webp."""
    width: int
    height: int
    original_width: int
    """As shown, upright."""
    original_height: int
    pixels: int
    """`hash_pixels` of the pixels before they were encoded again."""


def store(content: bytes, *, size: int) -> StoredPicture:
    """Decode a picture and encode it again with its short side at `size` pixels at most and without any metadata.

    Raises:
        RejectedPictureError: not one of the six formats, damaged, over 64 megapixels, or of a kind without an
            agreed meaning as RGB (floating point, 32-bit integers).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        picture = open_picture(content)
        original = picture.width, picture.height
        pixels = to_same_array(picture, least=_scaled(original, 2 * size)[::-1])
    width, height = _scaled(original, size)
    if max(width, height) > MAX_SIDE:
        raise RejectedPictureError("picture too long", f"{original[0]} x {original[1]} pixels")
    rgb = resized(pixels, width, height)
    return StoredPicture(
        content=encode(rgb, is_jpeg=picture.is_jpeg),
        format="jpg" if picture.is_jpeg else "webp",
        width=width,
        height=height,
        original_width=original[0],
        original_height=original[1],
        pixels=hash_pixels(rgb),
    )


def resized(pixels: np.ndarray, width: int, height: int) -> Image.Image:
    """uint8 (H, W, 3) at another size: bicubic, antialiased.

    PyTorch does it in a fourth of Pillow's time, in whole numbers, so the result is the same on every processor.
    """
    if pixels.shape[:2] != (height, width):
        batch = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # in this order PyTorch keeps colours side by side
        scaled = interpolate(batch, (height, width), mode="bicubic", antialias=True)
        pixels = scaled.permute(0, 2, 3, 1)[0].numpy()
    return Image.fromarray(pixels)


def encode(rgb: Image.Image, *, is_jpeg: bool) -> bytes:
    """Encode as JPEG or as lossless WebP, without metadata."""
    file = io.BytesIO()
    bare = rgb.copy()
    bare.info.clear()
    if is_jpeg:
        bare.save(file, "JPEG", quality=JPEG_QUALITY)
    else:
        bare.save(file, "WEBP", lossless=True)
    return file.getvalue()


def hash_pixels(rgb: Image.Image) -> int:
    """The first 64 bits of the SHA-256 of size and pixels."""
    digest = hashlib.sha256(struct.pack("<II", *rgb.size) + rgb.tobytes()).digest()
    return int.from_bytes(digest[:8])


def _scaled(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """`size` with its short side at `short_side`; nothing is enlarged."""
    width, height = size
    short = min(width, height)
    if short <= short_side:
        return size
    return max(1, round(width * short_side / short)), max(1, round(height * short_side / short))
