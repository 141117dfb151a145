"""`mlip_cli.load`: the features are those of the model by hand, and of `eval-zeroshot` for pictures of every kind."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models_for_tests import make_run, small_recipe
from PIL import Image
from test_pictures import corpus
from torch.nn.functional import normalize

import mlip_cli
from mlip_cli.data.transforms import evaluation_transform
from mlip_cli.errors import UsageError
from mlip_cli.evaluate.datasets.pictures import read_picture
from mlip_cli.evaluate.encoder import ImageTextEncoder
from mlip_cli.runs.loading import load_run

TEXTS = ["a red apple", "", "two green trees beside a house"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder") / "mlip"
    make_run(folder, small_recipe())
    return folder


@pytest.fixture(scope="module")
def model(run: Path) -> ImageTextEncoder:
    return mlip_cli.load(run, device="cpu")


def pictures(n: int = 5) -> list[Image.Image]:
    random = np.random.default_rng(0)
    sizes = [(40 + 7 * i, 33 + 5 * (i % 3)) for i in range(n)]
    return [Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


@pytest.mark.parametrize("rate", [None, 0.0, 0.3])
def test_features_are_those_of_the_model_by_hand(run: Path, model: ImageTextEncoder, rate: float | None) -> None:
    loaded = load_run(str(run), device="cpu")
    plan = loaded.model.plan if rate is None else loaded.model.merge_plan(rate)
    pixels = [torch.from_numpy(np.asarray(own).copy()).permute(2, 0, 1) for own in pictures()]
    images = torch.stack([evaluation_transform(own, size=32) for own in pixels])
    with torch.no_grad():
        expected = normalize(loaded.model.encode_image(images, plan), dim=-1)
        texts = normalize(loaded.model.encode_text(loaded.tokenizer.encode(TEXTS)), dim=-1)
    found = model.encode_image(pictures(), merge_rate=rate, batch_size=2)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(mlip_cli.load(run, "cpu", rate).encode_image(pictures()), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(model.encode_text(TEXTS, batch_size=2), texts, atol=1e-6, rtol=0)
    assert (found.dtype, found.device.type, found.requires_grad) == (torch.float32, "cpu", False)


def test_the_object_says_what_it_does(run: Path, model: ImageTextEncoder) -> None:
    assert (model.image_size, model.context_length, model.merge_rate) == (32, 16, 0.5)
    assert mlip_cli.load(str(run), device="cpu", merge_rate=0.0).merge_rate == 0


@pytest.mark.parametrize("name", sorted(corpus()))
def test_a_picture_of_any_kind_is_seen_as_eval_zeroshot_sees_it(name: str, model: ImageTextEncoder) -> None:
    content, _ = corpus()[name]
    pixels = evaluation_transform(read_picture(content, where=name), size=32)
    own = load_features(model, pixels)
    with Image.open(io.BytesIO(content)) as picture:
        assert torch.equal(model.encode_image([picture]), own)


def load_features(model: ImageTextEncoder, pixels: torch.Tensor) -> torch.Tensor:
    encoder = model.loaded.model
    with torch.no_grad():
        return normalize(encoder.encode_image(pixels[None], encoder.plan), dim=-1)


def test_arrays_are_pictures(model: ImageTextEncoder) -> None:
    rgb = np.asarray(pictures(1)[0])
    grey = rgb[..., 0]
    clear = np.concatenate([rgb, np.full((*grey.shape, 1), 90, np.uint8)], axis=2)
    arrays = [rgb, grey, grey[..., None], clear, rgb[:, ::-1]]
    as_pictures = [Image.fromarray(np.ascontiguousarray(own.squeeze())) for own in arrays]
    assert torch.equal(model.encode_image(arrays), model.encode_image(as_pictures))
    assert torch.equal(model.encode_image(tuple(arrays)), model.encode_image(own for own in arrays))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ("a.png", TypeError, "images: one text; give a list of pictures, as in [picture]"),
        (
            Image.new("RGB", (4, 4)),
            TypeError,
            "images: a value of type Image; give a list of pictures, as in [picture]",
        ),
        (np.zeros((2, 4, 4, 3), np.uint8), TypeError, "images: a value of type ndarray; give a list of pictures"),
        ([], ValueError, "images: an empty list; give at least one picture"),
        (["a.png"], TypeError, "images[0]: one text; give a picture of Pillow or a uint8 array (H, W, 3)"),
        ([None], TypeError, "images[0]: a value of type NoneType; give a picture"),
        (
            [np.zeros((4, 4, 3))],
            ValueError,
            "images[0]: an array of float64; multiply by 255 and round, and give uint8",
        ),
        ([np.zeros((4, 4), np.int64)], ValueError, "images[0]: an array of int64; scale it, and give uint8"),
        ([np.zeros((3, 9, 9), np.uint8)], ValueError, "an array of shape (3, 9, 9); move the channels to the end"),
        ([np.zeros((9, 9, 2), np.uint8)], ValueError, "an array of shape (9, 9, 2); give height x width x 3"),
        ([np.zeros((0, 9, 3), np.uint8)], ValueError, "an array of shape (0, 9, 3); give height x width x 3"),
        ([Image.new("RGB", (4, 4)), Image.new("F", (4, 4))], ValueError, "images[1]: unknown range of values: mode F"),
        ([Image.new("RGB", (0, 4))], ValueError, "images[0]: a picture of 0 x 4 pixels has nothing to encode"),
    ],
)
def test_what_is_not_a_list_of_pictures(
    images: object, error: type[Exception], message: str, model: ImageTextEncoder
) -> None:
    with pytest.raises(error) as raised:
        model.encode_image(images)  # type: ignore[arg-type]
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ("a red apple", TypeError, "texts: one text; give a list of texts, as in ['a red apple']"),
        (None, TypeError, "texts: a value of type NoneType; give a list of texts"),
        ([], ValueError, "texts: an empty list; give at least one text"),
        (["a", 3], TypeError, "texts[1]: a value of type int; give a text"),
    ],
)
def test_what_is_not_a_list_of_texts(
    texts: object, error: type[Exception], message: str, model: ImageTextEncoder
) -> None:
    with pytest.raises(error) as raised:
        model.encode_text(texts)  # type: ignore[arg-type]
    assert message in str(raised.value)


def test_other_mistakes(run: Path, model: ImageTextEncoder) -> None:
    with pytest.raises(UsageError, match="no such run"):
        mlip_cli.load(run / "elsewhere")
    with pytest.raises(UsageError, match="rate"):
        mlip_cli.load(run, device="cpu", merge_rate=0.999)
    with pytest.raises(ValueError, match="batch_size 0: take 1 or more"):
        model.encode_image(pictures(1), batch_size=0)


def test_a_long_text_is_cut_and_a_warning_says_so(model: ImageTextEncoder, caplog: pytest.LogCaptureFixture) -> None:
    long = "a red apple " * 40
    with caplog.at_level("WARNING", logger="mlip_cli"):
        cut = model.encode_text([long, "short", long + "end"])
    assert caplog.messages == [f"{long[:60]!r}... and 1 other: cut to 16 tokens, which is all that this model reads"]
    torch.testing.assert_close(cut[0], model.encode_text(["a red apple " * 10])[0], atol=1e-6, rtol=0)


def test_torch_is_loaded_by_the_call_alone() -> None:
    code = "import sys; from mlip_cli import load; print(sorted({'torch', 'numpy', 'typer'} & set(sys.modules)), load)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] <function load")
