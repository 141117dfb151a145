"""A small, real data set of shards for tests."""

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mlip_cli.data.dataset import ShardDataset
from mlip_cli.data.index import HEADER, RECORD, checksum, index_path, place_of, write_index
from mlip_cli.data.loader import training_loader
from mlip_cli.data.order import Order
from mlip_cli.data.prepare.shards import sample_parts, tar_writer, verify_tar
from mlip_cli.data.tokenizer import Tokenizer
from mlip_cli.files import write_json
from mlip_cli.recipe.config import Data, Source
from mlip_cli.types import Batch

COLORS = ("red", "green", "blue", "yellow", "black", "purple", "orange", "gray")
SHAPES = ("disc", "square", "bar")
ENCODERS = {
    "jpg": {"format": "JPEG", "quality": 90},
    "png": {"format": "PNG"},
    "webp": {"format": "WEBP", "lossless": True},
}


def make_dataset(
    folder: Path,
    *,
    n: int = 32,
    size: int | tuple[int, int] = 32,
    captions: int | Sequence[str] = 2,
    shard_size: int = 16,
    image_format: str = "webp",
    seed: int = 0,
    prefix: str = "train",
    pictures: Sequence[Image.Image] | None = None,
) -> Path:
    """Write `n` pictures of coloured shapes, with captions that say so, as a prepared data set; return `folder`.

    Args:
        size: side of the pictures, or (width, height).
        captions: how many captions each sample has (1 to 3), or texts, dealt to the samples one each, in turn.
        shard_size: samples a shard.
        image_format: jpg, png or webp (lossless).
        seed: places and sizes of the shapes; keys too, so that two data sets have none in common.
        pictures: dealt to the samples in turn, in place of the shapes; `size` is then without effect.
    """
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    tokenizer = Tokenizer(77)
    shards = []
    for start in range(0, n, shard_size):
        path = folder / f"{prefix}-{start // shard_size:06d}.tar"
        num_tokens = []
        with tar_writer(path) as writer:
            for i in range(start, min(n, start + shard_size)):
                image = pictures[i % len(pictures)] if pictures else _draw(i, size, random)
                content = _encode(image, image_format)
                fields = _fields(i, image, content, captions)
                writer.write(sample_parts(f"{seed:02d}-{i:06d}", image=content, format=image_format, fields=fields))
                num_tokens.append(max(tokenizer.count(caption["text"]) for caption in fields["captions"]))
        shards.append(index_shard(path, num_tokens))
    fingerprint = hashlib.sha256(json.dumps(shards).encode()).hexdigest()
    write_json(folder / "dataset.json", {"num_samples": n, "fingerprint": fingerprint, "shards": shards})
    write_json(folder / "sizes.json", {shard["name"]: shard["n"] for shard in shards})
    return folder


def index_shard(path: Path, num_tokens: Sequence[int]) -> dict[str, Any]:
    """Write the index of a finished tar; return its line in dataset.json."""
    verified = verify_tar(path, num_tokens)
    write_index(path, verified.records, tar_bytes=verified.num_bytes, sha256=verified.sha256)
    return {"name": path.name, "n": len(verified.records), "bytes": verified.num_bytes, "sha256": verified.sha256}


def give_checksums(path: Path) -> None:
    """Write the index of a tar of ours that was changed in place as if it had been written so."""
    header = np.fromfile(index_path(path), HEADER, count=1)[0]
    records = np.fromfile(index_path(path), RECORD, offset=HEADER.itemsize)
    content = path.read_bytes()
    for record in records:
        place = place_of(record, is_prepared=True)
        record["crc32"] = checksum(record, content[place.start : place.end])
    write_index(path, records, tar_bytes=len(content), sha256=bytes(header["sha256"]).hex())


def _names(i: int) -> tuple[str, str]:
    return COLORS[i % len(COLORS)], SHAPES[i // len(COLORS) % len(SHAPES)]


def _draw(i: int, size: int | tuple[int, int], random: np.random.Generator) -> Image.Image:
    color, shape = _names(i)
    image = Image.new("RGB", (size, size) if isinstance(size, int) else size, "white")
    width, height = (random.uniform(0.4, 0.8, 2) * image.size).astype(int)
    x, y = (random.uniform(0, 1, 2) * (image.width - width, image.height - height)).astype(int)
    draw = ImageDraw.Draw(image)
    if shape == "disc":
        draw.ellipse((x, y, x + width, y + height), fill=color)
    else:
        draw.rectangle((x, y, x + width, y + (height if shape == "square" else max(1, height // 4))), fill=color)
    return image


def _encode(image: Image.Image, image_format: str) -> bytes:
    file = io.BytesIO()
    image.save(file, **ENCODERS[image_format])
    return file.getvalue()


def _fields(i: int, image: Image.Image, content: bytes, captions: int | Sequence[str]) -> dict[str, Any]:
    color, shape = _names(i)
    if isinstance(captions, int):
        texts = [f"a {color} {shape}", f"{shape}, {color}", f"a drawing of a {shape} that is {color}"][:captions]
    else:
        texts = [captions[i % len(captions)]]
    return {
        "captions": [{"text": text, "weight": 1.0} for text in texts],
        "class": color,
        "width": image.width,
        "height": image.height,
        "original_width": image.width,
        "original_height": image.height,
        "sha256": hashlib.sha256(content).hexdigest(),
        "source": {"file": "made for tests", "row": i},
        "meta": {"shape": shape},
    }


def batches_of(
    dataset: ShardDataset,
    steps: range,
    *,
    batch_size: int,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    **data: Any,
) -> Iterator[Batch]:
    """The training batches of these steps; `data` is a recipe's section."""
    return training_loader(
        [dataset],
        Order([dataset.num_samples], None, seed=0, global_batch_size=batch_size),
        data=Data(train=(Source(path="unused"),), **data),
        tokenizer=Tokenizer(16),
        steps=steps,
        num_workers=num_workers,
        rank=rank,
        world_size=world_size,
    )
