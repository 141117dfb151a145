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

from mlip_cli.data.pictures import EncodedPicture, RejectedPictureError, open_picture, to_same_array
from mlip_cli.data.prepare.filters import AS_IT_IS, Cleaning, size_fault

MAX_SIDE = 16_383
"""The longest side that WebP can store."""
JPEG_QUALITY = 92
WEBP_METHOD = 2
"""The effort of lossless compression, 0 to 6. Pillow's own, 4, takes 2.2 to 3.8 times as long for 2 to 4 % fewer bytes
(drawings and photographs, 64 to 341 pixels wide)."""
PERCEPTUAL = "dhash 1"
"""Of `hash_look`. Another number means other hashes, which must not be compared with these."""


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
    perceptual: int
    """`hash_look` of the same pixels; 0 where nothing is compared by it."""


def store(content: bytes, *, size: int, cleaning: Cleaning = AS_IT_IS) -> StoredPicture:
    """Decode a picture and encode it again with its short side at `size` pixels at most and without any metadata.

    Raises:
        RejectedPictureError: as `scaled_rgb`.
    """
    picture, rgb = scaled_rgb(content, size=size, cleaning=cleaning)
    return StoredPicture(
        content=encode(rgb, is_jpeg=picture.is_jpeg),
        format="jpg" if picture.is_jpeg else "webp",
        width=rgb.width,
        height=rgb.height,
        original_width=picture.width,
        original_height=picture.height,
        pixels=hash_pixels(rgb),
        perceptual=hash_look(rgb) if cleaning.compares_looks else 0,
    )


def scaled_rgb(content: bytes, *, size: int, cleaning: Cleaning = AS_IT_IS) -> tuple[EncodedPicture, Image.Image]:
    """A picture, and its pixels with the short side at `size` at most. A JPEG of a wrong size is not decoded.

    Raises:
        RejectedPictureError: not one of the six formats, damaged, over 64 megapixels, of a kind without an agreed
            meaning as RGB (floating point, 32-bit integers), or of a size that the user does not want.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        picture = open_picture(content)
        original = picture.width, picture.height
        if fault := size_fault(original, cleaning):
            raise RejectedPictureError(*fault)
        pixels = to_same_array(picture, least=_scaled(original, 2 * size)[::-1])
    scaled = _scaled(original, size)
    if max(scaled) > MAX_SIDE:
        raise RejectedPictureError("picture too long", f"{original[0]} x {original[1]} pixels")
    return picture, resized(pixels, *scaled)


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
        bare.save(file, "WEBP", lossless=True, method=WEBP_METHOD)
    return file.getvalue()


def hash_pixels(rgb: Image.Image) -> int:
    """The first 64 bits of the SHA-256 of size and pixels."""
    digest = hashlib.sha256(struct.pack("<II", *rgb.size) + rgb.tobytes()).digest()
    return int.from_bytes(digest[:8])


def hash_look(rgb: Image.Image) -> int:
    """64 bits that hardly change when a picture is resized or compressed: dHash.

    The picture is made grey and 9 x 8 pixels large; a bit is 1 where a pixel's right neighbour is brighter. Rows go
    from the top, and the first pixel gives the highest bit. Source: N. Krawetz, "Kind of Like That", 2013.
    """
    grey = rgb.convert("L").resize((9, 8), Image.Resampling.LANCZOS)
    pixels = np.frombuffer(grey.tobytes(), np.uint8).reshape(8, 9)
    return int.from_bytes(np.packbits(pixels[:, 1:] > pixels[:, :-1]).tobytes())


def _scaled(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """`size` with its short side at `short_side`; nothing is enlarged."""
    width, height = size
    short = min(width, height)
    if short <= short_side:
        return size
    return max(1, round(width * short_side / short)), max(1, round(height * short_side / short))
