"""ImageNet-1k's validation set in the layouts that people have on their disks. Finding it needs no torch."""

import re
from functools import cache
from pathlib import Path

from mlip_cli.errors import UsageError

NUM_CLASSES = 1000
NAMES = ("imagenet", "imagenet1k", "imagenet-1k", "ImageNet", "ILSVRC2012", "ILSVRC")
PARTS = ("val", "validation", "test", "ILSVRC/Data/CLS-LOC/val", "Data/CLS-LOC/val", "")
WNID = re.compile(r"n\d{8}")


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
    names = [child.name for child in folder.glob("*/")]
    if any(WNID.fullmatch(name) for name in names):
        return True
    return len(names) == NUM_CLASSES and all(name.isdigit() and int(name) < NUM_CLASSES for name in names)


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


def names_and_templates() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The 1,000 class names and 80 templates of OpenAI's protocol, from open_clip's file alone."""
    from mlip_cli.data.tokenizer import open_clip_module  # imports torch

    module = open_clip_module("zero_shot_metadata")
    return tuple(module.IMAGENET_CLASSNAMES), tuple(template("{c}") for template in module.OPENAI_IMAGENET_TEMPLATES)
