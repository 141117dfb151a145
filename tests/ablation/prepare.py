"""Pictures with names and tags become the ablation's train/, validation/, test/: ablation.prepare SOURCE OUT.

SOURCE holds tars named train-*.tar and test-*.tar; a sample is a picture and KEY.json with `caption` (its name),
`tags`, `concept`, `source` and `group`. A tenth of the training concepts becomes validation/, so that no choice looks
at test/. Captions of train/ are the name with 0 to 3 of its tags, drawn here once; those of the others the name alone.
"""

import hashlib
import json
import random
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DRAWS = 24
"""Captions drawn for a training picture; equal ones become one of a larger weight."""

MOST_TAGS = 3
VALIDATION_SHARE = 0.1
FIELDS = ("caption", "tags", "concept", "source", "group")
PICTURES = (".webp", ".png", ".jpg", ".jpeg")


def split_of(tar: Path, concept: str) -> str:
    """train, validation or test; a concept is in one of them alone."""
    if tar.name.startswith("test"):
        return "test"
    draw = int.from_bytes(hashlib.sha256(concept.encode()).digest()[:8], "big") / 2**64
    return "validation" if draw < VALIDATION_SHARE else "train"


def training_captions(name: str, tags: list[str], key: str) -> list[dict[str, Any]]:
    """`name` or `name: tag, tag`: the number of tags uniform in 0 to 3 (as far as there are), which ones at random."""
    draws = random.Random(key)
    counts: Counter[str] = Counter()
    for _ in range(DRAWS):
        drawn = draws.sample(tags, draws.randint(0, min(MOST_TAGS, len(tags))))
        counts[f"{name}: {', '.join(drawn)}" if drawn else name] += 1
    return [{"text": text, "weight": float(count)} for text, count in counts.items()]


def rows(tar: Path, pictures: Path) -> Iterator[dict[str, Any]]:
    """The rows of the table that `mlip prepare-data` reads; pictures are written as files of their own."""
    fields: dict[str, dict[str, Any]] = {}
    names: dict[str, str] = {}
    with tarfile.open(tar) as archive:
        for member in archive:
            key, suffix = Path(member.name).stem, Path(member.name).suffix
            content = archive.extractfile(member)
            if content is None:
                continue
            if suffix == ".json":
                fields[key] = json.load(content)
            elif suffix in PICTURES:
                names[key] = f"{key}{suffix}"
                (pictures / names[key]).write_bytes(content.read())
    for key, sample in fields.items():
        lacks = [name for name in FIELDS if name not in sample] + ([] if key in names else ["picture"])
        if lacks:
            raise SystemExit(f"{tar}: sample {key} has no {lacks[0]}; each needs a picture and {', '.join(FIELDS)}")
        split, name = split_of(tar, sample["concept"]), sample["caption"]
        yield {
            "image": names[key],
            "captions": training_captions(name, sample["tags"], key) if split == "train" else [{"text": name}],
            "split": split,
            "name": name,
            **{column: sample[column] for column in ("concept", "source", "group")},
        }


def main(source: Path, out: Path) -> None:
    tars = sorted(source.glob("*.tar"))
    if not tars:
        raise SystemExit(f"{source}: no .tar files; name the folder of train-*.tar and test-*.tar")
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "metadata.jsonl"
        with open(table, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for tar in tars for row in rows(tar, Path(folder)))
        subprocess.run([sys.executable, "-m", "mlip_cli", "prepare-data", folder, str(out), "--size", "64"], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
