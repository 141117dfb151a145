"""Pictures with names and tags become the ablation's data: ablation.prepare SOURCE OUT.

SOURCE holds tars named train-*.tar and test-*.tar; a sample is a picture and KEY.json with `caption` (its name),
`tags`, `concept`, `source` and `group`. OUT gets train/, train_half/ (half of its pairs), validation/ and test/. The
last two hold the pictures of three questions, which questions.py defines; `questions` in a sample's meta names its own.
Captions of train/ are the name with 0 to 3 of its tags, drawn here once; those of the others the name alone.
"""

import json
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ablation.questions import draw, questions_of, split_of, training_of

from mlip_cli.data.tokenizer import Tokenizer

DRAWS = 24
"""Captions drawn for a training picture; equal ones become one of a larger weight."""

MOST_TAGS = 3
CONTEXT_LENGTH = 77
FIELDS = ("caption", "tags", "concept", "source", "group")
PICTURES = (".webp", ".png", ".jpg", ".jpeg")


def training_captions(name: str, tags: list[str], key: str) -> list[dict[str, Any]]:
    """`name` or `name: tag, tag`: the number of tags uniform in 0 to 3 (as far as there are), which ones at random."""
    draws = random.Random(key)
    counts: Counter[str] = Counter()
    for _ in range(DRAWS):
        drawn = draws.sample(tags, draws.randint(0, min(MOST_TAGS, len(tags))))
        counts[f"{name}: {', '.join(drawn)}" if drawn else name] += 1
    return [{"text": text, "weight": float(count)} for text, count in counts.items()]


def read_samples(tar: Path, pictures: Path) -> Iterator[dict[str, Any]]:
    """The samples of a tar with `key`, `image`, `name` and `split`; pictures are written as files of their own."""
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
        split = split_of(sample["concept"], sample["source"], is_test=tar.name.startswith("test"))
        yield sample | {"key": key, "image": names[key], "name": sample["caption"], "split": split}


def rows(samples: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows of the table that `mlip prepare-data` reads; pictures of no question are left out."""
    tokens_of = token_reader()
    training = training_of([one for one in samples if one["split"] == "train"], tokens_of)
    for one in samples:
        row = {key: one[key] for key in ("image", "split", "name", "concept", "source", "group")}
        if one["split"] == "train":
            yield row | {"captions": training_captions(one["name"], one["tags"], one["key"])}
        elif one["split"] != "none" and (questions := questions_of(one, training, tokens_of)):
            tags = sorted(set(one["tags"]) & set(training.tags)) if "tags" in questions else []
            yield row | {
                "captions": [{"text": one["name"]}],
                "questions": " ".join(questions),
                "tags": ", ".join(tags),
            }


def token_reader() -> Callable[[str], Iterable[int]]:
    """CLIP's tokens of a text, without the two that begin and end every text."""
    tokenizer = Tokenizer(CONTEXT_LENGTH)

    def tokens_of(text: str) -> Iterable[int]:
        return tokenizer.encode([text], length=tokenizer.count(text))[0, 1:-1].tolist()

    return tokens_of


def prepare(table: Sequence[dict[str, Any]], pictures: Path, out: Path, *options: str) -> None:
    """Have `mlip prepare-data` write a table's splits."""
    with open(pictures / "metadata.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in table)
    command = [sys.executable, "-m", "mlip_cli", "prepare-data", str(pictures), str(out), "--size", "64", *options]
    subprocess.run(command, check=True)


def main(source: Path, out: Path) -> None:
    tars = sorted(source.glob("*.tar"))
    if not tars:
        raise SystemExit(f"{source}: no .tar files; name the folder of train-*.tar and test-*.tar")
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "pictures"
        pictures.mkdir()
        table = list(rows([sample for tar in tars for sample in read_samples(tar, pictures)]))
        half = [row for row in table if row["split"] == "train" and draw(f"half {row['image']}") < 0.5]
        prepare(half, pictures, Path(folder) / "half", "--holdout", "0")
        prepare(table, pictures, out)
        shutil.move(Path(folder) / "half" / "train", out / "train_half")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
