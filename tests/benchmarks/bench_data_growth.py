"""What grows with the data: opening the indexes, the first batch, the first batch of a run that goes on, memory.

    make bench                    or, alone:    python tests/benchmarks/bench_data_growth.py

100 thousand, 1 million and 10 million samples in shards of 1,000. The shards are links to one real tar and its index,
so that nothing but their number grows; what a disk adds when it reads 40 bytes a sample for the first time is not in
it. Sizes are taken in turn inside rounds.
"""

import hashlib
import json
import os
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from open_clip_peer import write_numbers
from shards_for_tests import make_dataset

from mlip_cli.data.dataset import ShardDataset
from mlip_cli.data.loader import training_loader
from mlip_cli.data.open import open_prepared
from mlip_cli.data.order import Order
from mlip_cli.data.tokenizer import Tokenizer
from mlip_cli.files import write_json
from mlip_cli.recipe.config import Data, Source
from mlip_cli.terminal.output import print_lines, print_table

SHARD_SIZE, BATCH_SIZE, ROUNDS = 1000, 256, 3
NUM_SHARDS = (100, 1_000, 10_000)


def linked(folder: Path, source: Path, num_shards: int) -> Path:
    """A data set of so many shards, all of them the one shard of `source`."""
    folder.mkdir()
    card = json.loads((source / "dataset.json").read_text())
    (shard,) = card["shards"]
    shards = [shard | {"name": f"train-{number:06d}.tar"} for number in range(num_shards)]
    for line in shards:
        os.link(source / shard["name"], folder / line["name"])
        os.link((source / shard["name"]).with_suffix(".idx"), (folder / line["name"]).with_suffix(".idx"))
    fingerprint = hashlib.sha256(json.dumps(shards).encode()).hexdigest()
    sizes = {"num_samples": num_shards * shard["n"], "fingerprint": fingerprint, "shards": shards}
    write_json(folder / "dataset.json", card | sizes)
    return folder


def resident_mib() -> float:
    """Resident memory of this process now; NaN where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        return float("nan")


def first_batch_s(dataset: ShardDataset, folder: Path, *, start_step: int) -> float:
    """Seconds from the order to a batch that begins there, in this process."""
    start = time.perf_counter()
    order = Order([dataset.num_samples], None, seed=0, global_batch_size=BATCH_SIZE)
    batches = training_loader(
        [dataset],
        order,
        data=Data(train=(Source(path=str(folder)),), image_size=32),
        tokenizer=Tokenizer(77),
        steps=range(start_step, start_step + 1),
        num_workers=0,
    )
    with closing(batches):  # type: ignore[type-var]
        next(batches)
    return time.perf_counter() - start


def costs(folder: Path) -> dict[str, float]:
    before = resident_mib()
    start = time.perf_counter()
    dataset = open_prepared(folder)
    open_s = time.perf_counter() - start
    steps_per_epoch = dataset.num_samples // BATCH_SIZE
    measured = {
        "open_s": open_s,
        "first_batch_s": first_batch_s(dataset, folder, start_step=0),
        "next_epoch_s": first_batch_s(dataset, folder, start_step=steps_per_epoch),
        "resumed_s": first_batch_s(dataset, folder, start_step=7 * steps_per_epoch + 5),
        "mib": resident_mib() - before,
    }
    dataset.close()
    return measured


def test_cost_as_data_grows() -> None:
    found: dict[int, list[dict[str, float]]] = {number: [] for number in NUM_SHARDS}
    with tempfile.TemporaryDirectory() as temporary:
        source = make_dataset(Path(temporary) / "source", n=SHARD_SIZE, shard_size=SHARD_SIZE)
        folders = {number: linked(Path(temporary) / f"{number}", source, number) for number in NUM_SHARDS}
        costs(folders[NUM_SHARDS[0]])  # loads the vocabulary
        for _ in range(ROUNDS):
            for number, folder in folders.items():
                found[number].append(costs(folder))
    rows: list[list[Any]] = []
    for number, rounds in found.items():
        typical = {name: median(one[name] for one in rounds) for name in rounds[0]}
        milliseconds = [f"{1000 * typical[name]:.0f}" for name in ("first_batch_s", "next_epoch_s", "resumed_s")]
        most_mib = max(one["mib"] for one in rounds)  # what a round frees, the next one uses again
        rows.append(
            [f"{number * SHARD_SIZE:,}", f"{number:,}", f"{typical['open_s']:.2f}", *milliseconds, f"{most_mib:.0f}"]
        )
    columns = ["samples", "shards", "open s", "first batch ms", "of the next epoch ms", "resumed in the 8th ms", "MiB"]
    print_table(columns, rows)
    print_lines(f"batches of {BATCH_SIZE} pictures of 32 px, one process, no loader processes")
    write_numbers("cost_as_data_grows", {str(number): rounds for number, rounds in found.items()})


if __name__ == "__main__":
    test_cost_as_data_grows()
