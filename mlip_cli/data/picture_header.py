"""Format and size of an encoded picture from its first bytes, before anything is decoded.

The formats: JPEG in ITU-T T.81, annex B; PNG in RFC 2083, section 3; WebP in RFC 9649, section 2, and RFC 6386, 9.1.
"""

from dataclasses import dataclass

from mlip_cli.data.pixels import MAX_PIXELS

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
    is_plain: bool = True
    """False for JPEGs of other than one or three components (CMYK): decoders turn them into RGB each in its own way."""


def read_header(image: bytes) -> PictureHeader:
    """Format and size of a JPEG, PNG or WebP.

    Raises:
        UndecodableError: another format, no size in it, or more pixels than anybody should decode.
    """
    if image[:2] == b"\xff\xd8":
        header = _jpeg(image)
    elif image[:8] == PNG and image[12:16] == b"IHDR" and len(image) >= 24:
        header = PictureHeader("png", int.from_bytes(image[20:24]), int.from_bytes(image[16:20]))
    elif image[:4] == b"RIFF" and image[8:12] == b"WEBP" and len(image) >= 30:
        header = PictureHeader("webp", *_webp(image))
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
    at = 2
    while (at := image.find(b"\xff", at)) >= 0 and at + 1 < len(image):
        marker = image[at + 1]
        if marker in JPEG_FRAMES and at + 10 <= len(image):
            height, width = (int.from_bytes(image[at + i : at + i + 2]) for i in (5, 7))
            return PictureHeader("jpg", height, width, is_plain=image[at + 9] in (1, 3))
        if marker in (0xD9, 0xDA):
            break
        if marker == 0xFF:
            at += 1
        elif marker == 0x00 or marker in JPEG_BARE:
            at += 2
        else:
            at += 2 + max(2, int.from_bytes(image[at + 2 : at + 4]))
    raise UndecodableError("a JPEG without a frame header")


def _webp(image: bytes) -> tuple[int, int]:
    """(height, width) by the first chunk, one of the three that a file may begin with."""
    chunk = image[12:16]
    if chunk == b"VP8X":
        return int.from_bytes(image[27:30], "little") + 1, int.from_bytes(image[24:27], "little") + 1
    if chunk == b"VP8L" and image[20] == 0x2F:
        bits = int.from_bytes(image[21:25], "little")
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if chunk == b"VP8 " and image[23:26] == b"\x9d\x01\x2a":
        return int.from_bytes(image[28:30], "little") & 0x3FFF, int.from_bytes(image[26:28], "little") & 0x3FFF
    raise UndecodableError("a WebP without a frame header")
