"""What grows with the rows that prepare-data reads: memory of the driver and of a worker, disk, CPU seconds.

    make bench                    or, alone:    python tests/benchmarks/bench_prepare_growth.py

Whole commands on 10 and 100 thousand rows, or on those of MLIP_BENCH_ROWS (10000,1000000), in tars and in parquet. Few
small pictures come again and again, each row with a caption of its own, so that little but the number of rows grows.
Memory is what each process held at most (VmHWM). The disk is looked at five times a second: what OUT took at most, over
what it holds in the end.
"""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from open_clip_peer import write_numbers
from PIL import Image

from mlip_cli.terminal.output import print_lines, print_table

ROWS = [int(n) for n in os.environ.get("MLIP_BENCH_ROWS", "10000,100000").split(",")]
WORKERS, PICTURES, TAR_ROWS = 2, 16, 10_000
ROOT = Path(__file__).resolve().parents[2]


def pictures() -> list[bytes]:
    """JPEGs of 64 x 48, about 1 KB each."""
    random = np.random.default_rng(0)
    made = []
    for _ in range(PICTURES):
        file = io.BytesIO()
        small = random.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((64, 48), Image.Resampling.BICUBIC).save(file, "JPEG")
        made.append(file.getvalue())
    return made


def image(images: list[bytes], row: int) -> bytes:
    """Behind its end a JPEG may hold anything: each row has bytes of its own, and pixels that come again."""
    return images[row % PICTURES] + row.to_bytes(4)


def caption(row: int) -> str:
    return f"picture number {row} of a thing"


def write_tars(folder: Path, num_rows: int) -> None:
    images = pictures()
    for start in range(0, num_rows, TAR_ROWS):
        with tarfile.open(folder / f"{start // TAR_ROWS:05d}.tar", "w") as tar:
            for row in range(start, min(start + TAR_ROWS, num_rows)):
                for ending, content in (("jpg", image(images, row)), ("txt", caption(row).encode())):
                    member = tarfile.TarInfo(f"{row:09d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def write_parquet(folder: Path, num_rows: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = pictures()
    schema = pa.schema([("image", pa.binary()), ("caption", pa.string())])
    with pq.ParquetWriter(folder / "train.parquet", schema) as writer:
        for start in range(0, num_rows, TAR_ROWS):
            rows = range(start, min(start + TAR_ROWS, num_rows))
            columns = {"image": [image(images, row) for row in rows], "caption": [caption(row) for row in rows]}
            writer.write_table(pa.table(columns, schema))


def peak_mib(process: int) -> float:
    """Resident memory at most so far; 0 when the process has ended."""
    with suppress(OSError, IndexError):
        return int(Path(f"/proc/{process}/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    return 0.0


def children(process: int) -> list[int]:
    with suppress(OSError):
        return [int(number) for number in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return []


def disk_mib(folder: Path) -> float:
    """Blocks of all files below a folder that may change meanwhile."""
    blocks = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                blocks += os.lstat(os.path.join(place, name)).st_blocks
    return blocks * 512 / 2**20


def cost(source: Path, out: Path) -> dict[str, float]:
    """One command: peaks in MiB, and seconds."""
    command = [sys.executable, "-m", "mlip_cli", "prepare-data", str(source), str(out), "--workers", str(WORKERS)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    peaks = {"driver_mib": 0.0, "worker_mib": 0.0, "disk_mib": 0.0}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            of_workers = [peak_mib(child) for child in children(process.pid)]
            peaks["driver_mib"] = max(peaks["driver_mib"], peak_mib(process.pid))
            peaks["worker_mib"] = max(peaks["worker_mib"], *of_workers, 0.0)
            peaks["disk_mib"] = max(peaks["disk_mib"], disk_mib(out))

    watcher = threading.Thread(target=watch)
    watcher.start()
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    ended.set()
    watcher.join()
    assert status == 0, said[-2000:].decode()
    seconds = {"cpu_s": used.ru_utime + used.ru_stime, "wall_s": time.perf_counter() - start}
    return peaks | seconds | {"left_mib": disk_mib(out)}


def test_cost_of_preparing_as_rows_grow() -> None:
    layouts: dict[str, Callable[[Path, int], None]] = {"tars": write_tars, "parquet": write_parquet}
    rows, numbers = [], {}
    for name, write in layouts.items():
        for num_rows in ROWS:
            with tempfile.TemporaryDirectory() as temporary:
                source, out = Path(temporary) / "in", Path(temporary) / "out"
                source.mkdir()
                write(source, num_rows)
                numbers[f"{name} {num_rows}"] = found = cost(source, out)
                shutil.rmtree(out)
            memory = [f"{found[key]:.0f}" for key in ("driver_mib", "worker_mib")]
            disk = [f"{found['left_mib']:.0f}", f"{found['disk_mib'] / found['left_mib']:.2f}"]
            a_row = [f"{found['cpu_s']:.0f}", f"{1000 * found['cpu_s'] / num_rows:.2f}"]
            rows.append([name, f"{num_rows:,}", *memory, *disk, *a_row])
    columns = ["source", "rows", "driver MiB", "worker MiB", "OUT MiB", "peak disk / OUT", "CPU s", "CPU ms a row"]
    print_table(columns, rows)
    print_lines(f"{WORKERS} workers, {PICTURES} pictures of 64 x 48 that come again, start-up included")
    write_numbers("cost_of_preparing_as_rows_grow", numbers)


if __name__ == "__main__":
    test_cost_of_preparing_as_rows_grow()
