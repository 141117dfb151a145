"""English names of WordNet ids, by which the folders of ImageNet and of its many subsets are called."""

import re
from functools import cache

from mlip_cli.data.packages import open_clip_module, package_folder

WNID = re.compile(r"n[0-9]{8}")


@cache
def imagenet_classes() -> dict[str, int]:
    """WordNet id -> class of ImageNet-1k, 0 to 999: the ids in order."""
    return {wnid: number for number, wnid in enumerate(_lines_of_timm("imagenet_synsets.txt"))}


def imagenet_names() -> tuple[str, ...]:
    """The 1,000 class names of OpenAI's protocol, by class."""
    return tuple(open_clip_module("zero_shot_metadata").IMAGENET_CLASSNAMES)


def english_name(wnid: str) -> str | None:
    """The name of ImageNet-1k's class, else WordNet's first name for an id of ImageNet-21k, else None."""
    number = imagenet_classes().get(wnid)
    return imagenet_names()[number] if number is not None else _first_lemmas().get(wnid)


@cache
def _first_lemmas() -> dict[str, str]:
    pairs = (line.split("\t", 1) for line in _lines_of_timm("imagenet_synset_to_lemma.txt"))
    return {wnid: lemmas.split(",")[0].strip() for wnid, lemmas in pairs}


def _lines_of_timm(name: str) -> list[str]:
    """A list that the package timm brings along."""
    return (package_folder("timm") / "data" / "_info" / name).read_text("utf-8").splitlines()
