"""Decoding equals Pillow, the crops are torchvision's, and every draw comes from the generator that was passed."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, resize
from torchvision.transforms.v2 import RandomResizedCrop

from mlip_cli.config import Augment
from mlip_cli.data import transforms
from mlip_cli.data.transforms import decode, evaluation_transform, pil_to_uint8, training_transform

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


@pytest.fixture(params=["torchvision", "Pillow"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both decoders, whichever is the one in use."""
    if request.param == "Pillow":
        monkeypatch.setattr(transforms, "torchvision_decode", None)
    elif transforms.torchvision_decode is None:
        pytest.skip("this torchvision has no decoder")


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_decode_equals_pillow(image_format: str, mode: str) -> None:
    content = encoded(picture().convert(mode), image_format)
    assert torch.equal(decode(content), pixels(Image.open(io.BytesIO(content))))


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


@pytest.mark.usefixtures("decoder")
def test_sixteen_bits_are_an_error() -> None:
    content = encoded(Image.fromarray(np.zeros((8, 8), np.uint16)), "PNG")
    with pytest.raises(ValueError, match=r"^the picture cannot be decoded: more than 8 bits a channel$"):
        decode(content)


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
        found = training_transform(image, size=16, augment=augment, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(found, expected)


def test_a_very_long_picture_is_cropped_in_its_middle() -> None:
    image = torch.zeros(3, 4, 400, dtype=torch.uint8)
    image[:, :, 198:202] = 255
    augment = Augment(crop_scale=(0.9, 1.0))
    found = training_transform(image, size=8, augment=augment, generator=torch.Generator().manual_seed(0))
    assert found[:, :, 3:5].min() == 255
    assert found[:, :, 0].max() < 128


def test_draws_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    image = pixels(picture())
    a, b, c = (
        training_transform(image, size=16, augment=STRONG, generator=torch.Generator().manual_seed(seed))
        for seed in (5, 5, 6)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert (a.shape, a.dtype) == ((3, 16, 16), torch.uint8)
    assert torch.equal(torch.get_rng_state(), before)


def test_flip_mirrors_half_of_the_pictures() -> None:
    image = pixels(picture(16, 16))
    augment = Augment(crop_scale=None, flip=True)
    generator = torch.Generator().manual_seed(0)
    found = [training_transform(image, size=16, augment=augment, generator=generator) for _ in range(100)]
    flipped = sum(torch.equal(x, image.flip(-1)) for x in found)
    assert sum(torch.equal(x, image) for x in found) == 100 - flipped
    assert 35 <= flipped <= 65


def test_without_augmentation_training_sees_what_evaluation_sees() -> None:
    image = pixels(picture())
    found = training_transform(image, size=16, augment=Augment(crop_scale=None), generator=torch.Generator())
    assert torch.equal(found, evaluation_transform(image, size=16))


def test_jitter_stays_within_its_strength() -> None:
    gray = torch.full((3, 16, 16), 100, dtype=torch.uint8)
    augment = Augment(crop_scale=None, color_jitter=0.3)
    generator = torch.Generator().manual_seed(0)
    found = torch.stack([training_transform(gray, size=16, augment=augment, generator=generator) for _ in range(50)])
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
