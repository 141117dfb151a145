"""clip-benchmark's data sets: those that it builds from a local folder, and its web shards. Nothing is downloaded."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from mlip_cli.data.pictures import RejectedPictureError, pillow_to_rgb
from mlip_cli.data.sources.listing import PassedOver, is_leftover
from mlip_cli.data.sources.records import UnusableSampleError
from mlip_cli.data.sources.tar_samples import GUESSED, TarNotes, parts_of_sample, samples_of
from mlip_cli.data.tar import check_not_compressed, open_tar, read_members
from mlip_cli.errors import RunError, UsageError
from mlip_cli.evaluate.datasets.benchmark import Benchmark, templates_in
from mlip_cli.evaluate.datasets.pictures import Pictures, read_picture
from mlip_cli.files import read_lines
from mlip_cli.paths import escaped
from mlip_cli.terminal.output import say

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
    kind = read_lines(root / "dataset_type.txt")[:1] if (root / "dataset_type.txt").is_file() else ["classification"]
    if kind != ["classification"]:
        raise UsageError(
            f"{benchmark.name}: a data set for {' '.join(kind)}; eval-zeroshot needs one for classification"
        )
    count = read_lines(_required(part / "nshards.txt"))
    if len(count) != 1 or not re.fullmatch("[0-9]{1,9}", count[0]):
        raise UsageError(f"{part / 'nshards.txt'}: not a number of shards")
    num_tars, num_there = int(count[0]), sum(1 for _ in part.glob("*.tar"))
    tars = [part / f"{i}.tar" for i in range(min(num_tars, num_there + 1))]  # the number may be wrong, and huge
    missing = [tar for tar in tars if not tar.is_file()]
    if missing:
        num_missing = num_tars - len(tars) + len(missing)
        raise UsageError(f"{benchmark.name}: {num_missing} of {num_tars} shards are missing, such as {missing[0]}")
    class_names = tuple(read_lines(_required(root / "classnames.txt")))
    templates = templates_in(_required(root / "zeroshot_classification_templates.txt"))
    for tar in tars:
        check_not_compressed(tar, "evaluation")
    notes, left_out = TarNotes(), PassedOver()
    items = [item for tar in tars for item in labelled_pictures(tar, notes, left_out)]
    notes.tell_readings(benchmark.name, say=say)
    if sum(left_out.counts.values()) > len(items) > 0:
        raise RunError(f"{part}: {left_out.in_words()}; only {len(items):,} others have a picture and a class")
    if not items:
        raise UsageError(f"{part}: no pictures with a .cls beside them")
    left_out.update(notes.passed_over)
    return Pictures(class_names, templates, items, _load_tar_item, passed_over=left_out)


def _required(path: Path) -> Path:
    """`path`, once it is seen that the file is there."""
    if not path.is_file():
        raise UsageError(f"{path}: missing; write it with clip_benchmark_export_wds")
    return path


def labelled_pictures(tar: Path, notes: TarNotes, left_out: PassedOver) -> Iterator[TarItem]:
    """The pictures of a webdataset tar with the class number in a `.cls` beside each.

    Args:
        notes: are added to. left_out: samples without a picture and a class are added to it.

    Raises:
        RunError: the tar is damaged, or a `.cls` holds no number.
    """
    samples, _ = samples_of(read_members(tar), GUESSED, notes, tar=tar.name)
    with open_tar(tar) as opened:
        for sample in samples:
            try:
                parts = parts_of_sample(sample, GUESSED)
            except UnusableSampleError as error:
                left_out.add(f"samples with {error}", f"{tar.name}: {sample.key}")
                continue
            if "cls" not in parts:
                left_out.add("samples without a class number", f"{tar.name}: {sample.key}")
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
