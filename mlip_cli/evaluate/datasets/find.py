"""Evaluation data sets by name: where each lies and what it is. No torch: what is measured already is found without."""

import difflib
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from mlip_cli.errors import UsageError
from mlip_cli.evaluate.datasets import imagenet

# Names of clip-benchmark with one label a picture and no TensorFlow.
CLIP_BENCHMARK = (
    "caltech101",
    "cars",
    "cifar10",
    "cifar100",
    "country211",
    "dtd",
    "eurosat",
    "fer2013",
    "fgvc_aircraft",
    "flowers",
    "food101",
    "gtsrb",
    "imagenet-a",
    "imagenet-o",
    "imagenet-r",
    "imagenet1k",
    "imagenet1k-unverified",
    "imagenet_sketch",
    "imagenetv2",
    "mnist",
    "objectnet",
    "pcam",
    "pets",
    "renderedsst2",
    "stl10",
    "sun397",
    "voc2007",
)
FAMILIES = "openmoji, digits, imagenet, folder:PATH, shards:PATH, wds/NAME, or of clip-benchmark: " + ", ".join(
    CLIP_BENCHMARK
)
PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


class UnknownDataSetError(UsageError):
    """No evaluation data set has this name, wherever one looks."""


@dataclass(frozen=True)
class Benchmark:
    """An evaluation data set that was found."""

    name: str
    """As the user gave it."""
    kind: str
    """What it is opened by: a key of `sources.OPENERS`."""
    root: Path
    """Folder that holds it; for digits, which are part of scikit-learn, the current one."""
    fingerprint: str
    """Changes when the data, the class names or the templates change."""


def data_root(given: Path | None) -> Path:
    """Where data sets lie: the given folder, else $MLIP_DATA, else data/."""
    return given if given is not None else Path(os.environ.get("MLIP_DATA") or "data")


def find_benchmark(name: str, *, root: Path) -> Benchmark:
    """The data set called `name` under `root`.

    Raises:
        UnknownDataSetError: with a guess.
        UsageError: the data is not there, with what to do about it.
    """
    prefix, colon, path = name.partition(":")
    if colon and prefix in ("folder", "shards"):
        if not path:
            raise UsageError(f"{name}: no path; write {prefix}:PATH")
        return _FINDERS[prefix](name, Path(path))
    if name in _FINDERS and name not in ("folder", "shards"):
        return _FINDERS[name](name, root)
    if name in CLIP_BENCHMARK:
        return _clip_benchmark(name, root)
    if name.startswith("wds/"):
        return _web_shards(name, root)
    close = difflib.get_close_matches(name, ("openmoji", "digits", "imagenet", *CLIP_BENCHMARK), n=1)
    if Path(name).is_dir():
        guess = f"for the folder of this name write folder:{name}"
    else:
        guess = f"did you mean {close[0]}?" if close else f"there are {FAMILIES}"
    raise UnknownDataSetError(f"unknown data set {name!r}; {guess}")


def class_folders(folder: Path) -> list[Path]:
    """Folders in `folder` in the order of their classes: by name, hidden ones left out."""
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def pictures_in(folder: Path) -> list[Path]:
    """Picture files anywhere under `folder`, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file())


def tree_fingerprint(root: Path) -> str:
    """Of names, sizes and times of all files under `root`, without reading them."""
    return _digest(
        (str(path.relative_to(root)), status.st_size, status.st_mtime_ns)
        for path in sorted(root.rglob("*"))
        if path.is_file()
        for status in (path.stat(),)
    )


def _digest(parts: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part).encode() + b"\n")
    return digest.hexdigest()


def _shards_fingerprint(folder: Path) -> str:
    """That of the prepared data set, with the templates file beside it."""
    try:
        fingerprint = json.loads((folder / "dataset.json").read_bytes())["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        message = f"{folder / 'dataset.json'}: not written by mlip prepare-data; prepare the data again"
        raise UsageError(message) from error
    templates = folder / "templates.txt"
    return _digest([fingerprint, templates.read_text("utf-8") if templates.is_file() else None])


def _openmoji(name: str, root: Path) -> Benchmark:
    folder = root / "openmoji" / "test"
    if not (folder / "dataset.json").is_file():
        raise UsageError(f"openmoji: no prepared data in {folder}; run mlip prepare-data openmoji {root / 'openmoji'}")
    return Benchmark(name, "openmoji", folder, _shards_fingerprint(folder))


def _digits(name: str, _root: Path) -> Benchmark:
    return Benchmark(name, "digits", Path(), f"scikit-learn {version('scikit-learn')}")


def _folder(name: str, folder: Path) -> Benchmark:
    if not folder.is_dir():
        raise UsageError(f"{name}: no such folder")
    if not any(pictures_in(child) for child in class_folders(folder)):
        found = "pictures, but not in folders of classes" if pictures_in(folder) else "no pictures"
        raise UsageError(f"{name}: {found}; put the pictures of each class into a folder of its own in {folder}/")
    return Benchmark(name, "folder", folder, tree_fingerprint(folder))


def _shards(name: str, folder: Path) -> Benchmark:
    if not folder.is_dir():
        raise UsageError(f"{name}: no such folder; mlip prepare-data makes one")
    if not (folder / "dataset.json").is_file():
        inside = sorted(path.parent for path in folder.glob("*/dataset.json"))
        cure = f"name {' or '.join(map(str, inside))}" if inside else "prepare the data with mlip prepare-data"
        raise UsageError(f"{name}: no dataset.json in {folder}; {cure}")
    return Benchmark(name, "shards", folder, _shards_fingerprint(folder))


def _imagenet(name: str, root: Path) -> Benchmark:
    layout = imagenet.find_layout(root)
    read = _shards_fingerprint if layout.kind == "shards" else tree_fingerprint
    return Benchmark(name, f"imagenet_{layout.kind}", layout.folder, read(layout.folder))


def _clip_benchmark(name: str, root: Path) -> Benchmark:
    folder = root / name
    needed = folder / "ImageNetV2-matched-frequency" if name == "imagenetv2" else folder
    if not needed.is_dir() or not any(needed.iterdir()):
        raise UsageError(
            f"{name}: nothing in {needed}; mlip downloads no evaluation data: put there what clip-benchmark "
            f"has below its --dataset_root, or name another --data-root"
        )
    return Benchmark(name, "clip_benchmark", folder, f"{version('clip-benchmark')} {tree_fingerprint(folder)}")


def _web_shards(name: str, root: Path) -> Benchmark:
    short = name.removeprefix("wds/")
    places = [root / f"wds_{short.replace('/', '-')}", root / "wds" / short, root / short]
    for folder in places:
        if (folder / "test" / "nshards.txt").is_file():
            return Benchmark(name, "web_shards", folder, tree_fingerprint(folder))
    raise UsageError(
        f"{name}: no test/nshards.txt in {', '.join(map(str, places))}; put a data set there that "
        "clip_benchmark_export_wds wrote, or a copy of clip-benchmark's"
    )


_FINDERS: dict[str, Callable[[str, Path], Benchmark]] = {
    "openmoji": _openmoji,
    "digits": _digits,
    "folder": _folder,
    "shards": _shards,
    "imagenet": _imagenet,
}
