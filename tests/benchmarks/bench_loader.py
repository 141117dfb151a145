"""Microseconds of CPU time per sample: our indexed loader and webdataset's own iteration, on the same shards.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_loader.py

Every row is timed in turn in one process, seven rounds; printed are median, smallest and largest round.
"""

import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torchvision import transforms as T

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shards_for_tests import make_dataset

from mlip_cli.data import pictures as module
from mlip_cli.data.loader import training_loader
from mlip_cli.data.open import open_prepared
from mlip_cli.data.order import Order
from mlip_cli.data.pictures import jpeg_decoder, open_picture
from mlip_cli.data.tokenizer import Tokenizer
from mlip_cli.data.transforms import decode, least_size, training_crop, training_transform
from mlip_cli.recipe.config import Augment, Data, Source
from mlip_cli.terminal.output import print_table

N, ROUNDS = 1024, 7
AUGMENT = Augment(crop_scale=(0.5, 1.0))


def photographs(width: int, height: int) -> list[Image.Image]:
    """As costly to decode as photographs, whose spectrum they have: noise that falls with 1 / frequency."""
    random = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    pictures = []
    for _ in range(64):
        channels = np.fft.irfft2(np.fft.rfft2(random.normal(size=(3, height, width))) / frequency, s=(height, width))
        levels = 128 + 48 * channels / channels.std()
        pictures.append(Image.fromarray(levels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)))
    return pictures


@contextmanager
def pillow_alone() -> Iterator[None]:
    """Decode without simplejpeg inside the block."""
    with patch.object(module, "simplejpeg_decode", None):
        yield


def rows(folder: Path, size: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name; each goes through N samples once."""
    dataset = open_prepared(folder)
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    order = Order([N], None, seed=0, global_batch_size=128)
    ids = order.positions(np.arange(N)).index.tolist()
    generator, tokenizer = torch.Generator(), Tokenizer(77)
    pictures = [dataset.read(id).image for id in range(N)]
    data = Data(train=(Source(path=str(folder)),), image_size=size, augment=AUGMENT)
    crops = [training_crop(*decode(open_picture(p)).shape[-2:], data=data, generator=generator) for p in pictures]
    decoded = [
        decode(open_picture(p), least=least_size(crop, size)) for p, crop in zip(pictures[:128], crops, strict=False)
    ]
    pillow = T.Compose(
        [
            T.RandomResizedCrop(size, (0.5, 1.0), interpolation=T.InterpolationMode.BICUBIC),
            T.ToTensor(),
            T.Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        ]
    )

    def webdataset_samples() -> Iterator[dict[str, bytes]]:
        return iter(wds.WebDataset(shards, shardshuffle=False, empty_check=False))

    def webdataset_whole() -> None:
        for sample in webdataset_samples():
            content = next(sample[name] for name in ("jpg", "webp") if name in sample)
            pillow(Image.open(io.BytesIO(content)).convert("RGB"))
            tokenizer.encode([sample["txt"].decode()])

    def ours_whole() -> None:
        batches = training_loader(
            [dataset],
            order,
            data=data,
            tokenizer=Tokenizer(77),
            steps=range(N // 128),
            num_workers=0,
        )
        assert sum(len(batch.keys) for batch in batches) == N

    def decode_all() -> None:
        for content, crop in zip(pictures, crops, strict=True):
            decode(open_picture(content), least=least_size(crop, size))

    def transform_all() -> None:
        for i in range(N):
            training_transform(decoded[i % 128], crop=crops[i % 128], data=data, generator=generator)

    return {
        "read: indexed, permuted order": lambda: [dataset.read(id) for id in ids],
        "read: webdataset, in sequence": lambda: list(islice(webdataset_samples(), N)),
        f"decode: {jpeg_decoder()}": decode_all,
        "decode: without simplejpeg": pillow_alone()(decode_all),
        "transform": transform_all,
        "batches: this loader": ours_whole,
        "batches: this loader without simplejpeg": pillow_alone()(ours_whole),
        "batches: webdataset, Pillow, ToTensor": webdataset_whole,
    }


def main() -> None:
    torch.set_num_threads(1)
    table: list[list[object]] = []
    with tempfile.TemporaryDirectory() as folder:
        icons = make_dataset(Path(folder) / "icons", n=N, size=64, shard_size=256)
        pictures = photographs(341, 256)
        photos = make_dataset(Path(folder) / "p", n=N, shard_size=256, image_format="jpg", pictures=pictures)
        large = photographs(1024, 768)
        larger = make_dataset(Path(folder) / "l", n=N, shard_size=256, image_format="jpg", pictures=large)
        cases = (
            ("64 px WebP -> 64", icons, 64),
            ("341x256 JPEG -> 224", photos, 224),
            ("1024x768 JPEG -> 224", larger, 224),
        )
        for name, path, size in cases:
            timed = rows(path, size)
            times: dict[str, list[float]] = {row: [] for row in timed}
            for _ in range(ROUNDS):
                for row, work in timed.items():
                    start = time.process_time()
                    work()
                    times[row].append((time.process_time() - start) / N * 1e6)
            table += [
                [name, row, *(round(value) for value in (statistics.median(found), min(found), max(found)))]
                for row, found in times.items()
            ]
    print_table(("data", "work", "us a sample", "least", "most"), table)


if __name__ == "__main__":
    main()
