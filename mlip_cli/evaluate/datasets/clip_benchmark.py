"""clip-benchmark's data sets: those that it builds from a local folder, and its web shards. Nothing is downloaded."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from mlip_cli.data.pictures import RejectedPictureError, pillow_to_rgb
from mlip_cli.data.sources.listing import is_leftover
from mlip_cli.data.sources.records import UnusableSampleError
from mlip_cli.data.sources.tar_samples import GUESSED, TarNotes, parts_of_sample, samples_of
from mlip_cli.data.tar import check_not_compressed, open_tar, read_members
from mlip_cli.errors import RunError, UsageError
from mlip_cli.evaluate.datasets.benchmark import Benchmark
from mlip_cli.evaluate.datasets.pictures import Pictures, read_picture
from mlip_cli.paths import escaped
from mlip_cli.terminal.output import say

LEFT_OUT = "samples "
"""How the words for samples that are not measured begin."""
IMAGENETV2_FOLDER = "ImageNetV2-matched-frequency"
IMAGENETV2_PICTURES = 10_000

TarItem = tuple[Path, int, int, int]
"""The tar, offset and size of a picture in it, and its class."""


def open_built(benchmark: Benchmark) -> Pictures:
    """A data set that `clip_benchmark.datasets.builder.build_dataset` knows, from `benchmark.root`.

    Raises:
        UsageError: the folder does not hold it, or it has no pictures, or the number of its classes is wrong.
    """
    name, root = benchmark.name, benchmark.root
    if name == "imagenetv2":  # its constructor downloads unless all pictures are there, even with download=False
        n = sum(1 for _ in root.glob(f"{IMAGENETV2_FOLDER}/**/*.jpeg"))
        if n != IMAGENETV2_PICTURES:
            raise UsageError(
                f"{name}: {n:,} of {IMAGENETV2_PICTURES:,} pictures in {root / IMAGENETV2_FOLDER}; unpack them all"
            )
    dataset = _build(name, root)
    folders = _without_leftovers(dataset, root) if hasattr(dataset, "imgs") else dataset.classes
    if len(dataset) == 0:
        raise UsageError(f"{name}: no pictures in {root}; put the files of clip-benchmark's --dataset_root there")
    if len(folders) != len(dataset.classes):
        raise UsageError(f"{name}: {len(folders)} class folders in {root} for {len(dataset.classes)} classes")
    if hasattr(dataset, "loader"):  # else the set opens its files itself
        dataset.loader = lambda path: read_picture(Path(path).read_bytes(), where=str(path))

    def load(i: int) -> tuple[Tensor, int]:
        try:
            image, label = dataset[i]
        except RejectedPictureError as error:
            raise RunError(f"{name}: picture {i}: {error}; repair this picture or remove it") from error
        return image, int(label)

    return Pictures(tuple(dataset.classes), tuple(dataset.templates), range(len(dataset)), load)


def _without_leftovers(dataset: Any, root: Path) -> list[str]:
    """Take hidden files, and hidden folders as classes, out of a torchvision ImageFolder.

    Returns:
        The folders that are classes, by number.
    """
    number_of = getattr(dataset, "wnid_to_idx", dataset.class_to_idx)  # an ImageNet's class_to_idx is by English name
    folders = [folder for folder in sorted(number_of) if not is_leftover(folder)]
    numbers = {number_of[folder]: number for number, folder in enumerate(folders)}
    dataset.samples[:] = [
        (path, numbers[label])
        for path, label in dataset.samples
        if not any(map(is_leftover, Path(path).relative_to(root).parts))
    ]
    return folders


def _to_tensor(image: Tensor | Image.Image) -> Tensor:
    """uint8 (3, H, W) of what a data set opened: by our reader, or by Pillow."""
    return image if isinstance(image, Tensor) else pil_to_tensor(pillow_to_rgb(image))


def _build(name: str, root: Path) -> Any:
    from clip_benchmark.datasets.builder import build_dataset

    try:
        with contextlib.redirect_stdout(sys.stderr):  # it prints; stdout is the result
            return build_dataset(name, root=str(root), transform=_to_tensor, split="test", download=False)
    except (RuntimeError, OSError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{name}: {root} does not hold what clip-benchmark expects: {reason}") from error


def open_web_shards(benchmark: Benchmark) -> Pictures:
    """Web shards that `clip_benchmark_export_wds` wrote, read by our strict tar reader.

    clip-benchmark's own reader unpickles members, and it ends a damaged shard without a message.

    Raises:
        UsageError: a file is missing, or no picture has a label.
        RunError: a shard is damaged, or most samples have no label.
    """
    root, part = benchmark.root, benchmark.root / "test"
    kind = _lines(root / "dataset_type.txt")[:1] if (root / "dataset_type.txt").is_file() else ["classification"]
    if kind != ["classification"]:
        raise UsageError(
            f"{benchmark.name}: a data set for {' '.join(kind)}; eval-zeroshot needs one for classification"
        )
    count = _lines(part / "nshards.txt")
    if len(count) != 1 or not count[0].isdigit():
        raise UsageError(f"{part / 'nshards.txt'}: not a number of shards")
    tars = [part / f"{i}.tar" for i in range(int(count[0]))]
    missing = [tar for tar in tars if not tar.is_file()]
    if missing:
        raise UsageError(f"{benchmark.name}: {len(missing)} of {len(tars)} shards are missing, such as {missing[0]}")
    class_names, templates = (
        tuple(_lines(root / name)) for name in ("classnames.txt", "zeroshot_classification_templates.txt")
    )
    for tar in tars:
        check_not_compressed(tar, "evaluation")
    notes = TarNotes()
    items = [item for tar in tars for item in labelled_pictures(tar, notes)]
    notes.tell_readings(benchmark.name, say=say)
    num_left_out = sum(n for kind, n in notes.passed_over.counts.items() if kind.startswith(LEFT_OUT))
    if num_left_out > len(items) > 0:
        raise RunError(f"{part}: {notes.passed_over.in_words()}; only {len(items):,} others have a picture and a class")
    if not items:
        raise UsageError(f"{part}: no pictures with a .cls beside them")
    return Pictures(class_names, templates, items, _load_tar_item, passed_over=notes.passed_over)


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise UsageError(f"{path}: missing; write it with clip_benchmark_export_wds")
    return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]


def labelled_pictures(tar: Path, notes: TarNotes | None = None) -> Iterator[TarItem]:
    """The pictures of a webdataset tar with the class number in a `.cls` beside each.

    Args:
        notes: are added to.

    Raises:
        RunError: the tar is damaged, or a `.cls` holds no number.
    """
    notes = TarNotes() if notes is None else notes
    samples, _ = samples_of(read_members(tar), GUESSED, notes, tar=tar.name)
    with open_tar(tar) as opened:
        for sample in samples:
            try:
                parts = parts_of_sample(sample, GUESSED)
            except UnusableSampleError as error:
                notes.passed_over.add(f"{LEFT_OUT}with {error}", f"{tar.name}: {escaped(sample.key)}")
                continue
            if "cls" not in parts:
                notes.passed_over.add(f"{LEFT_OUT}without a class number", f"{tar.name}: {escaped(sample.key)}")
                continue
            label = opened.read(min(parts["cls"].size, 16), parts["cls"].offset).strip()
            if not label.isdigit():
                raise RunError(f"{tar}: {escaped(sample.key)}.cls is not a class number")
            yield tar, parts["image"].offset, parts["image"].size, int(label)


def _load_tar_item(item: TarItem) -> tuple[Tensor, int]:
    tar, offset, size, label = item
    with open(tar, "rb") as file:
        content = os.pread(file.fileno(), size, offset)
    return read_picture(content, where=f"{tar}: picture at byte {offset}"), label
