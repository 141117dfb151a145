"""Format and size of an encoded picture from its first bytes, before anything is decoded.

The formats: JPEG in ITU-T T.81, annex B; PNG in RFC 2083, section 3; WebP in RFC 9649, section 2, and RFC 6386, 9.1.
"""

import math
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image

PNG = b"\x89PNG\r\n\x1a\n"
JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers SOF0 to SOF15; the three between them are tables, a reserved one and conditions of arithmetic coding."""
JPEG_BARE = frozenset((0x01, *range(0xD0, 0xD9)))
"""Markers that no length follows."""


class UndecodableError(ValueError):
    """A picture that cannot be decoded; `reason` says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the picture cannot be decoded: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class PictureHeader:
    """What a picture says of itself."""

    format: str
    """jpg, png or webp."""
    height: int
    width: int
    """Both as shown, upright."""
    is_plain: bool = True
    """False for JPEGs of other than one or three components (CMYK): decoders turn them into RGB each in its own way."""
    orientation: int = 1
    """By EXIF, of a JPEG: how the stored pixels are to be turned, a key of `ORIENTATIONS`, or 1."""
    is_opaque: bool = True
    """False where pixels may be transparent: what colour they have is then no matter."""

    @property
    def is_as_stored(self) -> bool:
        """The pixels as they are stored are the picture."""
        return self.orientation == 1 and self.is_opaque


def read_header(image: bytes) -> PictureHeader:
    """Format and size of a JPEG, PNG or WebP.

    Raises:
        UndecodableError: another format, no size in it, or more pixels than anybody should decode.
    """
    if image[:2] == b"\xff\xd8":
        header = _jpeg(image)
    elif image[:8] == PNG and image[12:16] == b"IHDR" and len(image) >= 24:
        header = PictureHeader(
            "png", int.from_bytes(image[20:24]), int.from_bytes(image[16:20]), is_opaque=_is_opaque_png(image)
        )
    elif image[:4] == b"RIFF" and image[8:12] == b"WEBP" and len(image) >= 30:
        height, width, is_opaque = _webp(image)
        header = PictureHeader("webp", height, width, is_opaque=is_opaque)
    else:
        raise UndecodableError("neither JPEG nor PNG nor WebP" if image else "no bytes")
    if header.height == 0 or header.width == 0:
        raise UndecodableError(f"{header.width} x {header.height} pixels")
    if header.height * header.width > MAX_PIXELS:
        megapixels = MAX_PIXELS // 1_000_000
        raise UndecodableError(f"{header.width:,} x {header.height:,} pixels, over {megapixels} megapixels")
    return header


def _jpeg(image: bytes) -> PictureHeader:
    """The first frame header; what libjpeg skips (bytes between segments, fill bytes) is skipped."""
    at, orientation = 2, 1
    while (at := image.find(b"\xff", at)) >= 0 and at + 1 < len(image):
        marker = image[at + 1]
        if marker in JPEG_FRAMES and at + 10 <= len(image):
            height, width = (int.from_bytes(image[at + i : at + i + 2]) for i in (5, 7))
            if orientation >= 5:
                height, width = width, height
            return PictureHeader("jpg", height, width, is_plain=image[at + 9] in (1, 3), orientation=orientation)
        if marker in (0xD9, 0xDA):
            break
        if marker == 0xFF:
            at += 1
        elif marker == 0x00 or marker in JPEG_BARE:
            at += 2
        else:
            end = at + 2 + max(2, int.from_bytes(image[at + 2 : at + 4]))
            if marker == 0xE1 and image[at + 4 : at + 10] == b"Exif\0\0":
                orientation = _orientation(image[at + 4 : end])
            at = end
    raise UndecodableError("a JPEG without a frame header")


def _orientation(segment: bytes) -> int:
    """What an EXIF segment says of it; 1 where it is damaged or says nothing, as viewers take it."""
    exif = Image.Exif()
    try:
        exif.load(segment)
        found = exif.get(ExifTags.Base.Orientation, 1)
    except UNDECODABLE:
        return 1
    return found if found in ORIENTATIONS else 1


def _is_opaque_png(image: bytes) -> bool:
    """Whether no pixel can be transparent: neither by its colour type nor by a tRNS chunk ahead of the pixels."""
    return image[25:26] not in (b"\4", b"\6") and image.find(b"tRNS", 0, image.find(b"IDAT")) < 0


def _webp(image: bytes) -> tuple[int, int, bool]:
    """(height, width, whether it is opaque) by the first chunk, one of the three that a file may begin with."""
    chunk = image[12:16]
    if chunk == b"VP8X":
        height, width = (int.from_bytes(image[at : at + 3], "little") + 1 for at in (27, 24))
        return height, width, not image[20] & 0x10
    if chunk == b"VP8L" and image[20] == 0x2F:
        bits = int.from_bytes(image[21:25], "little")
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1, not bits >> 28 & 1
    if chunk == b"VP8 " and image[23:26] == b"\x9d\x01\x2a":
        height, width = (int.from_bytes(image[at : at + 2], "little") & 0x3FFF for at in (28, 26))
        return height, width, True
    raise UndecodableError("a WebP without a frame header")


MAX_PIXELS = 64_000_000

ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what shows the picture upright (Exif 2.32, tag 0x0112)."""
SWAPPING = tuple(ORIENTATIONS[i] for i in (5, 6, 7, 8))

UNDECODABLE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    OverflowError,
    EOFError,
    MemoryError,
    struct.error,
    zlib.error,
)
"""What Pillow's decoders raise on damaged files."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture as RGB: transparency on white, 16 bits scaled to 8.

    Raises:
        RejectedPictureError: 32-bit integers or floating point, whose range nothing tells.
    """
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise RejectedPictureError("unknown range of values", f"mode {image.mode}")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


class RejectedPictureError(Exception):
    """A picture that cannot be stored: `reason` in fixed words, `detail` about this one."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def _check_size(size: tuple[int, int]) -> None:
    if math.prod(size) > MAX_PIXELS:
        raise RejectedPictureError(
            "picture too large", f"{size[0]} x {size[1]} pixels, over {MAX_PIXELS // 1_000_000} megapixels"
        )
