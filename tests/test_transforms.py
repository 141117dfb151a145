"""Pictures made smaller are large enough, crops are torchvision's, all draws come from the generator passed."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_pictures import decoder, encoded, picture  # noqa: F401
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, resize
from torchvision.transforms.v2 import RandomResizedCrop

from mlip_cli.data import transforms
from mlip_cli.data.pictures import open_picture
from mlip_cli.data.transforms import (
    Crop,
    decode,
    evaluation_transform,
    least_size,
    training_crop,
    training_transform,
)
from mlip_cli.recipe.config import Augment, Data

STRONG = Augment(crop_scale=(0.2, 1.0), flip=True, color_jitter=0.4)


def pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def trained(image: Tensor, *, augment: Augment, generator: torch.Generator, size: int = 16) -> Tensor:
    """What training makes of a whole picture."""
    data = Data(train=(), image_size=size, augment=augment)
    crop = training_crop(*image.shape[-2:], data=data, generator=generator)
    return training_transform(image, crop=crop, data=data, generator=generator)


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


@pytest.mark.usefixtures("decoder")
def test_pictures_made_smaller_train_like_whole_ones() -> None:
    """The same part to within half a pixel of the result, in each direction."""
    content = encoded(picture(320, 240), "JPEG", quality=95)
    whole, augment = decode(open_picture(content)), Augment(crop_scale=(0.3, 1.0))
    for seed in range(20):
        crop = training_crop(
            240, 320, data=Data(train=(), augment=augment), generator=torch.Generator().manual_seed(seed)
        )
        assert crop is not None
        smaller = decode(open_picture(content), least=least_size(crop, 24))
        assert smaller.shape[-1] < 320
        a_pixel_off = whole.roll((-(crop.height // 24), -(crop.width // 24)), dims=(1, 2))
        expected, found, other = (
            training_transform(
                image, crop=crop, data=Data(train=(), image_size=24), generator=torch.Generator()
            ).float()
            for image in (whole, smaller, a_pixel_off)
        )
        assert (found - expected).abs().mean() < 0.5 * (other - expected).abs().mean()


@pytest.mark.parametrize(("width", "height"), [(40, 30), (30, 40), (16, 16), (9, 12)])
def test_evaluation_is_resize_and_centre_crop_of_pillow(width: int, height: int) -> None:
    """What OpenCLIP's evaluation does, to one level of 255."""
    image = picture(width, height)
    expected = pixels(center_crop(resize(image, 16, InterpolationMode.BICUBIC), [16, 16]))
    assert (evaluation_transform(pixels(image), size=16).int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize(("width", "height"), [(2_001, 3), (4, 1_000), (999, 1)])
def test_of_a_very_long_picture_the_middle_alone_is_resized(
    width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is where OpenCLIP's evaluation has it, to one level of 255."""
    resized: list[int] = []
    real = transforms.interpolate

    def interpolate(image: Tensor, size: tuple[int, int], **options: Any) -> Tensor:
        resized.append(max(size))
        return real(image, size, **options)

    monkeypatch.setattr(transforms, "interpolate", interpolate)
    image = picture(width, height)
    expected = pixels(center_crop(resize(image, 16, InterpolationMode.BICUBIC), [16, 16]))
    assert (evaluation_transform(pixels(image), size=16).int() - expected.int()).abs().max() <= 1
    assert resized == [max(resized)] <= [(transforms.MOST_SQUARES + 1) * 16]


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
