"""Open an evaluation set that was found: one function for each kind. `find.SETS` names them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlip_cli.data.dataset import RawSample, ShardDataset
from mlip_cli.data.open import open_prepared
from mlip_cli.errors import UsageError
from mlip_cli.evaluate.datasets import imagenet
from mlip_cli.evaluate.datasets.benchmark import Benchmark, class_folders, pictures_in
from mlip_cli.evaluate.datasets.clip_benchmark import open_tars, open_web_shards
from mlip_cli.evaluate.datasets.pictures import Names, Pictures, read_picture
from mlip_cli.terminal.output import warn

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
DIGITS_TEMPLATES = ('a photo of the number: "{c}".',)


def open_openmoji(benchmark: Benchmark) -> Pictures:
    """The nine groups as classes, also those without a test picture, and the names for retrieval."""
    shards = open_prepared(benchmark.root)
    samples = [shards.read(id) for id in range(shards.num_samples)]  # a few hundred small pictures
    unknown = sorted(set(_classes(benchmark, [sample.said.label for sample in samples])) - set(OPENMOJI_GROUPS))
    if unknown:
        raise UsageError(
            f"{benchmark.root}: {unknown[0]!r} is not one of OpenMoji's nine groups; prepare openmoji again"
        )
    items = [(sample, OPENMOJI_GROUPS.index(sample.said.label)) for sample in samples]
    return Pictures(
        class_names=OPENMOJI_GROUPS,
        templates=OPENMOJI_TEMPLATES,
        items=lambda: items,
        load=_load_sample,
        num_pictures=len(items),
        names=names_of([(sample.said.meta["name"], sample.image) for sample in samples]),
    )


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
        items=lambda: range(len(labels)),
        load=lambda i: (images[i], labels[i]),
        num_pictures=len(labels),
    )


def open_folder(benchmark: Benchmark) -> Pictures:
    root, folders = benchmark.root, class_folders(benchmark.root)
    names, names_file = [folder.name.replace("_", " ") for folder in folders], root / "classnames.txt"
    if names_file.is_file():
        names = _lines(names_file)
        if len(names) != len(folders):
            raise UsageError(
                f"{names_file}: {len(names)} names for {len(folders)} class folders; write one name a line, in the "
                "order of the folders"
            )
    found = [pictures_in(folder) for folder in folders]
    for folder, paths in zip(folders, found, strict=True):
        if not paths:
            warn(f"{folder}: this class has no pictures; its name is still a candidate")
    files = [(path, label) for label, paths in enumerate(found) for path in paths]
    return _files(files, class_names=tuple(names), templates=_templates(root))


def _files(files: list[tuple[Path, int]], *, class_names: tuple[str, ...], templates: tuple[str, ...]) -> Pictures:
    return Pictures(class_names, templates, lambda: files, _load_file, len(files))


def _load_file(item: tuple[Path, int]) -> tuple[Tensor, int]:
    path, label = item
    return read_picture(path.read_bytes(), where=str(path)), label


def open_shards(benchmark: Benchmark) -> Pictures:
    shards = open_prepared(benchmark.root)
    names = sorted(set(_classes(benchmark, [shards.read(id).said.label for id in range(shards.num_samples)])))
    numbers = {name: i for i, name in enumerate(names)}
    return _samples(
        shards,
        class_of=numbers.__getitem__,
        class_names=tuple(names),
        templates=_templates(benchmark.root),
    )


def _samples(
    shards: ShardDataset,
    *,
    class_of: Callable[[str], int],
    class_names: tuple[str, ...],
    templates: tuple[str, ...],
) -> Pictures:
    items = _Labelled(shards, lambda sample: class_of(str(sample.said.label)))
    return Pictures(class_names, templates, lambda: items, _load_sample, shards.num_samples)


@dataclass(frozen=True)
class _Labelled(Sequence[Any]):
    """Samples of shards with their classes; indexing reads a sample."""

    shards: ShardDataset
    label_of: Callable[[RawSample], int]

    def __len__(self) -> int:
        return self.shards.num_samples

    def __getitem__(self, number: Any) -> tuple[RawSample, int]:
        sample = self.shards.read(number)
        return sample, self.label_of(sample)


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


def open_imagenet(benchmark: Benchmark) -> Pictures:
    """ImageNet's validation pictures in any layout."""
    if benchmark.kind == "imagenet_web_shards":
        return open_web_shards(benchmark)
    names, templates = imagenet.names_and_templates()
    if benchmark.kind == "imagenet_tars":
        return open_tars(imagenet.validation_tars(benchmark.root), class_names=names, templates=templates)
    if benchmark.kind == "imagenet_shards":
        shards = open_prepared(benchmark.root)
        return _samples(shards, class_of=imagenet.class_of, class_names=names, templates=templates)
    files = _imagenet_files(benchmark)
    if not files:
        raise UsageError("imagenet: class folders, but no pictures in them; unpack the validation pictures there")
    return _files(files, class_names=names, templates=templates)


def _imagenet_files(benchmark: Benchmark) -> list[tuple[Path, int]]:
    if benchmark.kind == "imagenet_kaggle":
        return imagenet.kaggle_files(benchmark.root)
    folders = [(folder, imagenet.class_of(folder.name)) for folder in class_folders(benchmark.root)]
    return [(path, label) for folder, label in folders for path in pictures_in(folder)]


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text") from error
    return [line for line in lines if line]


def _templates(folder: Path) -> tuple[str, ...]:
    """The templates of templates.txt in `folder`, else the default."""
    path = folder / "templates.txt"
    if not path.is_file():
        return DEFAULT_TEMPLATES
    templates = _lines(path)
    wrong = [template for template in templates if "{c}" not in template]
    if wrong or not templates:
        what = f"{wrong[0]!r} has no {{c}}" if wrong else "no templates"
        raise UsageError(f"{path}: {what}; write one template a line, with {{c}} for the class name")
    return tuple(templates)
