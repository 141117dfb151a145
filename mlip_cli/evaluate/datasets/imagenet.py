"""ImageNet-1k's validation set in the layouts that people have on their disks. Finding it needs no torch."""

import csv
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mlip_cli.errors import UsageError

NUM_CLASSES = 1000
NAMES = ("imagenet", "imagenet1k", "imagenet-1k", "ImageNet", "ILSVRC2012", "ILSVRC")
PARTS = ("val", "validation", "test", "ILSVRC/Data/CLS-LOC/val", "Data/CLS-LOC/val", "")
KAGGLE_LABELS = "LOC_val_solution.csv"
KAGGLE_PICTURES = "ILSVRC/Data/CLS-LOC/val"
WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Layout:
    """Layout of the validation set in `folder`."""

    kind: str
    """folders: n01440764/ ... or 0/ ... 999/. kaggle: pictures in one folder and a table. shards: ours. web_shards:
    clip-benchmark's tars. tars: others' `*val*.tar` with a `.cls` beside each picture."""
    folder: Path


def find_layout(root: Path) -> Layout:
    """The first ImageNet in `root`; class folders may also lie in `root` itself.

    Raises:
        UsageError: there is none; lists the places, the layouts and the packed archives.
    """
    places = [root / name for name in NAMES]
    for place in (place for place in places if place.is_dir()):
        for kind, fits in _KINDS.items():
            for folder in (place / part for part in PARTS):
                if folder.is_dir() and fits(folder):
                    return Layout(kind, folder)
    for folder in (root / part for part in PARTS):
        if folder.is_dir() and _has_class_folders(folder):
            return Layout("folders", folder)
    raise UsageError(
        f"imagenet: not found; looked for {', '.join(NAMES)} (and val) in {root}/. Put the validation pictures into "
        f"{root / 'imagenet' / 'val'}/, one folder for each class (n01440764/ ... or 0/ ... 999/), or name another "
        "--data-root. mlip also reads Kaggle's layout, webdataset tars with .cls and folders by mlip prepare-data"
        f"{_archives(places)}"
    )


def _has_class_folders(folder: Path) -> bool:
    names = [child.name for child in folder.iterdir() if child.is_dir()]
    if any(WNID.fullmatch(name) for name in names):
        return True
    return len(names) == NUM_CLASSES and all(name.isdigit() and int(name) < NUM_CLASSES for name in names)


def validation_tars(folder: Path) -> list[Path]:
    """Webdataset tars of the validation set, such as imagenet1k-validation-00.tar; not the original archive."""
    return sorted(path for path in folder.glob("*val*.tar") if path.name != "ILSVRC2012_img_val.tar")


_KINDS: dict[str, Callable[[Path], bool]] = {
    "shards": lambda folder: (folder / "dataset.json").is_file(),
    "web_shards": lambda folder: (folder / "test" / "nshards.txt").is_file(),
    "kaggle": lambda folder: (folder / KAGGLE_LABELS).is_file() and (folder / KAGGLE_PICTURES).is_dir(),
    "folders": _has_class_folders,
    "tars": lambda folder: bool(validation_tars(folder)),
}


def _archives(places: list[Path]) -> str:
    for place in places:
        archive = place / "ILSVRC2012_img_val.tar"
        if archive.is_file():
            return (
                f". {archive} is packed; put ILSVRC2012_devkit_t12.tar.gz beside it and unpack it with "
                f"python -c \"from torchvision.datasets import ImageNet; ImageNet('{place}', 'val')\""
            )
    return ""


def class_of(name: str) -> int:
    """Class 0 to 999 from a WordNet id or a class number.

    Raises:
        UsageError: the name is neither.
    """
    if name in wnids():
        return wnids()[name]
    if name.isdigit() and int(name) < NUM_CLASSES:
        return int(name)
    raise UsageError(f"imagenet: {name!r} is neither one of the 1,000 WordNet ids nor a number below 1000")


@cache
def wnids() -> dict[str, int]:
    """WordNet id -> class, in the order of the class names."""
    from clip_benchmark.datasets.builder import all_imagenet_wordnet_ids

    return {wnid: i for i, wnid in enumerate(all_imagenet_wordnet_ids)}


def kaggle_files(folder: Path) -> list[tuple[Path, int]]:
    """Pictures and classes from Kaggle's table: ImageId, and PredictionString, which starts with the WordNet id."""
    with open(folder / KAGGLE_LABELS, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        return [
            (folder / KAGGLE_PICTURES / f"{row['ImageId']}.JPEG", class_of(row["PredictionString"].split()[0]))
            for row in rows
        ]
    except (KeyError, IndexError, AttributeError) as error:
        raise UsageError(
            f"{folder / KAGGLE_LABELS}: no columns ImageId and PredictionString with a WordNet id; download it again"
        ) from error


def names_and_templates() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The 1,000 class names and 80 templates of OpenAI's protocol, from open_clip's file alone."""
    from mlip_cli.data.tokenizer import open_clip_module  # imports torch

    module = open_clip_module("zero_shot_metadata")
    return tuple(module.IMAGENET_CLASSNAMES), tuple(template("{c}") for template in module.OPENAI_IMAGENET_TEMPLATES)
