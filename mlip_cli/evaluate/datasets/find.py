"""Evaluation sets by name: one table says how each is found.

Finding imports no torch, so results that are stored already are found at once.
"""

import difflib
import hashlib
import json
import shlex
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

from mlip_cli.errors import UsageError
from mlip_cli.evaluate.datasets import imagenet
from mlip_cli.evaluate.datasets.benchmark import Benchmark, classes_in, names_in
from mlip_cli.files import read_object
from mlip_cli.paths import check_utf8, read_variable

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


OPENMOJI_SPLITS = {"openmoji": "test", "openmoji_combinations": "combinations"}
"""Evaluation set -> the split that it reads: things that training never shows, and parts never shown together."""


class UnknownDataSetError(UsageError):
    """No evaluation set has this name."""


def data_root(given: Path | None) -> Path:
    """Where data sets lie: the given folder, else $MLIP_DATA, else data/.

    Raises:
        UsageError: $MLIP_DATA cannot be a path.
    """
    return given if given is not None else Path(read_variable("MLIP_DATA") or "data")


def find_benchmark(name: str, *, root: Path | None = None) -> Benchmark:
    """The evaluation set called `name` under `root` (None: see `data_root`).

    Raises:
        UnknownDataSetError: with a guess.
        UsageError: the data is not there; says what to do about it.
        RunError: most pictures of a folder cannot be used.
    """
    check_utf8(name)
    prefix = next((key for key in SETS if key.endswith((":", "/")) and name.startswith(key)), name)
    if prefix.endswith(":"):
        path = name.removeprefix(prefix)
        if not path:
            raise UsageError(f"{name}: no path; write {prefix}PATH")
        return SETS[prefix](name, Path(path))
    if prefix in SETS:
        return SETS[prefix](name, data_root(root))
    if Path(name).is_dir():
        guess = f"for the folder of this name write folder:{name}"
    elif close := difflib.get_close_matches(name, [key for key in SETS if key[-1] not in ":/"], n=1):
        guess = f"did you mean {close[0]}?"
    else:
        own = [key + {":": "PATH", "/": "NAME"}.get(key[-1], "") for key in SETS if key not in CLIP_BENCHMARK]
        guess = f"use {', '.join(own)}, or a name of clip-benchmark: {', '.join(CLIP_BENCHMARK)}"
    raise UnknownDataSetError(f"unknown data set {name!r}; {guess}")


def tree_fingerprint(root: Path) -> str:
    """Digest of the names, sizes and times of the files under `root` that count, without reading them."""
    return _digest(
        (name, status.st_size, status.st_mtime_ns)
        for name in names_in(root)
        if (root / name).is_file()  # not a broken link
        for status in ((root / name).stat(),)
    )


def _digest(parts: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part).encode() + b"\n")
    return digest.hexdigest()


def _shards_fingerprint(folder: Path) -> str:
    """Digest of the prepared data set's fingerprint and the templates file beside it."""
    try:
        fingerprint = read_object(folder / "dataset.json")["fingerprint"]
    except (ValueError, KeyError) as error:
        message = f"{folder / 'dataset.json'}: mlip prepare-data did not write it; prepare the data again"
        raise UsageError(message) from error
    templates = folder / "templates.txt"
    return _digest([fingerprint, templates.read_text("utf-8") if templates.is_file() else None])


def _openmoji(name: str, root: Path) -> Benchmark:
    folder = root / "openmoji" / OPENMOJI_SPLITS[name]
    if not (folder / "dataset.json").is_file():
        command = shlex.join(["mlip", "prepare-data", "openmoji", str(root / "openmoji")])
        raise UsageError(f"{name}: no prepared data in {folder}; run {command}")
    return Benchmark(name, name, folder, _shards_fingerprint(folder))


def _digits(name: str, _root: Path) -> Benchmark:
    return Benchmark(name, "digits", Path(), f"scikit-learn {version('scikit-learn')}")


def _folder(name: str, folder: Path) -> Benchmark:
    if not folder.is_dir():
        near = difflib.get_close_matches(folder.name, [path.name for path in folder.parent.glob("*/")], n=1)
        guess = f"did you mean folder:{folder.with_name(near[0])}? " if near else ""
        raise UsageError(f"{name}: no such folder; {guess}name one that holds a folder of pictures for each class")
    classes = classes_in(name, folder)
    return Benchmark(name, "folder", folder, _digest([tree_fingerprint(folder), dict(classes.names)]))


def _shards(name: str, folder: Path) -> Benchmark:
    if not folder.is_dir():
        raise UsageError(f"{name}: no such folder; name one that mlip prepare-data wrote, such as OUT/test")
    if not (folder / "dataset.json").is_file():
        inside = sorted(path.parent for path in folder.glob("*/dataset.json"))
        cure = f"name {' or '.join(map(str, inside))}" if inside else "prepare the data with mlip prepare-data"
        raise UsageError(f"{name}: no dataset.json in {folder}; {cure}")
    return Benchmark(name, "shards", folder, _shards_fingerprint(folder))


def _imagenet(name: str, root: Path) -> Benchmark:
    kind, folder = imagenet.find_pictures(root)
    read = _shards_fingerprint if kind == "imagenet_shards" else tree_fingerprint
    return Benchmark(name, kind, folder, read(folder))


def _clip_benchmark(name: str, root: Path) -> Benchmark:
    folder = root / name
    if not folder.is_dir() or not any(folder.iterdir()):
        raise UsageError(
            f"{name}: nothing in {folder}; mlip downloads no evaluation data: put the files of clip-benchmark's "
            f"--dataset_root there, or name another --data-root"
        )
    return Benchmark(name, "clip_benchmark", folder, f"{version('clip-benchmark')} {tree_fingerprint(folder)}")


def _web_shards(name: str, root: Path) -> Benchmark:
    folder = root / f"wds_{name.removeprefix('wds/').replace('/', '-')}"
    if not (folder / "test" / "nshards.txt").is_file():
        raise UsageError(
            f"{name}: no test/nshards.txt in {folder}; write the data set there with clip_benchmark_export_wds, or "
            "copy clip-benchmark's"
        )
    return Benchmark(name, "web_shards", folder, tree_fingerprint(folder))


SETS: dict[str, Callable[[str, Path], Benchmark]] = {
    **dict.fromkeys(OPENMOJI_SPLITS, _openmoji),
    "digits": _digits,
    "imagenet": _imagenet,
    "folder:": _folder,
    "shards:": _shards,
    "wds/": _web_shards,
    **dict.fromkeys(CLIP_BENCHMARK, _clip_benchmark),
}
"""How every evaluation set is found under the data root, by its name, or by the beginning of its name where that ends
in `:` or `/`. A name such as `folder:PATH` holds its own path; the data root is not used. `open.OPENERS` opens what was
found."""
