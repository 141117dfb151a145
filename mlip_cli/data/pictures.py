"""The bytes of a picture become RGB pixels here, and only here: for preparing data, training and evaluation.

The content says the format, not the name. EXIF turns the picture upright. Transparent pixels lie on white, and an
animation gives its first frame. 16 bits of grey are scaled to 8; of 16 bits a colour Pillow drops the lower 8, which is
at most one level of 255 below scaling. simplejpeg decodes JPEGs where it is installed (the extra `fast`).
Pillow decodes everything else, and gives the same pixels of a JPEG to the bit.
"""

import io
import re
import struct
import warnings
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image
from PIL.WebPImagePlugin import WebPImageFile

try:
    from simplejpeg import decode_jpeg as simplejpeg_decode
except ImportError:
    simplejpeg_decode = None

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Pillow's names of the formats that we read. Its other decoders never see a file."""
NONE_OF_OURS = f"not {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
OTHER_FORMATS = {
    "AVIF": rb".{4}ftypavi[fs]",
    "HEIC": rb".{4}ftyp(hei|hev|mif1|msf1)",
    "JPEG 2000": rb".{4}jP  ",
    "JPEG XL": rb"\xff\x0a|.{4}JXL ",
    "SVG": rb"\s*(<\?xml[^>]*>\s*)?<svg\b",
    "a web page": rb"(?i)\s*<(!doctype html|html|head)\b",
    "XML": rb"\s*<",
    "JSON": rb"\s*[{\[]",
}
"""How files begin that often stand under the name of a picture, whatever its ending."""
MAX_PIXELS = 64_000_000
MAX_MEGAPIXELS = MAX_PIXELS // 1_000_000
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # Pillow's limit of 89 megapixels lies above ours
LEAST_FACTOR = 2
"""Decoding at 7/8 or 5/8 takes longer than decoding the whole and resizing it (640x480: 2.1 against 1.6 ms)."""

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
SIDEWAYS = tuple(ORIENTATIONS[i] for i in (5, 6, 7, 8))

SAY_ORIENTATION = frozenset(("exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp"))
"""Keys of Pillow's `info` from which its `getexif` takes the orientation; of a TIFF it takes it from the tags."""

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


class RejectedPictureError(Exception):
    """A picture that cannot be used: `reason` in fixed words, `detail` about this one."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class EncodedPicture(NamedTuple):
    """A picture whose size is known. `to_rgb` or `to_array` decodes it, once."""

    content: bytes
    image: Image.Image
    is_jpeg: bool
    turn: Image.Transpose | None
    """What shows the stored pixels upright."""
    height: int
    width: int
    """Both as shown, upright."""


def open_picture(content: bytes) -> EncodedPicture:
    """Read the header of a picture. Of a JPEG nothing more is read; other formats are decoded here.

    Raises:
        RejectedPictureError: not one of the six formats, damaged, or of more than 64 megapixels.
    """
    is_webp = content[:4] == b"RIFF" and content[8:12] == b"WEBP"
    if is_webp:
        _check_size(*_webp_size(content))
    head = content[:200].removeprefix(BOM_UTF8)
    for name, start in OTHER_FORMATS.items():
        if re.match(start, head, re.DOTALL):
            raise RejectedPictureError("not a picture", f"{name}, {NONE_OF_OURS}")
    with _REJECTED_IF_DAMAGED:
        file = io.BytesIO(content)
        image = WebPImageFile(file) if is_webp else Image.open(file, formats=FORMATS)
        _check_size(*image.size)
        is_jpeg = image.format in ("JPEG", "MPO")
        turn = _turn(image, is_jpeg=is_jpeg)
        width, height = image.size[::-1] if turn in SIDEWAYS else image.size
    return EncodedPicture(content, image, is_jpeg, turn, height, width)


def to_rgb(picture: EncodedPicture, *, least: tuple[int, int] | None = None) -> Image.Image:
    """The picture by Pillow, RGB and upright.

    Args:
        least: (H, W) that is large enough. A JPEG at least twice as large may be decoded at a reduced size, but never
        below it.

    Raises:
        RejectedPictureError: damaged, or of 32-bit integers or floating point, whose range nothing tells.
    """
    with _REJECTED_IF_DAMAGED:
        if least is not None and picture.is_jpeg:
            picture.image.draft("RGB", least if picture.turn in SIDEWAYS else least[::-1])
        return _upright_rgb(picture.image, picture.turn)


def pillow_to_rgb(image: Image.Image) -> Image.Image:
    """A picture that others opened with Pillow, as `to_rgb` makes it."""
    with _REJECTED_IF_DAMAGED:
        return _upright_rgb(image, _turn(image, is_jpeg=False))


def to_array(
    picture: EncodedPicture,
    *,
    least: tuple[int, int] | None = None,
    on_fallback: Callable[[str], None] = lambda _: None,
) -> np.ndarray:
    """The picture by the fastest decoder: uint8 (H, W, 3), upright.

    Args:
        least: (H, W) that is large enough. A JPEG at least twice as large may be decoded at a reduced size, but never
        below it; one that has to be turned and one in CMYK come whole. on_fallback: told why simplejpeg could not read
        a JPEG that Pillow could.

    Raises:
        RejectedPictureError: as `to_rgb` does.
    """
    is_plain = _is_plain_jpeg(picture)
    if not is_plain or simplejpeg_decode is None:
        return _array(to_rgb(picture, least=least if is_plain else None))
    height, width = least or (picture.height, picture.width)
    try:
        pixels = simplejpeg_decode(picture.content, min_height=height, min_width=width, min_factor=LEAST_FACTOR)
    except (RuntimeError, ValueError) as error:
        pixels = _array(to_rgb(picture))
        on_fallback(str(error))
    return pixels


def to_same_array(picture: EncodedPicture, *, least: tuple[int, int]) -> np.ndarray:
    """The pixels of `to_rgb`, to the bit, by the fastest decoder: uint8 (H, W, 3), upright.

    `to_array` may decode at 3/8 of the size, which Pillow cannot. What is stored must not depend on the decoder.

    Args:
        least: (H, W) that is large enough.

    Raises:
        RejectedPictureError: as `to_rgb` does.
    """
    if _is_plain_jpeg(picture) and simplejpeg_decode is not None:
        shrink = _draft_factor(picture, least)
        height, width = -(-picture.height // shrink), -(-picture.width // shrink)
        with suppress(RuntimeError, ValueError):
            return simplejpeg_decode(picture.content, min_height=height, min_width=width)
    return _array(to_rgb(picture, least=least))


def _is_plain_jpeg(picture: EncodedPicture) -> bool:
    """Whether simplejpeg shows the picture as it is."""
    return picture.is_jpeg and picture.turn is None and picture.image.mode in ("RGB", "L")


def _draft_factor(picture: EncodedPicture, least: tuple[int, int]) -> int:
    """The number by which Pillow's `draft` divides both sides of a JPEG that stays at least (H, W) large."""
    room = min(picture.height // least[0], picture.width // least[1])
    return next(factor for factor in (8, 4, 2, 1) if room >= factor or factor == 1)


def _array(rgb: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3), writable, as PyTorch wants it."""
    return np.frombuffer(bytearray(rgb.tobytes()), np.uint8).reshape(rgb.height, rgb.width, 3)


def jpeg_decoder() -> str:
    """Name and version of what decodes JPEGs here. A run that resumes with another may see slightly other pixels."""
    name = "pillow" if simplejpeg_decode is None else "simplejpeg"
    return f"{name} {version(name)}"


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        size = f"{width:,} x {height:,} pixels"
        raise RejectedPictureError("picture too large", f"{size}, over {MAX_MEGAPIXELS} megapixels")


def _webp_size(content: bytes) -> tuple[int, int]:
    """Width and height of a WebP by its first chunk (RFC 9649, section 2, and RFC 6386, 9.1).

    Pillow takes memory for all pixels when it opens a WebP, and a file of 36 bytes may say that it has 268 megapixels.
    """
    if content[12:16] == b"VP8X":
        return 1 + int.from_bytes(content[24:27], "little"), 1 + int.from_bytes(content[27:30], "little")
    if content[12:16] == b"VP8L":
        bits = int.from_bytes(content[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(content[26:28], "little") & 0x3FFF, int.from_bytes(content[28:30], "little") & 0x3FFF


class _RejectedIfDamaged:
    """Turns what Pillow raises on a damaged file into a RejectedPictureError."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Image.DecompressionBombError):  # Pillow checks its own limit before it tells the size
            raise RejectedPictureError("picture too large", f"over {MAX_MEGAPIXELS} megapixels") from None
        if isinstance(error, Image.UnidentifiedImageError):
            raise RejectedPictureError("not a picture", NONE_OF_OURS) from None
        if isinstance(error, UNDECODABLE):
            raise RejectedPictureError("damaged picture", str(error) or type(error).__name__) from None


_REJECTED_IF_DAMAGED = _RejectedIfDamaged()


def _turn(image: Image.Image, *, is_jpeg: bool) -> Image.Transpose | None:
    """What shows a picture upright. Damaged EXIF turns nothing, as in viewers.

    The header of a JPEG says it. A PNG may say it behind its pixels. Pillow turns a TIFF itself when it decodes it.
    """
    if not is_jpeg:
        image.load()
    if image.format != "TIFF" and SAY_ORIENTATION.isdisjoint(image.info):
        return None
    try:
        return ORIENTATIONS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except UNDECODABLE:
        return None


def _upright_rgb(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    image.load()
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise RejectedPictureError("unknown range of values", f"mode {image.mode}")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    if turn is None:
        return rgb
    upright = rgb.transpose(turn)
    upright.info.clear()  # it still says the orientation of the stored pixels
    return upright
