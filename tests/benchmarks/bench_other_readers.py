"""Whether other programs read what prepare-data writes with each caption beside its own picture.

    make bench                    or, alone:    python tests/benchmarks/bench_other_readers.py

21,000 rows become three shards of training and one of validation. The loader of OpenCLIP's trainer, `webdataset` and
Hugging Face's `datasets` read the training shards. The number of a row is in its caption, and as six shades of grey in
its picture. The peers are installed into folders of their own (MLIP_BENCH_OVERLAY names one that is ready).
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from open_clip_peer import brace_pattern, overlay, peer_environment
from PIL import Image

from mlip_cli.terminal.output import print_lines, print_table

NUM_ROWS, SIDE, FIELDS = 21_000, 48, 6
"""A picture is 2 x 3 fields, each with one of 8 shades: a digit of the row's number, the lowest first."""
READERS = {"webdataset": "webdataset", "OpenCLIP": "open_clip", "Hugging Face datasets": "hugging_face"}


def picture(number: int) -> Image.Image:
    digits = np.array([number >> 3 * place & 7 for place in range(FIELDS)]).reshape(2, 3)
    shades = (16 + 32 * digits).astype(np.uint8)
    return Image.fromarray(shades.repeat(SIDE // 2, 0).repeat(SIDE // 3, 1)).convert("RGB")


def number_in(pixels: np.ndarray) -> int:
    """The number in a picture: (SIDE, SIDE) grey levels."""
    means = pixels.reshape(2, SIDE // 2, 3, SIDE // 3).mean((1, 3)).ravel()
    digits = ((means - 16) / 32).round().astype(int)
    return sum(int(digit) << 3 * place for place, digit in enumerate(digits))


def make_source(folder: Path) -> Path:
    folder.mkdir()
    lines = ["path,caption"]
    for number in range(NUM_ROWS):
        picture(number).save(folder / f"{number}.jpg", quality=90)
        lines.append(f"{number}.jpg,number {number}")
    table = folder / "table.csv"
    table.write_text("\n".join(lines) + "\n")
    return table


# in the processes that read ------------------------------------------------------------------------------------------

Pairs = Iterable[tuple[int, int]]
"""The number in the caption and that in the picture."""


def grey(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L"), dtype=float)


def by_webdataset(data: Path) -> Pairs:
    import webdataset

    for sample in webdataset.WebDataset(brace_pattern(data), shardshuffle=False).decode("pil"):
        yield int(sample["txt"].split()[-1]), number_in(grey(sample["jpg"]))


def by_open_clip(data: Path) -> Pairs:
    """OpenCLIP's `get_data`, as its trainer calls it."""
    from open_clip import get_tokenizer
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from open_clip_train.data import get_data
    from open_clip_train.params import parse_args

    num_samples = sum(json.loads((data / "sizes.json").read_text()).values())
    given = ["--train-data", brace_pattern(data), "--train-num-samples", str(num_samples), "--workers", "0"]
    args = parse_args([*given, "--dataset-type", "webdataset", "--batch-size", "32"])
    args.world_size, args.distributed, args.rank = 1, False, 0
    transform = image_transform_v2(PreprocessCfg(size=SIDE, mean=(0, 0, 0), std=(1, 1, 1)), is_train=False)
    tokenizer = get_tokenizer("ViT-B-32")
    for images, texts in get_data(args, [transform] * 2, epoch=0, tokenizer=tokenizer)["train"].dataloader:
        for image, text in zip(images, texts, strict=True):
            digits = re.findall(r"\d", tokenizer.decode(text.tolist()))
            yield int("".join(digits)), number_in(255 * image.mean(0).numpy())


def by_hugging_face(data: Path) -> Pairs:
    from datasets import load_dataset

    files = sorted(map(str, data.glob("*.tar")))
    for sample in load_dataset("webdataset", data_files={"train": files}, split="train", streaming=True):
        yield int(sample["txt"].split()[-1]), number_in(grey(sample["jpg"]))


def read(name: str, data: Path) -> None:
    """Print what was read: pairs, different ones, and pairs that do not belong together."""
    pairs = list({"webdataset": by_webdataset, "open_clip": by_open_clip, "hugging_face": by_hugging_face}[name](data))
    wrong = [pair for pair in pairs if pair[0] != pair[1]]
    print(json.dumps({"pairs": len(pairs), "distinct": len(set(pairs)), "wrong": wrong[:5]}))


# in the benchmark ----------------------------------------------------------------------------------------------------


def installed(folder: Path) -> Path:
    """`datasets`, with what it needs, apart from our own packages."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), "datasets"]
    subprocess.run(install, check=True, stdout=subprocess.DEVNULL)
    return folder


def test_other_readers_keep_pairs_together() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        table, out = make_source(folder / "in"), folder / "out"
        prepare = [sys.executable, "-m", "mlip_cli", "prepare-data", str(table), str(out), "--holdout", "0.01"]
        subprocess.run(prepare, check=True)
        train = out / "train"
        sizes = json.loads((train / "sizes.json").read_text())
        overlays = {"open_clip": overlay(folder / "open_clip"), "hugging_face": installed(folder / "hugging_face")}
        rows = []
        for label, name in READERS.items():
            command = [sys.executable, __file__, name, str(train)]
            environment = peer_environment(overlays.get(name))
            said = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
            found = json.loads(said.splitlines()[-1])
            rows.append([label, f"{found['pairs']:,}", f"{found['distinct']:,}", str(len(found["wrong"]))])
            assert not found["wrong"], (label, found)
        print_table(["reader", "pairs read", "distinct", "wrong"], rows)
        print_lines(
            f"{sum(sizes.values()):,} samples in {len(sizes)} shards; OpenCLIP's loader leaves out or repeats some"
        )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        read(sys.argv[1], Path(sys.argv[2]))
    else:
        test_other_readers_keep_pairs_together()
