"""Results with pictures as RUN/evals/ has them: galleries of retrieval, and merge pictures. No torch.

Paths of pictures start at the run folder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mlip_cli.evaluate.results import Recalls, Setting
from mlip_cli.runs.result_files import Result


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A text, or a picture with its first caption."""

    text: str
    picture: str | None = None
    is_right: bool | None = None
    """Of an answer: whether it is one of the query's own."""


@dataclass(frozen=True, kw_only=True)
class GalleryQuery:
    """A text or a picture, and what the model finds for it, best first."""

    asked: Shown
    rank: int
    """Wrong candidates before the first right one."""
    first_right: Shown
    found: Sequence[Shown]


@dataclass(frozen=True, kw_only=True)
class GalleryResult(Result):
    """What the model finds for some queries of the validation set, and its recalls over the whole set."""

    KIND: ClassVar[str] = "gallery"

    step: int
    true_merge_rate: float
    precision: str = "fp32"
    """That of the training. Earlier versions measured in fp32, and did not write it."""
    folders: Sequence[str]
    fingerprints: Sequence[str]
    num_images: int
    num_texts: int
    chosen: str
    """How the queries were drawn."""
    scores: dict[str, Recalls]
    """image_to_text and text_to_image."""
    text_to_image: Sequence[GalleryQuery]
    image_to_text: Sequence[GalleryQuery]


@dataclass(frozen=True)
class DrawnStage:
    """Panels of one picture at one stage of merging: paths from the run folder."""

    groups: str
    spatial: str | None
    frequency: str | None
    mixed: str | None
    """None for maps that the method does not have."""


@dataclass(frozen=True)
class DrawnPicture:
    """One picture with its panels, stage by stage."""

    number: int
    """In the data set, from 0."""
    label: str | None
    image: str
    stages: Sequence[DrawnStage]


@dataclass(frozen=True)
class StageTokens:
    """The tokens after a stage."""

    block: int
    """The merge comes before this block."""
    tokens: int


@dataclass(frozen=True, kw_only=True)
class DrawnSetting(Setting):
    """The pictures at one setting."""

    stages: Sequence[StageTokens]
    pictures: Sequence[DrawnPicture]


@dataclass(frozen=True, kw_only=True)
class MergePicturesResult(Result):
    """The same pictures at every setting of a sweep but the unmerged one."""

    KIND: ClassVar[str] = "merge_pictures"

    run: str
    checkpoint: str
    step: int
    dataset: str
    fingerprint: str
    attribution: Sequence[str] = ()
    """Attributions that the licence of the pictures asks for."""
    grid: Sequence[int]
    """Rows and columns of patches."""
    image_size: int
    chosen: str
    """How the pictures were drawn from the data set."""
    map_colors: Sequence[str]
    """Of guidance from 0 to 1 in equal steps."""
    points: Sequence[DrawnSetting]
