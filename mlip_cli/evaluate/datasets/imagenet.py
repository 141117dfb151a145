"""ImageNet-1k's validation set in the layouts that people have on their disks. Finding it needs no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlip_cli.data.packages import open_clip_module
from mlip_cli.data.sources.wordnet import WNID, imagenet_classes, imagenet_names
from mlip_cli.errors import UsageError
from mlip_cli.evaluate.datasets.benchmark import folders_in

NUM_CLASSES = 1000
NAMES = ("imagenet", "imagenet1k", "imagenet-1k", "ImageNet", "ILSVRC2012", "ILSVRC")
PARTS = ("val", "validation", "test", "ILSVRC/Data/CLS-LOC/val", "Data/CLS-LOC/val", "")


def find_pictures(root: Path) -> tuple[str, Path]:
    """The kind and the folder of the first ImageNet in `root`; class folders may also lie in `root` itself.

    Kinds: imagenet_folders (n01440764/ or 0/ to 999/), imagenet_shards (ours), web_shards (clip-benchmark's).

    Raises:
        UsageError: ImageNet was not found. The message lists the places and the layouts.
    """
    for folder in (root / name / part for name in NAMES for part in PARTS):
        if (folder / "dataset.json").is_file():
            return "imagenet_shards", folder
        if (folder / "test" / "nshards.txt").is_file():
            return "web_shards", folder
        if _has_class_folders(folder):
            return "imagenet_folders", folder
    for folder in (root / part for part in PARTS):
        if _has_class_folders(folder):
            return "imagenet_folders", folder
    raise UsageError(
        f"imagenet: not found; looked for {', '.join(NAMES)} (and val) in {root}/. Put the validation pictures into "
        f"{root / 'imagenet' / 'val'}/, one folder for each class (n01440764/ ... or 0/ ... 999/), or name another "
        "--data-root. torchvision.datasets.ImageNet makes these folders from ILSVRC2012_img_val.tar. mlip also reads "
        "shards by mlip prepare-data and by clip_benchmark_export_wds"
    )


def _has_class_folders(folder: Path) -> bool:
    names = folders_in(folder) if folder.is_dir() else []
    if any(WNID.fullmatch(name) for name in names):
        return True
    return len(names) == NUM_CLASSES and all(name.isdigit() and int(name) < NUM_CLASSES for name in names)


def class_of(name: str) -> int:
    """Class 0 to 999 from a WordNet id or a class number.

    Raises:
        UsageError: the name is neither.
    """
    if name in imagenet_classes():
        return imagenet_classes()[name]
    if name.isdigit() and int(name) < NUM_CLASSES:
        return int(name)
    raise UsageError(f"imagenet: {name!r} is neither one of the 1,000 WordNet ids nor a number below 1000")


def class_of_sample(label: str, meta: Mapping[str, Any]) -> int:
    """Class 0 to 999 of a sample that `prepare-data` wrote, by the WordNet id that it keeps, else by its label.

    Raises:
        UsageError: as `class_of`.
    """
    return class_of(str(meta.get("wnid", label)))


def names_and_templates() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The 1,000 class names and 80 templates of OpenAI's protocol, from open_clip's file alone."""
    templates = open_clip_module("zero_shot_metadata").OPENAI_IMAGENET_TEMPLATES
    return imagenet_names(), tuple(template("{c}") for template in templates)
