"""Opening an evaluation data set that was found: one function a kind."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlip_cli.errors import UsageError
from mlip_cli.evaluate.datasets import imagenet
from mlip_cli.evaluate.datasets.clip_benchmark import open_built, open_tars, open_web_shards
from mlip_cli.evaluate.datasets.find import Benchmark, class_folders, pictures_in
from mlip_cli.evaluate.datasets.pictures import Names, Pictures, Readers, Sample, Shards, read_picture
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


def open_benchmark(benchmark: Benchmark, readers: Readers) -> Pictures:
    """Open a data set that `find_benchmark` found.

    Raises:
        UsageError: it is not what it should be; says where and what to do.
    """
    return OPENERS[benchmark.kind](benchmark, readers)


def open_named(benchmark: Benchmark, readers: Readers) -> Pictures:
    """The same data set with the most special name of each picture as its class.

    OpenMoji's pictures have names besides their group, those of prepared shards their first caption; elsewhere the name
    is the class.

    Raises:
        UsageError: it is not what it should be; says where and what to do.
    """
    return {**OPENERS, "openmoji": _openmoji_by_name, "shards": _shards_by_caption}[benchmark.kind](benchmark, readers)


def _openmoji(benchmark: Benchmark, readers: Readers) -> Pictures:
    """The nine groups as classes, whichever of them the test part holds, and the names for retrieval."""
    shards = readers.open_shards(benchmark.root)
    samples = [shards.read(id) for id in range(shards.num_samples)]  # a few hundred small pictures
    unknown = sorted(set(_classes(benchmark, [sample.record for sample in samples])) - set(OPENMOJI_GROUPS))
    if unknown:
        raise UsageError(f"{benchmark.root}: {unknown[0]!r} is none of OpenMoji's nine groups; prepare openmoji again")
    items = [(sample, OPENMOJI_GROUPS.index(sample.record["class"])) for sample in samples]
    return Pictures(
        class_names=OPENMOJI_GROUPS,
        templates=OPENMOJI_TEMPLATES,
        items=lambda: items,
        load=_load_sample,
        num_pictures=len(items),
        names=names_of([(sample.record["meta"]["name"], sample.image) for sample in samples]),
    )


def _openmoji_by_name(benchmark: Benchmark, readers: Readers) -> Pictures:
    by_group = _openmoji(benchmark, readers)
    assert by_group.names is not None
    number = {text: i for i, text in enumerate(by_group.names.texts)}
    items = [(sample, number[sample.record["meta"]["name"]]) for sample, _ in by_group.items()]
    return replace(by_group, class_names=by_group.names.texts, templates=("{c}",), items=lambda: items)


def names_of(pictures: Sequence[tuple[str, bytes]]) -> Names:
    """Distinct names, and which of them each (name, picture) accepts: its own and those of pictures with equal bytes.

    Stored pictures are lossless and all written the same way, so equal pixels are equal bytes.
    """
    texts = sorted({name for name, _ in pictures})
    number = {name: i for i, name in enumerate(texts)}
    names_of_picture: dict[bytes, set[int]] = {}
    for name, image in pictures:
        names_of_picture.setdefault(image, set()).add(number[name])
    return Names(tuple(texts), tuple(tuple(sorted(names_of_picture[image])) for _, image in pictures))


def _digits(_benchmark: Benchmark, _readers: Readers) -> Pictures:
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


def _folder(benchmark: Benchmark, readers: Readers) -> Pictures:
    root, folders = benchmark.root, class_folders(benchmark.root)
    names, names_file = [folder.name.replace("_", " ") for folder in folders], root / "classnames.txt"
    if names_file.is_file():
        names = _lines(names_file)
        if len(names) != len(folders):
            raise UsageError(
                f"{names_file}: {len(names)} names for {len(folders)} class folders; one a line, in the folders' order"
            )
    found = [pictures_in(folder) for folder in folders]
    for folder, paths in zip(folders, found, strict=True):
        if not paths:
            warn(f"{folder}: a class without pictures; its name takes part all the same")
    files = [(path, label) for label, paths in enumerate(found) for path in paths]
    return _files(files, class_names=tuple(names), templates=_templates(root))


def _files(files: list[tuple[Path, int]], *, class_names: tuple[str, ...], templates: tuple[str, ...]) -> Pictures:
    return Pictures(class_names, templates, lambda: files, _load_file, len(files))


def _load_file(item: tuple[Path, int]) -> tuple[Tensor, int]:
    path, label = item
    return read_picture(path.read_bytes(), where=str(path)), label


def _shards(benchmark: Benchmark, readers: Readers) -> Pictures:
    shards = readers.open_shards(benchmark.root)
    names = sorted(set(_classes(benchmark, [shards.read(id).record for id in range(shards.num_samples)])))
    numbers = {name: i for i, name in enumerate(names)}
    return _samples(
        shards,
        readers,
        class_of=numbers.__getitem__,
        class_names=tuple(names),
        templates=_templates(benchmark.root),
    )


def _shards_by_caption(benchmark: Benchmark, readers: Readers) -> Pictures:
    shards = readers.open_shards(benchmark.root)
    names = sorted({_first_caption(shards.read(id)) for id in range(shards.num_samples)})
    return _samples(
        shards,
        readers,
        name_of=_first_caption,
        class_of={name: i for i, name in enumerate(names)}.__getitem__,
        class_names=tuple(names),
        templates=("{c}",),
    )


def _first_caption(sample: Sample) -> str:
    return str(sample.record["captions"][0]["text"])


def _own_class(sample: Sample) -> str:
    return str(sample.record["class"])


def _samples(
    shards: Shards,
    readers: Readers,
    *,
    name_of: Callable[[Sample], str] = _own_class,
    class_of: Callable[[str], int],
    class_names: tuple[str, ...],
    templates: tuple[str, ...],
) -> Pictures:
    items = _Labelled(shards, lambda sample: class_of(name_of(sample)))
    return Pictures(class_names, templates, lambda: items, _load_sample, shards.num_samples)


@dataclass(frozen=True)
class _Labelled(Sequence[Any]):
    """Samples of shards with their classes, each read when it is asked for."""

    shards: Shards
    label_of: Callable[[Sample], int]

    def __len__(self) -> int:
        return self.shards.num_samples

    def __getitem__(self, number: Any) -> tuple[Sample, int]:
        sample = self.shards.read(number)
        return sample, self.label_of(sample)


def _load_sample(item: tuple[Sample, int]) -> tuple[Tensor, int]:
    sample, label = item
    return read_picture(sample.image, where=f"{sample.shard}: sample {sample.key}"), label


def _classes(benchmark: Benchmark, records: Sequence[dict[str, Any]]) -> list[str]:
    """Class of each sample.

    Raises:
        UsageError: some have none.
    """
    missing = sum(record.get("class") is None for record in records)
    if missing:
        raise UsageError(
            f"{benchmark.name}: {missing} of {len(records)} samples have no class in KEY.json; prepare the data from "
            "class folders"
        )
    return [str(record["class"]) for record in records]


def _imagenet_folders(benchmark: Benchmark, readers: Readers) -> Pictures:
    folders = [(folder, imagenet.class_of(folder.name)) for folder in class_folders(benchmark.root)]
    return _imagenet_files([(path, label) for folder, label in folders for path in pictures_in(folder)], readers)


def _imagenet_kaggle(benchmark: Benchmark, readers: Readers) -> Pictures:
    return _imagenet_files(imagenet.kaggle_files(benchmark.root), readers)


def _imagenet_files(files: list[tuple[Path, int]], readers: Readers) -> Pictures:
    if not files:
        raise UsageError("imagenet: class folders, but no pictures in them; unpack the validation pictures there")
    names, templates = imagenet.names_and_templates()
    return _files(files, class_names=names, templates=templates)


def _imagenet_shards(benchmark: Benchmark, readers: Readers) -> Pictures:
    shards = readers.open_shards(benchmark.root)
    names, templates = imagenet.names_and_templates()
    return _samples(shards, readers, class_of=imagenet.class_of, class_names=names, templates=templates)


def _imagenet_tars(benchmark: Benchmark, readers: Readers) -> Pictures:
    names, templates = imagenet.names_and_templates()
    return open_tars(imagenet.validation_tars(benchmark.root), readers, class_names=names, templates=templates)


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text") from error
    return [line for line in lines if line]


def _templates(folder: Path) -> tuple[str, ...]:
    """Those of templates.txt in `folder`, else the default."""
    path = folder / "templates.txt"
    if not path.is_file():
        return DEFAULT_TEMPLATES
    templates = _lines(path)
    wrong = [template for template in templates if "{c}" not in template]
    if wrong or not templates:
        what = f"{wrong[0]!r} has no {{c}}" if wrong else "no templates"
        raise UsageError(f"{path}: {what}; one template a line, with {{c}} where the class name goes")
    return tuple(templates)


OPENERS: dict[str, Callable[[Benchmark, Readers], Pictures]] = {
    "openmoji": _openmoji,
    "digits": _digits,
    "folder": _folder,
    "shards": _shards,
    "imagenet_folders": _imagenet_folders,
    "imagenet_kaggle": _imagenet_kaggle,
    "imagenet_shards": _imagenet_shards,
    "imagenet_tars": _imagenet_tars,
    "imagenet_web_shards": open_web_shards,
    "clip_benchmark": open_built,
    "web_shards": open_web_shards,
}
