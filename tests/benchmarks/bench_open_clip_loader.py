"""Samples/s per core: our loader against OpenCLIP's own, from the same tars of 341 x 256 JPEGs, 224 px crops.

    make bench                    or, alone:    python tests/benchmarks/bench_open_clip_loader.py

Each loader lives in a process of its own (OpenCLIP's needs another webdataset), makes batches in that process on one
thread, and is told in turn to go through all samples once; ratios of CPU seconds are taken inside rounds. Ours stops at
uint8, since the model normalises on its device; the row `ours, normalised` has that too, on the same core. Aim: 2.4
times OpenCLIP's samples/s.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from open_clip_peer import (
    brace_pattern,
    in_words,
    median_interval,
    one_pass,
    overlay,
    peer_environment,
    write_numbers,
    write_tars,
)

from mlip_cli.terminal.output import print_table

NUM_SAMPLES, BATCH_SIZE, ROUNDS = 1024, 64, 7
LOADERS = {"OpenCLIP": "open_clip", "ours": "ours", "ours, normalised": "ours_normalised"}


# in the processes ----------------------------------------------------------------------------------------------------


def open_clip_epoch(data: Path) -> Callable[[], int]:
    """OpenCLIP's `get_data`, as its trainer calls it."""
    from open_clip import get_tokenizer
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from open_clip_train.data import get_data
    from open_clip_train.params import parse_args

    given = ["--train-data", brace_pattern(data), "--train-num-samples", str(NUM_SAMPLES), "--workers", "0"]
    args = parse_args([*given, "--dataset-type", "webdataset", "--batch-size", str(BATCH_SIZE)])
    args.world_size, args.distributed, args.rank = 1, False, 0
    transforms = [image_transform_v2(PreprocessCfg(size=224), is_train=is_train) for is_train in (True, False)]
    train = get_data(args, transforms, epoch=0, tokenizer=get_tokenizer("ViT-B-32"))["train"]
    epoch = iter(range(1_000_000))

    def run() -> int:
        train.set_epoch(next(epoch))
        return sum(len(images) for images, _ in train.dataloader)

    return run


def our_epoch(data: Path, *, is_normalised: bool) -> Callable[[], int]:
    """Ours, as `mlip pretrain` opens it, with OpenCLIP's crop."""
    import torch
    from models_for_tests import small_model

    from mlip_cli.data.loader import training_loader
    from mlip_cli.data.open import open_prepared
    from mlip_cli.data.order import Order
    from mlip_cli.data.tokenizer import Tokenizer
    from mlip_cli.recipe.config import Augment, Data, Source

    dataset = open_prepared(data)
    order = Order([dataset.num_samples], None, seed=0, global_batch_size=BATCH_SIZE)
    settings = Data(train=(Source(path=str(data)),), augment=Augment(crop_scale=(0.9, 1.0)))
    normalize = small_model(dtype=torch.float32).normalize if is_normalised else lambda images: images
    epoch, steps = iter(range(1_000_000)), NUM_SAMPLES // BATCH_SIZE

    def run() -> int:
        first = next(epoch) * steps
        batches = training_loader(
            [dataset],
            order,
            data=settings,
            tokenizer=Tokenizer(77),
            steps=range(first, first + steps),
            num_workers=0,
        )
        found = 0
        for batch in batches:
            found += len(normalize(batch.images))
        return found

    return run


def serve(name: str, data: Path) -> None:
    """One pass for each line that comes in; its CPU seconds go out."""
    import torch

    torch.set_num_threads(1)
    run = open_clip_epoch(data) if name == "open_clip" else our_epoch(data, is_normalised=name == "ours_normalised")
    for _ in sys.stdin:
        start = time.process_time()
        assert run() == NUM_SAMPLES
        print(f"cpu_s {time.process_time() - start}", flush=True)


# in the benchmark ----------------------------------------------------------------------------------------------------


def started(name: str, data: Path, peer: Path) -> subprocess.Popen[str]:
    environment = peer_environment(peer if name == "open_clip" else None) | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, __file__, name, str(data)], env=environment, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )  # fmt: skip


def test_loader_against_open_clip() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data, peer = write_tars(folder / "data", NUM_SAMPLES), overlay(folder / "overlay")
        processes = {name: started(kind, data, peer) for name, kind in LOADERS.items()}
        try:
            for process in processes.values():
                one_pass(process)  # opens files, loads the vocabulary
            seconds: dict[str, list[float]] = {name: [] for name in processes}
            for number in range(ROUNDS):
                names = list(processes)
                for name in names if number % 2 == 0 else reversed(names):
                    seconds[name].append(one_pass(processes[name]))
        finally:
            for process in processes.values():
                process.kill()
                process.communicate()
    reference = seconds["OpenCLIP"]
    rows = []
    for name, found in seconds.items():
        ratios = [other / own for other, own in zip(reference, found, strict=True)]
        rows.append(
            [
                name,
                f"{NUM_SAMPLES / median(found):.0f}",
                f"{1000 * median(found) / NUM_SAMPLES:.2f}",
                in_words(median_interval(ratios)),
            ]
        )
    print_table(["loader", "samples/s per core", "ms a sample", "x OpenCLIP (95 %)"], rows)
    write_numbers("loader_against_open_clip", {"num_samples": NUM_SAMPLES, "cpu_seconds": seconds})


if __name__ == "__main__":
    if len(sys.argv) > 1:
        serve(sys.argv[1], Path(sys.argv[2]))
    else:
        test_loader_against_open_clip()
