"""Downloads over loopback: `mlip prepare-data` on a table of addresses against img2dataset, equal in concurrency.

    IMG2DATASET_PYTHON=VENV/bin/python make bench      or, alone:    python tests/benchmarks/bench_downloads.py

A server in a process of its own answers each address with one JPEG of about 30 KB. Both take two processes and 128
connections, and store 256 pixels on the short side in tars. Whole commands are run in turn, on 2,000 and on 5,000
addresses; CPU seconds are those of the command and its workers, not of the server. What a picture costs is the
difference of the two runs, so that neither start-up is in it. Loopback has no latency: it shows what the programs
cost, not how they wait. $MLIP_BENCH_ROUNDS are 3 unless said otherwise.
"""

import asyncio
import io
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import numpy as np
from open_clip_peer import in_words, median_interval, write_numbers
from PIL import Image

from mlip_cli.terminal.output import print_lines, print_table

NUM_URLS = (2_000, 5_000)
PROCESSES, CONNECTIONS = 2, 128
ROUNDS = int(os.environ.get("MLIP_BENCH_ROUNDS", "3"))
ROOT = Path(__file__).resolve().parents[2]


def picture() -> bytes:
    """A JPEG of 400 x 300 and about 30 KB."""
    frequency = np.hypot(np.fft.fftfreq(300)[:, None], np.fft.rfftfreq(400)[None])
    frequency[0, 0] = 1.0
    noise = np.fft.irfft2(
        np.fft.rfft2(np.random.default_rng(0).standard_normal((3, 300, 400))) / frequency, s=(300, 400)
    )
    pixels = 128 + 45 * noise[:1] / noise.std() + 12 * noise / noise.std()
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(file, "JPEG", quality=50)
    return file.getvalue()


# in the server's process ---------------------------------------------------------------------------------------------


class Answers(asyncio.Protocol):
    """The same picture for every request; a connection stays open unless the request says close."""

    body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.asked = transport, b""

    def data_received(self, data: bytes) -> None:
        self.asked += data
        while b"\r\n\r\n" in self.asked:
            request, _, self.asked = self.asked.partition(b"\r\n\r\n")
            head = f"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: {len(self.body)}\r\n\r\n"
            self.transport.write(head.encode() + self.body)
            if b"connection: close" in request.lower():
                self.transport.close()


def serve(pipe: Connection) -> None:
    """Serve on a free port of 127.0.0.1, and tell it, until the process is ended."""

    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(Answers, "127.0.0.1", 0, backlog=1024)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    Answers.body = picture()
    asyncio.run(run())


# in the benchmark ----------------------------------------------------------------------------------------------------


def our_command(table: Path, out: Path) -> list[str]:
    columns = ["--image-column", "url", "--caption-column", "caption", "--holdout", "0", "--size", "256"]
    shared = ["--allow-private", "--workers", str(PROCESSES)]
    hosts = ["--connections", str(CONNECTIONS), "--connections-per-host", str(CONNECTIONS)]
    return [sys.executable, "-m", "mlip_cli", "prepare-data", str(table), str(out), *columns, *shared, *hosts]


def their_command(python: str, table: Path, out: Path) -> list[str]:
    options = {
        "url_list": str(table),
        "input_format": "tsv",
        "url_col": "url",
        "caption_col": "caption",
        "output_folder": str(out),
        "output_format": "webdataset",
        "image_size": 256,
        "resize_mode": "keep_ratio",
        "encode_quality": 92,
        "processes_count": PROCESSES,
        "thread_count": CONNECTIONS // PROCESSES,
        "number_sample_per_shard": 500,
    }
    code = f"from img2dataset import download\nif __name__ == '__main__':\n    download(**{options!r})\n"
    script = out.with_suffix(".py")  # its processes are spawned, so they import a file
    script.write_text(code)
    return [python, str(script)]


def cost(command: list[str], out: Path) -> dict[str, float]:
    """CPU and wall seconds of a command with its workers, and the pictures in its tars."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0, f"{command}: {said[-2000:].decode()}"
    wall_s = time.perf_counter() - start
    stored = sum(tar.read_bytes().count(b".jpg\0") for tar in out.rglob("*.tar"))
    shutil.rmtree(out)
    return {"cpu_s": used.ru_utime + used.ru_stime, "wall_s": wall_s, "stored": stored}


def test_downloads_against_img2dataset() -> None:
    peer = os.environ.get("IMG2DATASET_PYTHON")
    if peer is None:
        print_lines("IMG2DATASET_PYTHON names no Python that has img2dataset: ours alone is measured")
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,), daemon=True)
    server.start()
    found: dict[str, dict[int, list[dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), ours.recv()
        tables = {}
        for n in NUM_URLS:
            tables[n] = folder / f"{n}.tsv"
            rows = "".join(f"http://127.0.0.1:{port}/{i}.jpg\ta picture of thing {i}\n" for i in range(n))
            tables[n].write_text(f"url\tcaption\n{rows}")
        for number in range(ROUNDS):
            for n, table in tables.items():
                out = folder / "out"
                commands = {"ours": our_command(table, out)}
                if peer is not None:
                    commands["img2dataset"] = their_command(peer, table, out)
                for side in commands if number % 2 == 0 else reversed(commands):
                    one = cost(commands[side], out)
                    assert one["stored"] == n, f"{side}: {one['stored']} of {n} pictures"
                    found.setdefault(side, {}).setdefault(n, []).append(one)
                    print_lines(f"{side}: {n} addresses, {one['cpu_s']:.1f} CPU s, {one['wall_s']:.1f} s")
    server.kill()
    _show(found)
    write_numbers(
        "downloads_against_img2dataset", {side: {str(n): runs for n, runs in by.items()} for side, by in found.items()}
    )


def _show(found: dict[str, dict[int, list[dict[str, float]]]]) -> None:
    few, many = NUM_URLS
    a_picture = {
        side: [(b["cpu_s"] - a["cpu_s"]) / (many - few) for a, b in zip(runs[few], runs[many], strict=True)]
        for side, runs in found.items()
    }
    rows = []
    for side, runs in found.items():
        ratios = [other / own for other, own in zip(a_picture.get("img2dataset", []), a_picture[side], strict=False)]
        whole = [f"{median(run['cpu_s'] for run in runs[n]):.1f}" for n in NUM_URLS]
        walls = [f"{n / median(run['wall_s'] for run in runs[n]):.0f}" for n in NUM_URLS]
        typical = median(a_picture[side])
        rows.append([side, *whole, f"{1000 * typical:.2f}", f"{1 / typical:.0f}", *walls])
        rows[-1].append(in_words(median_interval(ratios)) if ratios else "")
    sizes = [f"{n:,}" for n in NUM_URLS]
    columns = ["", *(f"CPU s, {n}" for n in sizes), "CPU ms a picture", "pictures/s per core"]
    print_table([*columns, *(f"pictures/s, {n}" for n in sizes), "x img2dataset (95 %)"], rows)


if __name__ == "__main__":
    test_downloads_against_img2dataset()
