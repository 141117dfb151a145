"""Decoding equals Pillow, the crops are torchvision's, and every draw comes from the generator that was passed."""

import io

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, resize
from torchvision.transforms.v2 import RandomResizedCrop

from mlip_cli.data import transforms
from mlip_cli.data.pictures import read_header
from mlip_cli.data.transforms import (
    Crop,
    decode,
    evaluation_transform,
    jpeg_decoder,
    least_size,
    pil_to_uint8,
    training_crop,
    training_transform,
)
from mlip_cli.recipe.config import Augment

STRONG = Augment(crop_scale=(0.2, 1.0), flip=True, color_jitter=0.4)


def picture(width: int = 40, height: int = 30) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def trained(image: Tensor, *, augment: Augment, generator: torch.Generator, size: int = 16) -> Tensor:
    """What training makes of a whole picture."""
    crop = training_crop(*image.shape[-2:], augment=augment, generator=generator)
    return training_transform(image, crop=crop, size=size, augment=augment, generator=generator)


def use(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode by simplejpeg, torchvision or Pillow, whichever would be in use."""
    names = {"simplejpeg": "simplejpeg_decode", "torchvision": "torchvision_decode"}
    if decoder in names and getattr(transforms, names[decoder]) is None:
        pytest.skip(f"{decoder} cannot decode here")
    if decoder != "simplejpeg":
        monkeypatch.setattr(transforms, "simplejpeg_decode", None)
    if decoder == "pillow":
        monkeypatch.setattr(transforms, "torchvision_decode", None)


@pytest.fixture(params=["simplejpeg", "torchvision", "pillow"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each decoder in turn."""
    use(request.param, monkeypatch)
    return str(request.param)


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_decode_equals_pillow(image_format: str, mode: str) -> None:
    content = encoded(picture().convert(mode), image_format)
    assert torch.equal(decode(content), pixels(Image.open(io.BytesIO(content))))


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("orientation", range(1, 10))
def test_a_turned_picture_is_shown_upright(orientation: int) -> None:
    """As Pillow's own turning has it, from which prepare-data differs in nothing; 9 is none."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    content = encoded(picture(), "JPEG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    header = read_header(content)
    assert (header.width, header.height) == upright.size == ((30, 40) if 5 <= orientation <= 8 else (40, 30))
    assert torch.equal(decode(content), pixels(upright))
    if 2 <= orientation <= 8:
        assert torch.equal(decode(content, least=(2, 2)), pixels(upright)), "one that is turned comes whole"


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize(("image_format", "lossless"), [("PNG", True), ("WEBP", True), ("WEBP", False)])
def test_what_is_transparent_is_white(mode: str, image_format: str, lossless: bool) -> None:
    image = picture().convert("RGBA")
    image.paste((10, 200, 30, 0), (0, 0, 20, 30))
    if mode == "P":
        image = image.convert("RGB").quantize(8)
        image.info["transparency"] = image.getpixel((0, 0))
    content = encoded(image if mode == "RGBA" else image.convert(mode), image_format, lossless=lossless)
    found = decode(content)
    assert bool((found[:, :, :19] == 255).all())
    assert torch.equal(found, pil_to_uint8(Image.open(io.BytesIO(content))))
    assert not read_header(content).is_opaque
    assert read_header(encoded(picture(), image_format, lossless=lossless)).is_opaque


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_picture_is_an_error(image_format: str) -> None:
    content = encoded(picture(200, 150), image_format)
    with pytest.raises(ValueError, match=r"^the picture cannot be decoded: .+") as error:
        decode(content[: len(content) // 2])
    assert "\n" not in str(error.value)
    assert ".cpp" not in str(error.value)


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("content", [b"", b"<html>not found</html>"])
def test_what_is_no_picture_is_an_error(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"^the picture cannot be decoded: .+"):
        decode(content)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("options", [{}, {"progressive": True, "quality": 30}, {"lossless": True}])
def test_the_header_says_what_pillow_says(image_format: str, options: dict[str, object]) -> None:
    for mode, width, height in (("RGB", 1, 1), ("L", 300, 7), ("RGB", 65, 513)):
        header = read_header(encoded(picture(width, height).convert(mode), image_format, **options))
        assert (header.width, header.height, header.is_plain) == (width, height, True)
        assert transforms.STORED_FORMATS[header.format] == image_format
    if image_format != "JPEG":
        assert read_header(encoded(Image.new("RGBA", (30, 20)), image_format, **options)).width == 30


def test_the_header_of_a_jpeg_behind_other_segments() -> None:
    thumbnail = encoded(picture(8, 8), "JPEG")
    content = encoded(picture(), "JPEG", exif=b"Exif\0\0" + thumbnail, comment=b"\xff\xc0" * 9)
    filled = [content[:2] + b"\0" + b"\xff" * n + content[2:] for n in (1, 2)]  # what libjpeg skips
    for image in (content, *filled):
        assert (read_header(image).width, read_header(image).height) == (40, 30)
    assert not read_header(encoded(picture().convert("CMYK"), "JPEG")).is_plain


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no bytes"),
        (b"GIF89a" + bytes(100), "neither JPEG nor PNG nor WebP"),
        (b"\xff\xd8\xff\xe0\0\x10" + bytes(14), "a JPEG without a frame header"),
        (b"\xff\xd8\xff\xd9", "a JPEG without a frame header"),
        (b"\xff\xd8\xff\xc0\0\x11\x08\0\0\0\x10\x03" + bytes(9), "16 x 0 pixels"),
        (b"\xff\xd8\xff\xc2\0\x11\x08\xff\xdc\xff\xdc\x03" + bytes(9), "65,500 x 65,500 pixels, over 64 megapixels"),
        (
            b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + b"\x7f\xff\xff\xff" * 2,
            "2,147,483,647 x 2,147,483,647 pixels",
        ),
        (b"RIFF\0\0\0\0WEBPVP8X" + b"\xff" * 20, "16,777,216 x 16,777,216 pixels, over 64 megapixels"),
        (b"RIFF\0\0\0\0WEBPVP8 " + bytes(20), "a WebP without a frame header"),
    ],
)
@pytest.mark.usefixtures("decoder")
def test_what_its_header_says_is_judged_before_anything_is_decoded(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^the picture cannot be decoded: {reason}"):
        decode(content)


def test_a_picture_of_another_size_than_its_header_says(monkeypatch: pytest.MonkeyPatch) -> None:
    use("torchvision", monkeypatch)
    monkeypatch.setattr(transforms, "torchvision_decode", lambda *_: torch.zeros(3, 9, 9, dtype=torch.uint8))
    with pytest.raises(
        ValueError, match=r"^the picture cannot be decoded: 9 x 9 pixels where its header says 40 x 30$"
    ):
        decode(encoded(picture(), "JPEG"))


@pytest.mark.usefixtures("decoder")
def test_sixteen_bits_are_an_error() -> None:
    content = encoded(Image.fromarray(np.zeros((8, 8), np.uint16)), "PNG")
    with pytest.raises(ValueError, match=r"^the picture cannot be decoded: more than 8 bits a channel$"):
        decode(content)


def test_cmyk_is_decoded_alike_by_all(decoder: str) -> None:
    content = encoded(picture().convert("CMYK"), "JPEG")
    assert torch.equal(decode(content), pixels(Image.open(io.BytesIO(content))))


def test_pillow_reads_what_the_fast_decoder_refuses_and_says_why(decoder: str) -> None:
    """Superfluous bytes, over which simplejpeg stumbles."""
    plain, reasons = encoded(picture(), "JPEG"), []
    found = decode(plain[:-2] + b"\x17" * 40 + plain[-2:], on_fallback=reasons.append)
    assert torch.equal(found, decode(plain))
    assert [bool(reason) for reason in reasons] == ([True] if decoder == "simplejpeg" else [])


def test_what_pillow_cannot_read_either_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("decode_jpeg, /src/vision.cpp:42, not in the mood\nat line 7")

    for name in ("simplejpeg_decode", "torchvision_decode"):
        monkeypatch.setattr(transforms, name, refuse)
    plain, reasons = encoded(picture(), "JPEG"), []
    assert torch.equal(decode(plain, on_fallback=reasons.append), pixels(Image.open(io.BytesIO(plain))))
    with pytest.raises(ValueError, match=r"^the picture cannot be decoded: not in the mood$"):
        decode(plain[:-200], on_fallback=reasons.append)
    assert reasons == ["not in the mood"]


def test_the_decoder_of_jpegs_has_a_name(decoder: str) -> None:
    assert jpeg_decoder().split()[0] == decoder
    assert jpeg_decoder().split()[1][0].isdigit()


def test_only_simplejpeg_makes_pictures_smaller_and_never_too_small(decoder: str) -> None:
    content = encoded(picture(320, 240), "JPEG")
    for least, smaller in (
        ((120, 120), (120, 160)),
        ((121, 10), (240, 320)),
        ((30, 41), (60, 80)),
        ((300, 9), (240, 320)),
    ):
        size = tuple(decode(content, least=least).shape[-2:])
        assert size == (smaller if decoder == "simplejpeg" else (240, 320))
    assert tuple(decode(encoded(picture(320, 240), "WEBP"), least=(9, 9)).shape[-2:]) == (240, 320)


def test_a_crop_of_a_picture_made_smaller_is_large_enough() -> None:
    """For all sizes that libjpeg makes, which rounds them up."""
    random = np.random.default_rng(0)
    for _ in range(2000):
        height, width, size = (int(n) for n in random.integers(1, 900, 3))
        h, w = int(random.integers(1, height + 1)), int(random.integers(1, width + 1))
        top, left = int(random.integers(0, height - h + 1)), int(random.integers(0, width - w + 1))
        crop = Crop(top, left, h, w, of=(height, width))
        assert crop.within(height, width) == (top, left, h, w)
        for eighths in range(1, 5):
            smaller = tuple(-(-n * eighths // 8) for n in (height, width))
            if all(n >= least for n, least in zip(smaller, crop.least(size), strict=True)):
                y, x, own_height, own_width = crop.within(*smaller)
                assert min(own_height, own_width) >= size
                assert y >= 0 <= x
                assert (y + own_height, x + own_width) <= smaller
                assert abs(y / smaller[0] - top / height) <= 0.5 / smaller[0] + 1e-9


def test_pictures_made_smaller_train_like_whole_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same part to within half a pixel of the result, in each direction."""
    use("simplejpeg", monkeypatch)
    content = encoded(picture(320, 240), "JPEG", quality=95)
    whole, augment = decode(content), Augment(crop_scale=(0.3, 1.0))
    for seed in range(20):
        crop = training_crop(240, 320, augment=augment, generator=torch.Generator().manual_seed(seed))
        assert crop is not None
        smaller = decode(content, least=least_size(crop, 24))
        assert smaller.shape[-1] < 320
        a_pixel_off = whole.roll((-(crop.height // 24), -(crop.width // 24)), dims=(1, 2))
        expected, found, other = (
            training_transform(image, crop=crop, size=24, augment=Augment(), generator=torch.Generator()).float()
            for image in (whole, smaller, a_pixel_off)
        )
        assert (found - expected).abs().mean() < 0.5 * (other - expected).abs().mean()


@pytest.mark.parametrize(("width", "height"), [(40, 30), (30, 40), (16, 16), (9, 12)])
def test_evaluation_is_resize_and_centre_crop_of_pillow(width: int, height: int) -> None:
    """What OpenCLIP's evaluation does, to one level of 255."""
    image = picture(width, height)
    expected = pixels(center_crop(resize(image, 16, InterpolationMode.BICUBIC), [16, 16]))
    assert (evaluation_transform(pixels(image), size=16).int() - expected.int()).abs().max() <= 1


def test_crops_are_those_of_torchvision() -> None:
    """The same draws from the same seed give the same crops."""
    image = pixels(picture())
    crop = RandomResizedCrop(16, (0.2, 1.0), interpolation=InterpolationMode.BICUBIC, antialias=True)
    augment = Augment(crop_scale=(0.2, 1.0))
    for seed in range(20):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            expected = crop(image)
        found = trained(image, augment=augment, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(found, expected)


def test_a_very_long_picture_is_cropped_in_its_middle() -> None:
    image = torch.zeros(3, 4, 400, dtype=torch.uint8)
    image[:, :, 198:202] = 255
    augment = Augment(crop_scale=(0.9, 1.0))
    found = trained(image, size=8, augment=augment, generator=torch.Generator().manual_seed(0))
    assert found[:, :, 3:5].min() == 255
    assert found[:, :, 0].max() < 128


def test_draws_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    image = pixels(picture())
    a, b, c = (trained(image, augment=STRONG, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert (a.shape, a.dtype) == ((3, 16, 16), torch.uint8)
    assert torch.equal(torch.get_rng_state(), before)


def test_flip_mirrors_half_of_the_pictures() -> None:
    image = pixels(picture(16, 16))
    augment = Augment(crop_scale=None, flip=True)
    generator = torch.Generator().manual_seed(0)
    found = [trained(image, augment=augment, generator=generator) for _ in range(100)]
    flipped = sum(torch.equal(x, image.flip(-1)) for x in found)
    assert sum(torch.equal(x, image) for x in found) == 100 - flipped
    assert 35 <= flipped <= 65


def test_without_augmentation_training_sees_what_evaluation_sees() -> None:
    image = pixels(picture())
    found = trained(image, augment=Augment(crop_scale=None), generator=torch.Generator())
    assert torch.equal(found, evaluation_transform(image, size=16))


def test_jitter_stays_within_its_strength() -> None:
    gray = torch.full((3, 16, 16), 100, dtype=torch.uint8)
    augment = Augment(crop_scale=None, color_jitter=0.3)
    generator = torch.Generator().manual_seed(0)
    found = torch.stack([trained(gray, augment=augment, generator=generator) for _ in range(50)])
    assert found.min() >= 69
    assert found.max() <= 131
    assert found.float().std() > 5


def test_pillow_pictures_of_any_mode() -> None:
    image = picture()
    assert torch.equal(pil_to_uint8(image), pixels(image))
    assert torch.equal(pil_to_uint8(image.convert("L")), pixels(image.convert("L")))
    assert torch.equal(pil_to_uint8(image.convert("P")), pixels(image.convert("P")))
    hidden = image.copy()
    hidden.putalpha(0)
    assert pil_to_uint8(hidden).min() == 255
