"""The layouts in which people download captioned and labelled pictures, written from pairs."""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from sources_for_tests import write_files, write_tar


class Pair(NamedTuple):
    """A picture (JPEG bytes), its captions and its class."""

    content: bytes
    captions: tuple[str, ...]
    label: str


def _split(pairs: Sequence[Pair]) -> Iterator[tuple[str, list[tuple[int, Pair]]]]:
    """Every fifth pair is in val."""
    numbered = list(enumerate(pairs))
    yield "train", [(i, pair) for i, pair in numbered if i % 5]
    yield "val", [(i, pair) for i, pair in numbered if not i % 5]


def write_flickr8k(folder: Path, pairs: Sequence[Pair]) -> None:
    """Images/ beside captions.txt, one row a caption."""
    write_files(folder, {f"Images/{i:05}.jpg": pair.content for i, pair in enumerate(pairs)})
    with open(folder / "captions.txt", "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("image", "caption"))
        rows.writerows((f"{i:05}.jpg", caption) for i, pair in enumerate(pairs) for caption in pair.captions)


def write_coco(folder: Path, pairs: Sequence[Pair]) -> None:
    """train2017/, val2017/ and annotations/captions_*.json."""
    for split, chosen in _split(pairs):
        write_files(folder, {f"{split}2017/{i:012}.jpg": pair.content for i, pair in chosen})
        images = [{"id": i, "file_name": f"{i:012}.jpg"} for i, _ in chosen]
        said = [{"image_id": i, "caption": caption} for i, pair in chosen for caption in pair.captions]
        content = json.dumps({"images": images, "annotations": [{"id": k, **fields} for k, fields in enumerate(said)]})
        write_files(folder, {f"annotations/captions_{split}2017.json": content})


def write_image_folder(folder: Path, pairs: Sequence[Pair]) -> None:
    """train/CLASS and val/CLASS."""
    for split, chosen in _split(pairs):
        write_files(folder, {f"{split}/{pair.label}/{i:05}.jpg": pair.content for i, pair in chosen})


def write_hub_parquet(folder: Path, pairs: Sequence[Pair]) -> None:
    """data/SPLIT-00000-of-0000N.parquet with the pictures inside, as the Hub hands them out."""
    (folder / "data").mkdir(parents=True)
    for split, chosen in (("train", 2), ("validation", 1)):
        all_rows = dict(_split(pairs))["train" if split == "train" else "val"]
        for k in range(chosen):
            rows = [
                {"image": {"bytes": pair.content, "path": f"{i}.jpg"}, "caption": list(pair.captions)}
                for i, pair in all_rows[k::chosen]
            ]
            pq.write_table(pa.Table.from_pylist(rows), folder / "data" / f"{split}-{k:05}-of-{chosen:05}.parquet")


def write_img2dataset(folder: Path, pairs: Sequence[Pair]) -> None:
    """Tars with jpg, txt and json, and beside each a table of what was fetched and its statistics."""
    for k in range(2):
        members, rows = {}, []
        for i, pair in list(enumerate(pairs))[k::2]:
            key = f"{k:05}{i:04}"
            fields = {"caption": pair.captions[0], "url": f"https://a.example/{i}.jpg", "key": key, "status": "success"}
            members |= {f"{key}.jpg": pair.content, f"{key}.json": json.dumps(fields), f"{key}.txt": pair.captions[0]}
            rows.append(fields)
        write_tar(folder / f"{k:05}.tar", members)
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{k:05}.parquet")
        write_files(folder, {f"{k:05}_stats.json": json.dumps({"count": len(rows), "successes": len(rows)})})


LAYOUTS: dict[str, Callable[[Path, Sequence[Pair]], None]] = {
    "flickr8k": write_flickr8k,
    "coco": write_coco,
    "imagefolder": write_image_folder,
    "hub": write_hub_parquet,
    "img2dataset": write_img2dataset,
}
