"""Every way a picture can come in, and what is stored."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from mlip_cli.data.pictures import ORIENTATIONS, RejectedPictureError
from mlip_cli.data.prepare.pixels import StoredPicture, hash_pixels, store

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def decoded(stored: StoredPicture) -> Image.Image:
    image = Image.open(io.BytesIO(stored.content))
    assert image.mode == "RGB"
    assert image.size == (stored.width, stored.height)
    return image


def two_halves(left: Any = RED, right: Any = BLUE, *, mode: str = "RGB") -> Image.Image:
    """40 x 20 pixels."""
    image = Image.new(mode, (40, 20), left)
    image.paste(right, (20, 0, 40, 20))
    return image


def near(found: Any, wanted: tuple[int, int, int], tolerance: int = 6) -> bool:
    return max(abs(a - b) for a, b in zip(found, wanted, strict=True)) <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_as_a_viewer_would(orientation: int) -> None:
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 40, 3), dtype=np.uint8))
    inverse = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)
    as_stored = upright.transpose(ORIENTATIONS[inverse]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = store(encoded(as_stored, exif=exif), size=256)
    assert (stored.width, stored.height) == (stored.original_width, stored.original_height) == (40, 20)
    assert np.array_equal(np.asarray(decoded(stored)), np.asarray(upright))


def test_short_side_is_stored_and_nothing_is_enlarged() -> None:
    small = store(encoded(two_halves()), size=256)
    assert (small.width, small.height) == (40, 20)
    large = store(encoded(two_halves().resize((400, 201))), size=32)
    assert (large.width, large.height, large.original_width, large.original_height) == (64, 32, 400, 201)


def test_jpeg_stays_jpeg_and_the_rest_becomes_lossless_webp() -> None:
    photograph = store(encoded(two_halves().resize((400, 200)), "JPEG"), size=50)
    assert photograph.format == "jpg"
    assert near(decoded(photograph).getpixel((10, 10)), RED)
    drawing = store(encoded(two_halves()), size=256)
    assert drawing.format == "webp"
    assert np.array_equal(np.asarray(decoded(drawing)), np.asarray(two_halves()))


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_formats_without_loss_keep_their_pixels(format: str) -> None:
    content = encoded(two_halves(), format, **({"lossless": True} if format == "WEBP" else {}))
    assert store(content, size=256).pixels == hash_pixels(two_halves())


def test_16_bits_are_scaled_not_clipped() -> None:
    gray = Image.fromarray(np.array([[0, 257, 32896, 65535]] * 4, np.uint16))
    values = np.asarray(decoded(store(encoded(gray), size=256)))[0, :, 0]
    assert values.tolist() == [0, 1, 128, 255]
    tiff = store(encoded(gray, "TIFF"), size=256)
    assert tiff.pixels == store(encoded(gray), size=256).pixels


def test_transparency_lies_on_white() -> None:
    rgba = two_halves((255, 0, 0, 128), (0, 0, 0, 0), mode="RGBA")
    image = decoded(store(encoded(rgba), size=256))
    assert near(image.getpixel((5, 5)), (255, 127, 127), 1)
    assert image.getpixel((35, 5)) == WHITE
    gray_alpha = decoded(store(encoded(Image.new("LA", (8, 8), (0, 0))), size=256))
    assert gray_alpha.getpixel((0, 0)) == WHITE
    palette = two_halves().quantize(2)
    keyed = decoded(store(encoded(palette, transparency=palette.getpixel((5, 5))), size=256))
    assert keyed.getpixel((5, 5)) == WHITE
    assert keyed.getpixel((35, 5)) == BLUE


def test_palette_gray_bilevel_and_cmyk_become_rgb() -> None:
    assert decoded(store(encoded(two_halves().quantize(4)), size=256)).getpixel((35, 5)) == BLUE
    assert decoded(store(encoded(Image.new("L", (8, 8), 77)), size=256)).getpixel((0, 0)) == (77, 77, 77)
    assert decoded(store(encoded(Image.new("1", (8, 8), 1)), size=256)).getpixel((0, 0)) == WHITE
    cmyk = decoded(store(encoded(two_halves().convert("CMYK"), "JPEG", quality=95), size=256))
    assert near(cmyk.getpixel((5, 5)), RED)
    assert near(cmyk.getpixel((35, 5)), BLUE)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), BLUE)]
    options = {"lossless": True} if format == "WEBP" else {}
    content = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert decoded(store(content, size=256)).getpixel((0, 0)) == RED


def test_metadata_is_stripped() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "SECRET CAMERA"
    for content in (
        encoded(two_halves(), "JPEG", exif=exif, comment=b"SECRET", icc_profile=b"SECRET" * 30),
        encoded(two_halves(), "PNG", exif=exif, icc_profile=b"SECRET" * 30),
    ):
        stored = store(content, size=256)
        assert b"SECRET" in content or b"iCCP" in content
        assert b"SECRET" not in stored.content
        assert not decoded(stored).getexif()
        assert "icc_profile" not in decoded(stored).info


def test_equal_pixels_have_equal_hashes_whatever_held_them() -> None:
    assert store(encoded(two_halves()), size=256).pixels == store(encoded(two_halves(), "BMP"), size=256).pixels
    assert store(encoded(two_halves()), size=256).pixels != store(encoded(two_halves(BLUE, RED)), size=256).pixels
    wide, tall = Image.new("RGB", (40, 20), RED), Image.new("RGB", (20, 40), RED)
    assert store(encoded(wide), size=256).pixels != store(encoded(tall), size=256).pixels


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello", "not a picture: none of JPEG, PNG, WEBP, GIF, BMP, TIFF"),
        (b"", "not a picture: none of JPEG, PNG, WEBP, GIF, BMP, TIFF"),
        (encoded(two_halves(), "PPM"), "not a picture: none of JPEG, PNG, WEBP, GIF, BMP, TIFF"),
        (encoded(Image.new("F", (8, 8)), "TIFF"), "unknown range of values: mode F"),
        (encoded(Image.new("1", (8001, 8000))), "picture too large: 8001 x 8000 pixels, over 64 megapixels"),
        (encoded(Image.new("1", (10_000, 10_000))), "picture too large: over 64 megapixels"),
        (encoded(Image.new("1", (20_000, 10_000))), "picture too large: over 64 megapixels"),
        (encoded(Image.new("1", (20_000, 8))), "picture too long: 20000 x 8 pixels"),
    ],
)
def test_what_cannot_be_stored_says_why(content: bytes, message: str) -> None:
    with pytest.raises(RejectedPictureError) as error:
        store(content, size=256)
    assert str(error.value) == message


def test_a_truncated_jpeg_is_damaged() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8))
    content = encoded(noise, "JPEG")
    with pytest.raises(RejectedPictureError, match=r"^damaged picture: image file is truncated"):
        store(content[: len(content) // 2], size=256)


def test_damage_anywhere_is_a_reject_and_never_a_crash() -> None:
    random = np.random.default_rng(0)
    rejected = 0
    for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        whole = encoded(two_halves(), format)
        for _ in range(60):
            content = bytearray(whole)
            for at in random.integers(0, len(content), 3):
                content[at] = random.integers(0, 256)
            try:
                store(bytes(content[: random.integers(1, len(content) + 1)]), size=16)
            except RejectedPictureError:
                rejected += 1
    assert rejected > 100
