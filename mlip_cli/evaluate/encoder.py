"""A trained model for programs: pictures and texts in, unit vectors out. `mlip_cli.load` makes it."""

from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from mlip_cli.data.pictures import RejectedPictureError, pillow_to_rgb
from mlip_cli.data.transforms import evaluation_transform
from mlip_cli.evaluate.validation import tokenize
from mlip_cli.evaluate.zeroshot import normalized, text_features
from mlip_cli.recipe.merge_plan import MergePlan
from mlip_cli.runs.loading import LoadedRun, MergedEncoder, load_run
from mlip_cli.terminal.output import plural, warn

BATCH_SIZE = 64
CHANNELS = (1, 3, 4)
"""Of arrays: grey, RGB, RGB with transparency."""
SHOWN = 60
"""Characters of a text that a message shows."""

Picture = Image.Image | np.ndarray


def load_encoder(
    run: str | None, *, device: str, merge_rate: float | None, precision: str | None = None
) -> "ImageTextEncoder":
    """Load a run; arguments and errors are those of `mlip_cli.load`, and None is the newest run."""
    return ImageTextEncoder(load_run(run, device=device, precision=precision), merge_rate=merge_rate)


class ImageTextEncoder:
    """A trained model at a merge rate. Vectors of pictures and of texts have length 1: their product is the cosine."""

    def __init__(self, loaded: LoadedRun, *, merge_rate: float | None = None) -> None:
        self.loaded = loaded
        self._encoder = loaded.at_rate(merge_rate)

    @property
    def image_size(self) -> int:
        """Side in pixels of the pictures that the model sees, resized as data.resize says."""
        return self.loaded.model.image_size

    @property
    def context_length(self) -> int:
        """Tokens of a text that the model reads, its beginning and end included."""
        return self.loaded.tokenizer.context_length

    @property
    def merge_rate(self) -> float:
        """The fraction of patch tokens that merge away, as whole tokens allow it."""
        return self._encoder.plan.rate

    @property
    def precision(self) -> str:
        """bf16, fp32 or fp16: the number type in which the model computes."""
        return self.loaded.precision

    @property
    def plan(self) -> MergePlan:
        """The merges behind it."""
        return self._encoder.plan

    def encode_image(
        self, images: Sequence[Picture], *, merge_rate: float | None = None, batch_size: int = BATCH_SIZE
    ) -> Tensor:
        """Pictures of any sizes -> (N, E) fp32 unit vectors on the CPU.

        Pictures are read as in evaluation: EXIF turns them upright, transparent pixels lie on white, and they are
        resized as data.resize says.

        Args:
            images: Pillow's pictures of any mode, or uint8 arrays (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).
            merge_rate: for these pictures; None: the rate that the model was loaded with.
            batch_size: pictures in one forward pass.

        Raises:
            TypeError: one picture in the place of a list, or something that is not a picture.
            ValueError: no pictures, an array of another shape, or a merge rate that no plan reaches.
            RunError: features are not finite: the weights are damaged.
        """
        if isinstance(images, Image.Image | np.ndarray | Tensor | str | bytes) or not isinstance(images, Iterable):
            raise TypeError(f"images: {_kind(images)}; give a list of pictures, as in [picture]")
        pictures = list(images)
        if not pictures:
            raise ValueError("images: an empty list; give at least one picture")
        encoder = self._encoder if merge_rate is None else self.loaded.at_rate(merge_rate)
        features = []
        for start in range(0, len(pictures), _checked_size(batch_size)):
            batch = pictures[start : start + batch_size]
            pixels = [to_pixels(own, f"images[{number}]") for number, own in enumerate(batch, start)]
            features.append(self._encode(pixels, encoder))
        return torch.cat(features)

    def encode_text(self, texts: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """Texts -> (N, E) fp32 unit vectors on the CPU. A text that is too long is cut, and a warning says so.

        Raises:
            TypeError: one text in the place of a list, or something that is not a text.
            ValueError: no texts.
            RunError: features are not finite: the weights are damaged.
        """
        if isinstance(texts, str) or not isinstance(texts, Iterable):
            raise TypeError(f"texts: {_kind(texts)}; give a list of texts, as in ['a red apple']")
        own = list(texts)
        if not own:
            raise ValueError("texts: an empty list; give at least one text")
        for i, text in enumerate(own):
            if not isinstance(text, str):
                raise TypeError(f"texts[{i}]: {_kind(text)}; give a text")
        self._tell_cut(own)
        features = text_features(
            own,
            tokenize=partial(tokenize, self.loaded.tokenizer, self.loaded.device),
            encode_text=self._encoder.encode_text,
            device=self.loaded.device,
            batch_size=_checked_size(batch_size),
        )
        return features.cpu()

    def encode_pixels(self, pixels: Sequence[Tensor]) -> Tensor:
        """As `encode_image`, of one batch of decoded pictures: N x uint8 (3, H, W) -> (N, E)."""
        return self._encode(pixels, self._encoder)

    def is_cut(self, text: str) -> bool:
        """Whether the model reads only the start of a text."""
        return self.loaded.tokenizer.count(text) > self.context_length

    @torch.no_grad()
    def _encode(self, pixels: Sequence[Tensor], encoder: MergedEncoder) -> Tensor:
        size, resize = self.image_size, self.loaded.recipe.data.resize
        batch = torch.stack([evaluation_transform(own, size=size, resize=resize) for own in pixels])
        return normalized(encoder.encode_image(batch.to(self.loaded.device)), "image").cpu()

    def _tell_cut(self, texts: Sequence[str]) -> None:
        cut = [text for text in texts if self.is_cut(text)]
        if cut:
            what = f"{cut[0][:SHOWN]!r}..." if len(cut[0]) > SHOWN else repr(cut[0])
            others = f" and {plural(len(cut) - 1, 'other')}" if len(cut) > 1 else ""
            warn(f"{what}{others}: cut to {self.context_length} tokens, which is all that this model reads")


def to_pixels(picture: object, place: str) -> Tensor:
    """A picture or an array -> uint8 (3, H, W), upright, transparent pixels on white.

    Raises:
        TypeError, ValueError: it is not one that can be encoded; the message begins with `place`.
    """
    if isinstance(picture, np.ndarray):
        picture = _from_array(picture, place)
    if not isinstance(picture, Image.Image):
        raise TypeError(f"{place}: {_kind(picture)}; give a picture of Pillow or a uint8 array (H, W, 3)")
    if 0 in picture.size:
        raise ValueError(f"{place}: a picture of {picture.width} x {picture.height} pixels has nothing to encode")
    try:
        return pil_to_tensor(pillow_to_rgb(picture))
    except RejectedPictureError as error:
        raise ValueError(f"{place}: {error}") from None


def _from_array(array: np.ndarray, place: str) -> Image.Image:
    if array.dtype != np.uint8:
        cure = "multiply by 255 and round" if array.dtype.kind == "f" else "scale it"
        raise ValueError(f"{place}: an array of {array.dtype}; {cure}, and give uint8 from 0 to 255")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in CHANNELS) or 0 in array.shape:
        is_first = array.ndim == 3 and array.shape[0] in CHANNELS
        cure = "move the channels to the end" if is_first else "give height x width x 3"
        raise ValueError(f"{place}: an array of shape {array.shape}; {cure}")
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2:] == (1,) else array))


def _kind(value: object) -> str:
    """What a value is, for messages."""
    return "one text" if isinstance(value, str) else f"a value of type {type(value).__name__}"


def _checked_size(batch_size: int) -> int:
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: take 1 or more")
    return batch_size
