"""OpenCLIP's trainer and ours as a user runs them, on the same tars: what the side-by-side benchmarks share."""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shards_for_tests import make_dataset

from mlip_cli.terminal.output import print_lines

THREADS = int(os.environ.get("MLIP_BENCH_THREADS", max(1, (os.cpu_count() or 2) - 1)))
"""Of the process that trains, for both; the loader process has the core that is left."""

OVERLAY = ("webdataset<=0.2.86", "pandas")
"""What OpenCLIP 3.3's trainer needs and we do not have, or in a later version that it breaks with."""

WIDTH, HEIGHT = 341, 256
WORDS_MEDIAN, WORDS_SPREAD = 10, 0.45
"""Words a caption: log-normal, as those of web pictures are (the mean is 11, one in thirty has more than 23)."""


VOCABULARY = (
    "a",
    "photo",
    "of",
    "the",
    "red",
    "dog",
    "on",
    "green",
    "grass",
    "near",
    "two",
    "small",
    "cats",
    "and",
    "sky",
)


def one_pass(process: subprocess.Popen[str]) -> float:
    """CPU seconds of one pass of a process that makes one for each line `go`, and answers `cpu_s NUMBER`."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("cpu_s "):
            return float(line.split()[1])
    raise AssertionError(f"{process.args}: ended with {process.wait()}")


def write_numbers(name: str, numbers: Any) -> None:
    """Raw numbers as JSON into $MLIP_BENCH_OUT, or a temporary folder."""
    folder = Path(os.environ.get("MLIP_BENCH_OUT") or tempfile.mkdtemp(prefix="mlip-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    print_lines(f"raw numbers: {folder / name}.json")


# data ----------------------------------------------------------------------------------------------------------------


def noise_pictures(n: int) -> list[Image.Image]:
    """Shapes over 1/f noise, the spectrum of photographs, so that they cost a decoder what photographs do."""
    random = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    frequency[0, 0] = 1.0
    pictures = []
    for _ in range(n):
        white = np.fft.rfft2(random.standard_normal((3, HEIGHT, WIDTH)))
        noise = np.fft.irfft2(white / frequency, s=(HEIGHT, WIDTH))
        noise /= noise.std()
        light, colors = noise[:1], noise
        pixels = 128 + 45 * light + 12 * colors
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
        draw = ImageDraw.Draw(picture)
        for _ in range(3):
            x, y, side = random.integers(0, 200), random.integers(0, 180), random.integers(20, 90)
            shape = draw.ellipse if random.random() < 0.5 else draw.rectangle
            shape((x, y, x + side, y + side), fill=tuple(random.integers(0, 256, 3).tolist()))
        pictures.append(picture)
    return pictures


def captions(n: int) -> list[str]:
    """Lengths as those of web pictures; words of one token each."""
    random = np.random.default_rng(1)
    counts = np.exp(random.normal(np.log(WORDS_MEDIAN), WORDS_SPREAD, n)).round().clip(3, 60).astype(int)
    return [" ".join(random.choice(VOCABULARY, count)) for count in counts]


def write_tars(folder: Path, n: int) -> Path:
    """`n` synthetic pictures of 341 x 256 as JPEG, with captions, in 8 tars that both read."""
    pictures = noise_pictures(min(n, 128))
    return make_dataset(folder, n=n, shard_size=-(-n // 8), image_format="jpg", pictures=pictures, captions=captions(n))


def brace_pattern(data: Path) -> str:
    """The tars as OpenCLIP names them."""
    tars = sorted(data.glob("*.tar"))
    prefix = tars[0].name.rpartition("-")[0]
    return f"{data}/{prefix}-{{{0:06d}..{len(tars) - 1:06d}}}.tar"


def overlay(folder: Path) -> Path:
    """A folder for PYTHONPATH with what OpenCLIP's trainer needs; $MLIP_BENCH_OVERLAY names one that is ready."""
    ready = os.environ.get("MLIP_BENCH_OVERLAY")
    if ready:
        return Path(ready)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *OVERLAY]
    subprocess.run(install, check=True, stdout=subprocess.DEVNULL)
    return folder


def peer_environment(overlay: Path | None) -> dict[str, str]:
    """The environment of a process, with the overlay before all else where it is OpenCLIP's."""
    if overlay is None:
        return dict(os.environ)
    path = [str(overlay), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)}


# training ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What both trainers are given."""

    data: Path
    batch_size: int
    precision: str
    """bf16 or fp32, of the forward and the backward pass."""
    steps: int
    workers: int = 1


@dataclass(frozen=True)
class Trainer:
    """A command that trains, and how a line of its words tells of a step."""

    name: str
    command: Sequence[str]
    step_line: re.Pattern[str]
    """Matches the line of a finished step."""
    environment: Mapping[str, str] = field(default_factory=dict)
    wait_share: re.Pattern[str] | None = None
    """Two groups in the line of a step: seconds of waiting for data, and of the step; or one, in per cent."""


@dataclass(frozen=True)
class Trained:
    """One short run."""

    first_step_s: float
    """From the start of the process until its first step is done, less one later step: start-up."""
    step_s: list[float]
    """Between the words of a step and those of the one before, all that happens between them included."""
    first_step_cpu_s: float
    """As `first_step_s`, in CPU seconds of the training process."""
    step_cpu_s: list[float]
    """CPU seconds of the training process, all its threads, in these steps: what a busy machine changes least."""
    wait_share: float
    """Of these steps, as the trainer itself counts it; median."""
    peak_gib: float
    """Resident memory of the training process at most, without loader processes."""


def open_clip(model: str, settings: Settings, folder: Path, *, overlay: Path, extra: Sequence[str] = ()) -> Trainer:
    """`python -m open_clip_train.main`, with its defaults but for what `Settings` says."""
    precision = {"bf16": "amp_bf16", "fp32": "fp32"}[settings.precision]
    options = {
        "model": model,
        "train-data": brace_pattern(settings.data),
        "dataset-type": "webdataset",
        "batch-size": settings.batch_size,
        "precision": precision,
        "workers": settings.workers,
        "device": "cpu",
        "epochs": 1,
        "warmup": 100,
        "lr": 5e-4,
        "wd": 0.2,
        "log-every-n-steps": 1,
        "train-num-samples": settings.batch_size * settings.steps,
        "logs": folder,
        "name": f"{time.monotonic_ns()}",
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return Trainer(
        "OpenCLIP",
        [sys.executable, "-m", "open_clip_train.main", *flags, *extra],
        re.compile(r"Train Epoch: \d+ \["),
        peer_environment(overlay),
        re.compile(r"Data \(t\): ([\d.]+) Batch \(t\): ([\d.]+)"),
    )


def ours(
    name: str, vision: Mapping[str, Any], text: Mapping[str, Any], settings: Settings, folder: Path, *, is_mlip: bool
) -> Trainer:
    """`mlip pretrain`, as CLIP or with the frequency stage, losses and merging of recipes/cc12m.yaml."""
    tree: dict[str, Any] = {
        "data": {
            "train": str(settings.data),
            "num_workers": settings.workers,
            "augment": {"crop_scale": [0.9, 1.0]},  # OpenCLIP's default
        },
        "model": {"embed_dim": text["width"], "vision": vision, "text": text},
        "optim": {"lr": 5e-4, "warmup_steps": 100, "weight_decay": 0.2},
        "train": {
            "steps": settings.steps,
            "global_batch_size": settings.batch_size,
            "precision": settings.precision,
            "device": "cpu",
            "checkpoint_every": {"minutes": None},
        },
        "log": {"every_steps": 1},
    }
    if is_mlip:
        tree["model"]["vision"] = vision | {"pool": "mean"}
        tree["model"]["frequency"] = {"placement": "stem", "depth": 2}
        tree["model"]["merging"] = {"rate": 0.5}
        tree["losses"] = {
            "spatial_words": {"weight": 0.5},
            "frequency_global": {"weight": 0.5},
            "frequency_words": {"weight": 0.25},
        }
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / f"{re.sub('[^a-z]+', '_', name.lower())}.yaml"
    recipe.write_text(json.dumps(tree))  # JSON is YAML
    out = folder / f"{time.monotonic_ns()}"
    return Trainer(
        name,
        [sys.executable, "-m", "mlip_cli", "pretrain", str(recipe), "--out", str(out)],
        re.compile(r"step \d+/\d+  loss"),
        wait_share=re.compile(r"data wait ([\d.]+) %"),
    )


def timed_run(trainer: Trainer, *, warmup_steps: int, steps: int, threads: int = THREADS) -> Trained:
    """Run until `warmup_steps + steps` steps are done, and end it there: what comes after training is not timed."""
    environment = os.environ | dict(trainer.environment) | {"OMP_NUM_THREADS": str(threads), "COLUMNS": "400"}
    started_s = time.perf_counter()
    process = subprocess.Popen(
        trainer.command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    done_s: list[float] = []
    done_cpu_s: list[float] = []
    waits: list[float] = []
    said: list[str] = []
    try:
        for line in process.stdout:
            said.append(line)
            if not trainer.step_line.search(line):
                continue
            done_s.append(time.perf_counter())
            done_cpu_s.append(cpu_s(process.pid))
            if trainer.wait_share and (found := trainer.wait_share.search(line)):
                parts = [float(part) for part in found.groups()]
                waits.append(parts[0] / 100 if len(parts) == 1 else parts[0] / max(parts[1], 1e-9))
            if len(done_s) == warmup_steps + steps:
                break
        assert len(done_s) == warmup_steps + steps, f"{trainer.name} ended early:\n{''.join(said[-40:])}"
        peak_gib = high_water_gib(process.pid)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    step_s = np.diff(done_s[warmup_steps - 1 :]).tolist()
    step_cpu_s = np.diff(done_cpu_s[warmup_steps - 1 :]).tolist()
    return Trained(
        first_step_s=done_s[0] - started_s - statistics.median(step_s),
        step_s=step_s,
        first_step_cpu_s=done_cpu_s[0] - statistics.median(step_cpu_s),
        step_cpu_s=step_cpu_s,
        wait_share=statistics.median(waits[warmup_steps:]),
        peak_gib=peak_gib,
    )


def cpu_s(process: int) -> float:
    """CPU seconds of a process so far; NaN where the system does not tell."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def high_water_gib(process: int) -> float:
    """Resident memory of a process at most; NaN where the system does not tell."""
    try:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    except OSError:
        return float("nan")
    return int(fields["VmHWM"].split()[0]) / 2**20


# comparing -----------------------------------------------------------------------------------------------------------


def median_interval(values: Sequence[float], *, resamples: int = 2000) -> tuple[float, float, float]:
    """Median, and the 2.5 and 97.5 % quantiles of bootstrap medians."""
    found = np.array(values)
    drawn = np.random.default_rng(0).integers(len(found), size=(resamples, len(found)))
    low, high = np.quantile(np.median(found[drawn], axis=1), [0.025, 0.975])
    return float(np.median(found)), float(low), float(high)


def in_words(interval: tuple[float, float, float]) -> str:
    middle, low, high = interval
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"
