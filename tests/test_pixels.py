"""What prepare-data stores of a picture."""

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from photographs_for_tests import encoded, photographs
from PIL import ExifTags, Image

from mlip_cli.data import pictures
from mlip_cli.data.pictures import RejectedPictureError
from mlip_cli.data.prepare.filters import Cleaning
from mlip_cli.data.prepare.pixels import StoredPicture, hash_look, hash_pixels, resized, store

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


def test_what_is_stored_does_not_depend_on_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """simplejpeg could decode at 3/8 of the size: 1,400 x 1,100 to 200."""
    noise = np.random.default_rng(0).integers(0, 256, (28, 35, 3), dtype=np.uint8)
    for width, height, mode, options in (
        (1400, 1100, "RGB", {}),
        (641, 427, "L", {"progressive": True}),
        (433, 577, "RGB", {"subsampling": 0}),
        (1601, 1203, "RGB", {"quality": 60}),
        (1400, 1100, "CMYK", {}),
    ):
        content = encoded(Image.fromarray(noise).resize((width, height)).convert(mode), "JPEG", **options)
        with monkeypatch.context() as without:
            without.setattr(pictures, "simplejpeg_decode", None)
            wanted = store(content, size=200)
        assert store(content, size=200) == wanted
        assert min(wanted.width, wanted.height) == 200


def bicubic(picture: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """In floating point: (H, W, 3)."""
    bands = [np.asarray(band, np.float32) for band in picture.split()]
    return np.stack([Image.fromarray(band).resize(size, Image.Resampling.BICUBIC) for band in bands], axis=-1)


def test_resizing_is_bicubic_to_rounding_and_the_same_on_every_processor(tmp_path: Path) -> None:
    """It rounds twice, to 8 bits. PyTorch has code of its own for AVX2, and code for all else."""
    smooth = np.random.default_rng(0).integers(60, 196, (23, 31, 3), dtype=np.uint8)
    found = b""
    for (width, height), target in (((640, 480), (341, 256)), ((433, 577), (192, 256)), ((300, 40), (128, 17))):
        picture = Image.fromarray(smooth).resize((width, height), Image.Resampling.BICUBIC)
        scaled = resized(np.array(picture), *target)
        assert np.abs(np.asarray(scaled) - bicubic(picture, target)).max() < 1.2
        np.save(tmp_path / f"{width}.npy", np.array(picture))
        found += scaled.tobytes()
    code = (
        "import sys, numpy as np; from mlip_cli.data.prepare.pixels import resized\n"
        "for name, w, h in ((640, 341, 256), (433, 192, 256), (300, 128, 17)):\n"
        "    sys.stdout.buffer.write(resized(np.load(f'{name}.npy'), w, h).tobytes())\n"
    )
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": str(root)}
    plain = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert plain.stdout == found
