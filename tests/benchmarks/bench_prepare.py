"""Pictures/s per core of prepare-data: its parts against img2dataset's resizer and writer, from the same local JPEGs.

    IMG2DATASET_PYTHON=VENV/bin/python make bench      or, alone:    python tests/benchmarks/bench_prepare.py

VENV has img2dataset 1.47 (pip install img2dataset). Both make pictures of 256 pixels on the short side and JPEG
quality 92 and write them to a tar with their fields; ours reads its tar again. Ours resizes by bicubic with antialias,
img2dataset by its default, area. Each has a process of its own and does one pass over the pictures in turn; ratios of
CPU seconds are taken inside rounds. The pictures are made here: 1/f noise, as in photographs, with a little grain. A
folder of real JPEGs is taken instead where MLIP_BENCH_PICTURES names it. Aim: twice img2dataset's pictures/s.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from open_clip_peer import in_words, median_interval, one_pass, write_numbers
from PIL import Image

from mlip_cli.terminal.output import print_lines, print_table

PEER = Path(__file__).with_name("img2dataset_peer.py")
SIZE, ROUNDS = 256, 5
PHOTOGRAPHS = {(640, 480): 60, (1024, 768): 30, (2000, 1500): 12}
"""Width and height -> how many pictures; as a phone's or a shop's page has them."""
DISTINCT = 6
CAPTION = "a photo of the red dog on green grass near two small cats"


def make_photographs(folder: Path, width: int, height: int, n: int) -> None:
    """`n` JPEGs of quality 85: noise that falls with the frequency, and grain of 1.5 levels."""
    folder.mkdir()
    random = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1.0
    made = []
    for _ in range(min(n, DISTINCT)):
        white = np.fft.rfft2(random.standard_normal((3, height, width)))
        noise = np.fft.irfft2(white / frequency**1.2, s=(height, width))
        noise /= noise.std()
        pixels = 128 + 45 * noise[:1] + 12 * noise + random.normal(0, 1.5, (1, height, width))
        made.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)))
    for number in range(n):
        made[number % len(made)].save(folder / f"{number:04d}.jpg", quality=85)


# in our process ------------------------------------------------------------------------------------------------------


def serve(folder: Path, out: Path) -> None:
    """One pass for each line that comes in; its CPU seconds go out."""
    from mlip_cli.data.prepare.parts import prepare_part
    from mlip_cli.data.prepare.workspace import PartOptions
    from mlip_cli.data.sources.records import Caption, PicturePlace, Record, SourcePart

    paths = sorted(folder.glob("*.jpg"))
    records = tuple(
        Record(path.name, number, PicturePlace(str(path)), (Caption(CAPTION),)) for number, path in enumerate(paths)
    )
    for _ in sys.stdin:
        start = time.process_time()
        result = prepare_part(SourcePart(0, 0, records), PartOptions(str(out), SIZE))
        assert not result.reasons, result.reasons
        print(f"cpu_s {time.process_time() - start}", flush=True)


# in the benchmark ----------------------------------------------------------------------------------------------------


def started(command: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )


def measured(commands: dict[str, list[str]]) -> dict[str, list[float]]:
    """CPU seconds of each round, the two sides in turn."""
    processes = {name: started(command) for name, command in commands.items()}
    try:
        for process in processes.values():
            one_pass(process)  # imports, and files into the page cache
        seconds: dict[str, list[float]] = {name: [] for name in processes}
        for number in range(ROUNDS):
            names = list(processes)
            for name in names if number % 2 == 0 else reversed(names):
                seconds[name].append(one_pass(processes[name]))
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()
    return seconds


def picture_folders(temporary: Path) -> dict[str, Path]:
    """What to measure by name: folders of JPEGs."""
    if given := os.environ.get("MLIP_BENCH_PICTURES"):
        return {given: Path(given)}
    folders = {f"{width} x {height}": temporary / f"{width}" for width, height in PHOTOGRAPHS}
    for ((width, height), n), folder in zip(PHOTOGRAPHS.items(), folders.values(), strict=True):
        make_photographs(folder, width, height, n)
    return folders


def test_parts_against_img2dataset() -> None:
    peer = os.environ.get("IMG2DATASET_PYTHON")
    if peer is None:
        print_lines("IMG2DATASET_PYTHON names no Python that has img2dataset: ours alone is measured")
    rows, numbers = [], {}
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        (temporary / "ours").mkdir()
        (temporary / "theirs").mkdir()
        for label, folder in picture_folders(temporary).items():
            sizes = [path.stat().st_size for path in folder.glob("*.jpg")]
            commands = {"ours": [sys.executable, __file__, str(folder), str(temporary / "ours")]}
            if peer is not None:
                commands["img2dataset"] = [peer, str(PEER), str(folder), str(temporary / "theirs"), str(SIZE), "92"]
            seconds = measured(commands)
            numbers[label] = {"num_pictures": len(sizes), "mean_bytes": sum(sizes) / len(sizes), "cpu_s": seconds}
            per_s = {side: len(sizes) / median(found) for side, found in seconds.items()}
            row = [label, f"{sum(sizes) / len(sizes) / 1024:.0f}", f"{per_s['ours']:.0f}"]
            if peer is not None:
                ratios = [theirs / own for own, theirs in zip(seconds["ours"], seconds["img2dataset"], strict=True)]
                row += [f"{per_s['img2dataset']:.0f}", in_words(median_interval(ratios))]
            rows.append(row)
    columns = ["pictures", "KiB", "ours/s per core", "img2dataset/s per core", "x img2dataset (95 %)"]
    print_table(columns if peer is not None else columns[:3], rows)
    write_numbers("prepare_against_img2dataset", numbers)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        serve(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        test_parts_against_img2dataset()
