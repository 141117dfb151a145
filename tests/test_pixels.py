"""What prepare-data stores of a picture."""

import io
from typing import Any

import numpy as np
import pytest
from photographs_for_tests import encoded, photographs
from PIL import ExifTags, Image

from mlip_cli.data.pictures import RejectedPictureError
from mlip_cli.data.prepare.filters import Cleaning
from mlip_cli.data.prepare.pixels import StoredPicture, hash_look, hash_pixels, store

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


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


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_a_large_picture_on_its_side_is_stored_upright(kind: str) -> None:
    """Pillow decodes a large JPEG at half its size; the size that it asks for lies on its side too."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    stored = store(encoded(two_halves().resize((400, 200)), kind, exif=exif), size=50)
    assert (stored.original_width, stored.original_height, stored.width, stored.height) == (200, 400, 50, 100)
    assert near(decoded(stored).getpixel((25, 20)), RED)
    assert near(decoded(stored).getpixel((25, 80)), BLUE)


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


def test_a_picture_longer_than_webp_allows_is_rejected() -> None:
    with pytest.raises(RejectedPictureError, match=r"^picture too long: 20000 x 8 pixels$"):
        store(encoded(Image.new("1", (20_000, 8))), size=256)


def test_the_look_of_a_picture_is_imagehashs_dhash() -> None:
    """Equal to the bit, because both make the picture small with Lanczos' filter."""
    imagehash = pytest.importorskip("imagehash")
    for i, photograph in enumerate(photographs(20, size=(341, 256))):
        assert hash_look(photograph) == int(str(imagehash.dhash(photograph)), 16), i
    for flat in (Image.new("RGB", (1, 1)), Image.new("RGB", (300, 200), "white")):
        assert hash_look(flat) == int(str(imagehash.dhash(flat)), 16) == 0
    ramp = Image.linear_gradient("L").rotate(90).convert("RGB")
    assert hash_look(ramp) == int(str(imagehash.dhash(ramp)), 16) == 2**64 - 1


def test_the_look_of_a_photograph_hardly_changes_and_tells_it_from_others() -> None:
    originals, by_look = photographs(30, size=(320, 240)), Cleaning(dedupe="near:2")
    looks = [store(encoded(photograph), size=256, cleaning=by_look).perceptual for photograph in originals]
    copies = {
        "compressed": [encoded(photograph, "JPEG", quality=75) for photograph in originals],
        "smaller": [encoded(photograph.resize((210, 158))) for photograph in originals],
        "larger": [encoded(photograph.resize((640, 480)), "JPEG") for photograph in originals],
    }
    for kind, contents in copies.items():
        bits = [
            (look ^ store(content, size=256, cleaning=by_look).perceptual).bit_count()
            for look, content in zip(looks, contents, strict=True)
        ]
        assert max(bits) <= 4, kind
        assert np.mean(np.array(bits) <= 2) > 0.9, kind
    assert store(copies["smaller"][0], size=256).perceptual == 0
    others = [(one ^ other).bit_count() for i, one in enumerate(looks) for other in looks[:i]]
    assert min(others) > 4
