"""Open an evaluation set that was found: one function for each kind of storage."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlip_cli.data.dataset import RawSample, ShardDataset
from mlip_cli.data.open import open_prepared
from mlip_cli.data.sources.class_names import some
from mlip_cli.data.sources.classes import count_pictures, first_folder
from mlip_cli.data.sources.listing import is_picture
from mlip_cli.errors import UsageError
from mlip_cli.evaluate.datasets import imagenet
from mlip_cli.evaluate.datasets.benchmark import Benchmark, classes_in, folders_in, names_in, templates_in
from mlip_cli.evaluate.datasets.clip_benchmark import open_built, open_web_shards
from mlip_cli.evaluate.datasets.pictures import Names, Pictures, read_picture
from mlip_cli.paths import escaped
from mlip_cli.terminal.output import plural, say, warn

OPENMOJI_GROUPS = (
    "activities",
    "animals and nature",
    "flags",
    "food and drink",
    "objects",
    "people and body",
    "smileys and emotion",
    "symbols",
    "travel and places",
)
OPENMOJI_TEMPLATES = ("{c}", "an emoji of {c}")
DEFAULT_TEMPLATES = ("a photo of a {c}.",)
TEMPLATES_FILE = "templates.txt"
DIGITS_TEMPLATES = ('a photo of the number: "{c}".',)


def open_benchmark(benchmark: Benchmark) -> Pictures:
    """Open an evaluation set that `find_benchmark` found.

    Raises:
        UsageError: its files are not as they should be; says which and what to do.
    """
    return OPENERS[benchmark.kind](benchmark)


def open_openmoji(benchmark: Benchmark) -> Pictures:
    """The nine groups as classes, also those without a test picture, and the names for retrieval."""
    shards = open_prepared(benchmark.root)
    samples = [shards.read(id) for id in range(shards.num_samples)]  # a few hundred small pictures
    unknown = sorted(set(_classes(benchmark, [sample.info.label for sample in samples])) - set(OPENMOJI_GROUPS))
    if unknown:
        raise UsageError(
            f"{benchmark.root}: {unknown[0]!r} is not one of OpenMoji's nine groups; prepare openmoji again"
        )
    items = [(sample, OPENMOJI_GROUPS.index(sample.info.label)) for sample in samples]
    return Pictures(
        class_names=OPENMOJI_GROUPS,
        templates=OPENMOJI_TEMPLATES,
        items=items,
        load=_load_sample,
        names=names_of([(sample.info.meta["name"], sample.image) for sample in samples]),
    )


def open_combinations(benchmark: Benchmark) -> Pictures:
    """Held-out pictures of OpenMoji whose names are the classes and what retrieval looks for."""
    shards = open_prepared(benchmark.root)
    samples = [shards.read(id) for id in range(shards.num_samples)]
    names = names_of([(sample.info.meta["name"], sample.image) for sample in samples])
    items = [(sample, names.texts.index(sample.info.meta["name"])) for sample in samples]
    return Pictures(names.texts, OPENMOJI_TEMPLATES, items, _load_sample, names)


def names_of(pictures: Sequence[tuple[str, bytes]]) -> Names:
    """Distinct names, and the right ones for each (name, picture): its own and those of pictures with equal bytes.

    Stored pictures are lossless and all written the same way, so equal pixels are equal bytes.
    """
    texts = sorted({name for name, _ in pictures})
    number = {name: i for i, name in enumerate(texts)}
    names_of_picture: dict[bytes, set[int]] = {}
    for name, image in pictures:
        names_of_picture.setdefault(image, set()).add(number[name])
    return Names(tuple(texts), tuple(tuple(sorted(names_of_picture[image])) for _, image in pictures))


def open_digits(_benchmark: Benchmark) -> Pictures:
    """scikit-learn's 1,797 handwritten digits (8 x 8, 17 grey levels), with the names and the template of MNIST."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images * (255 / 16)).round().to(torch.uint8)[:, None].expand(-1, 3, -1, -1)
    labels = data.target.tolist()
    return Pictures(
        class_names=tuple("0123456789"),
        templates=DIGITS_TEMPLATES,
        items=range(len(labels)),
        load=lambda i: (images[i], labels[i]),
    )


def open_folder(benchmark: Benchmark) -> Pictures:
    """Class folders, where `find_classes` finds them."""
    name, root, found = benchmark.words, benchmark.root, classes_in(benchmark.name, benchmark.root)
    if found.wrapper:
        say(f"{name}: the class folders lie in {escaped(found.wrapper)}")
    found.tell(name)
    if found.empty:
        without = f"{plural(len(found.empty), 'class', 'classes')} without pictures ({some(found.empty)})"
        warn(f"{name}: {without}; the names are still candidates")
    numbers = {folder: number for number, folder in enumerate(found.names)}
    files = _labelled_files(root, lambda file: numbers.get(found.place(file)[1] or ""))
    inside = root / (found.wrapper or "")
    templates = _templates(inside if (inside / TEMPLATES_FILE).is_file() else root)
    return Pictures(tuple(found.names.values()), templates, files, _load_file, passed_over=found.passed_over)


def _labelled_files(root: Path, class_of: Callable[[str], int | None]) -> list[tuple[Path, int]]:
    """The picture files under `root` that have a class, by class and name."""
    labels = ((class_of(name), name) for name in filter(is_picture, names_in(root)))
    labelled = sorted((label, name) for label, name in labels if label is not None)
    return [(root / name, label) for label, name in labelled]


def _load_file(item: tuple[Path, int]) -> tuple[Tensor, int]:
    path, label = item
    return read_picture(path.read_bytes(), where=str(path)), label


def open_shards(benchmark: Benchmark) -> Pictures:
    """Samples of shards with the distinct labels as classes, by name."""
    shards = open_prepared(benchmark.root)
    names = sorted(set(_classes(benchmark, [shards.read(id).info.label for id in range(shards.num_samples)])))
    numbers = {name: i for i, name in enumerate(names)}
    items = _Labelled(shards, lambda label, meta: numbers[label])
    return Pictures(tuple(names), _templates(benchmark.root), items, _load_sample)


@dataclass(frozen=True)
class _Labelled(Sequence[Any]):
    """Samples of shards with their classes; indexing reads a sample."""

    shards: ShardDataset
    class_of: Callable[[str, Mapping[str, Any]], int]
    """Label and meta of a sample -> its class."""

    def __len__(self) -> int:
        return self.shards.num_samples

    def __getitem__(self, number: Any) -> tuple[RawSample, int]:
        sample = self.shards.read(number)
        return sample, self.class_of(str(sample.info.label), sample.info.meta)


def _load_sample(item: tuple[RawSample, int]) -> tuple[Tensor, int]:
    sample, label = item
    return read_picture(sample.image, where=f"{sample.shard}: sample {sample.key}"), label


def _classes(benchmark: Benchmark, labels: Sequence[str | None]) -> list[str]:
    """Class of each sample.

    Raises:
        UsageError: some samples have no class.
    """
    missing = labels.count(None)
    if missing:
        raise UsageError(
            f"{benchmark.name}: {missing} of {len(labels)} samples have no class in KEY.json; prepare the data from "
            "class folders"
        )
    return [str(label) for label in labels]


def open_imagenet_folders(benchmark: Benchmark) -> Pictures:
    """ImageNet's validation pictures in class folders."""
    root = benchmark.root
    numbers = {folder: imagenet.class_of(folder) for folder in folders_in(root)}
    _, passed_over = count_pictures(benchmark.name, names_in(root), first_folder)
    files = _labelled_files(root, lambda file: numbers.get(first_folder(file) or ""))
    if not files:
        raise UsageError("imagenet: class folders, but no pictures in them; unpack the validation pictures there")
    return Pictures(*imagenet.names_and_templates(), files, _load_file, passed_over=passed_over)


def open_imagenet_shards(benchmark: Benchmark) -> Pictures:
    """ImageNet's validation pictures as mlip prepare-data wrote them."""
    items = _Labelled(open_prepared(benchmark.root), imagenet.class_of_sample)
    return Pictures(*imagenet.names_and_templates(), items, _load_sample)


def _templates(folder: Path) -> tuple[str, ...]:
    """The templates of templates.txt in `folder`, else the default."""
    path = folder / TEMPLATES_FILE
    if not path.is_file():
        return DEFAULT_TEMPLATES
    return templates_in(path)


OPENERS: dict[str, Callable[[Benchmark], Pictures]] = {
    "openmoji": open_openmoji,
    "openmoji_combinations": open_combinations,
    "digits": open_digits,
    "folder": open_folder,
    "shards": open_shards,
    "imagenet_folders": open_imagenet_folders,
    "imagenet_shards": open_imagenet_shards,
    "web_shards": open_web_shards,
    "clip_benchmark": open_built,
}
"""By `Benchmark.kind`."""
