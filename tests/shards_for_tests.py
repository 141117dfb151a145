"""A small, real data set of shards for tests."""

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from PIL import Image, ImageDraw

from mlip_cli.data.index import FORMATS, RECORD, write_index
from mlip_cli.data.tokenizer import Tokenizer
from mlip_cli.files import write_json

COLORS = ("red", "green", "blue", "yellow", "black", "purple", "orange", "gray")
SHAPES = ("disc", "square", "bar")


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
) -> Path:
    """Write `n` pictures of coloured shapes, with captions that say so, as a prepared data set; return `folder`.

    Args:
        size: side of the pictures, or (width, height).
        captions: how many captions each sample has (1 to 3), or texts, dealt to the samples one each, in turn.
        shard_size: samples a shard.
        image_format: jpg, png or webp (lossless).
        seed: places and sizes of the shapes; keys too, so that two data sets have none in common.
    """
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    shards = []
    for start in range(0, n, shard_size):
        path = folder / f"{prefix}-{start // shard_size:06d}.tar"
        samples = [
            _sample(i, size, captions, image_format, random, seed) for i in range(start, min(n, start + shard_size))
        ]
        with wds.TarWriter(str(path), mtime=0, encoder=False) as writer:
            for sample in samples:
                writer.write(sample)
        shards.append(index_shard(path))
    fingerprint = hashlib.sha256(json.dumps(shards).encode()).hexdigest()
    write_json(folder / "dataset.json", {"num_samples": n, "fingerprint": fingerprint, "shards": shards})
    write_json(folder / "sizes.json", {shard["name"]: shard["n"] for shard in shards})
    return folder


def index_shard(path: Path) -> dict[str, Any]:
    """Write the index of a finished tar; return its line in dataset.json."""
    tokenizer = Tokenizer(77)
    groups: dict[str, dict[str, tarfile.TarInfo]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, extension = member.name.rsplit(".", 1)
            groups.setdefault(key, {})[extension] = member
        records = np.zeros(len(groups), RECORD)
        for record, parts in zip(records, groups.values(), strict=True):
            image_format = next(extension for extension in FORMATS if extension in parts)
            fields = json.loads(tar.extractfile(parts["json"]).read())
            record["offset"] = min(part.offset for part in parts.values())
            for field, extension in (("image", image_format), ("txt", "txt"), ("json", "json")):
                record[f"{field}_offset"] = parts[extension].offset_data - record["offset"]
                record[f"{field}_size"] = parts[extension].size
            record["width"], record["height"] = fields["width"], fields["height"]
            record["format"] = FORMATS.index(image_format)
            record["num_captions"] = len(fields["captions"])
            record["num_tokens"] = max(tokenizer.count(caption["text"]) for caption in fields["captions"])
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    write_index(path, records, tar_bytes=len(content), sha256=sha256)
    return {"name": path.name, "n": len(records), "bytes": len(content), "sha256": sha256}


def _sample(
    i: int,
    size: int | tuple[int, int],
    captions: int | Sequence[str],
    image_format: str,
    random: np.random.Generator,
    seed: int,
) -> dict[str, Any]:
    color, shape = COLORS[i % len(COLORS)], SHAPES[i // len(COLORS) % len(SHAPES)]
    image = _draw(color, shape, (size, size) if isinstance(size, int) else size, random)
    file = io.BytesIO()
    options = {
        "jpg": {"format": "JPEG", "quality": 90},
        "png": {"format": "PNG"},
        "webp": {"format": "WEBP", "lossless": True},
    }
    image.save(file, **options[image_format])
    if isinstance(captions, int):
        texts = [f"a {color} {shape}", f"{shape}, {color}", f"a drawing of a {shape} that is {color}"][:captions]
    else:
        texts = [captions[i % len(captions)]]
    record = {
        "captions": [{"text": text, "weight": 1.0} for text in texts],
        "class": color,
        "width": image.width,
        "height": image.height,
        "original_width": image.width,
        "original_height": image.height,
        "sha256": hashlib.sha256(file.getvalue()).hexdigest(),
        "source": {"file": "made for tests", "row": i},
        "meta": {"shape": shape},
    }
    return {
        "__key__": f"{seed:02d}-{i:06d}",
        image_format: file.getvalue(),
        "txt": " ".join(texts[0].split()).encode(),
        "json": json.dumps(record, ensure_ascii=False).encode(),
    }


def _draw(color: str, shape: str, size: tuple[int, int], random: np.random.Generator) -> Image.Image:
    image = Image.new("RGB", size, "white")
    width, height = (random.uniform(0.4, 0.8, 2) * size).astype(int)
    x, y = (random.uniform(0, 1, 2) * (size[0] - width, size[1] - height)).astype(int)
    draw = ImageDraw.Draw(image)
    if shape == "disc":
        draw.ellipse((x, y, x + width, y + height), fill=color)
    else:
        draw.rectangle((x, y, x + width, y + (height if shape == "square" else max(1, height // 4))), fill=color)
    return image
