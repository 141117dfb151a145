"""How many loader processes there are and what each hands over; /dev/shm has room for it, or a line names the cure."""

import glob
import multiprocessing
import os
import re
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from shards_for_tests import make_dataset

from mlip_cli.commands import doctor
from mlip_cli.data import workers as module
from mlip_cli.data.loader import training_loader
from mlip_cli.data.open import open_prepared
from mlip_cli.data.order import Order
from mlip_cli.data.tokenizer import Tokenizer
from mlip_cli.data.workers import Need, check_shared_memory, default_num_workers, samples_at_once
from mlip_cli.errors import RunError
from mlip_cli.files import GIB, MIB
from mlip_cli.recipe.config import Augment, Data, Source
from mlip_cli.terminal.output import start_logging
from mlip_cli.types import Batch


def test_default_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = {0: 32, os.getppid(): 192}
    monkeypatch.setattr(module, "usable_cores", lambda process=0: cores[process])
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert [default_num_workers(world_size) for world_size in (1, 2, 8, 32, 64)] == [31, 15, 3, 0, 0]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_num_workers(64) == 23  # torchrun has 192 cores, and bound each rank to 32 that some of them share
    cores[os.getppid()] = 32
    assert default_num_workers(64) == 3


@pytest.mark.parametrize(
    ("num_samples", "sample_bytes", "expected"),
    [(512, 3 * 224 * 224, 20), (512, 12_288, 256), (8, 12_288, 8), (1, 2**30, 1), (9, 2**30, 1), (22, MIB, 3)],
)
def test_items_are_even_and_small(num_samples: int, sample_bytes: int, expected: int) -> None:
    assert samples_at_once(num_samples, sample_bytes) == expected
    assert expected * sample_bytes <= 3 * MIB or expected == 1


def test_a_node_of_eight_ranks_needs_less_than_a_gib() -> None:
    assert Need(8, 16, module.ITEM_BYTES).num_bytes < 0.81 * GIB
    assert Need(1, 0, module.ITEM_BYTES).num_bytes == 0


def test_too_little_shared_memory_is_one_line_with_place_need_free_and_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_shared_memory", lambda: 64 * MIB)
    with pytest.raises(RunError) as error:
        check_shared_memory(Need(8, 16, 3 * MIB))
    assert str(error.value) == (
        "/dev/shm: batches on their way need up to 0.77 GiB (8 x 16 loader processes x 2 x 3.0 MiB), and 64.0 MiB are "
        "free; docker run --shm-size=2g (or --ipc=host), or data.num_workers=0"
    )
    with pytest.raises(RunError, match=r"up to 99\.0 MiB \(16 loader processes x 2 x 3\.0 MiB\).+data.num_workers=10$"):
        check_shared_memory(Need(1, 16, 3 * MIB))
    check_shared_memory(Need(1, 10, 3 * MIB))
    monkeypatch.setattr(module, "free_shared_memory", lambda: None)  # macOS
    check_shared_memory(Need(8, 16, 3 * MIB))


def test_doctor_counts_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(module, "usable_cores", lambda *_: 136)
    monkeypatch.setattr(doctor, "_num_gpus", lambda: 8)
    found = {}
    for free in (64 * MIB, GIB):
        monkeypatch.setattr(module, "free_shared_memory", lambda free=free: free)
        [found[free]] = doctor.shared_memory()
    need = "a training on this machine needs up to 0.77 GiB (8 x 16 loader processes x 2 x 3.0 MiB)"
    assert found[64 * MIB] == doctor.Check(
        "/dev/shm",
        "warn",
        f"64.0 MiB free, {need}",
        "docker run --shm-size=2g (or --ipc=host), or data.num_workers=0",
    )
    assert found[GIB] == doctor.Check("/dev/shm", "ok", f"1.00 GiB free, {need}")


def loader(folder: Path, *, num_workers: int, by_default: bool = False) -> Iterator[Batch]:
    dataset = open_prepared(folder)
    wanted = None if by_default else num_workers
    return training_loader(
        [dataset],
        Order([dataset.num_samples], None, seed=0, global_batch_size=32),
        data=Data(train=(Source(path="unused"),), augment=Augment(), image_size=224, num_workers=wanted),
        tokenizer=Tokenizer(77),
        steps=range(1000),
        num_workers=num_workers,
    )


def test_a_loader_that_does_not_fit_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_shared_memory", lambda: MIB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    folder = make_dataset(tmp_path / "x")
    with pytest.raises(RunError, match=r"^/dev/shm: .+ need up to 83\.0 MiB \(4 x 2 loader processes x 4 x 2\.3 MiB\)"):
        loader(folder, num_workers=2)
    loader(folder, num_workers=0)


def test_a_number_that_mlip_chose_follows_the_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start_logging()
    monkeypatch.setattr(module, "free_shared_memory", lambda: 13 * MIB)
    folder = make_dataset(tmp_path / "x", n=64)
    with closing(loader(folder, num_workers=16, by_default=True)) as run:  # type: ignore[type-var]
        next(run)
        assert len(multiprocessing.active_children()) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: /dev/shm: 13.0 MiB are free, so each rank starts 1 loader process instead of 16; ")


def handed_over() -> int:
    """Bytes of shared memory that this process and its children hold, mapped or not."""
    sizes: dict[int, int] = {}
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    for process in (str(os.getpid()), *children):
        for file in glob.glob(f"/proc/{process}/fd/*"):
            try:
                if re.match("/dev/shm/torch_", os.readlink(file)):
                    sizes[os.stat(file).st_ino] = os.stat(file).st_blocks * 512
            except OSError:
                pass  # closed meanwhile, or its process has ended
    return sum(sizes.values())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="only Linux shows the files of a process")
def test_loader_processes_stay_within_what_is_checked(tmp_path: Path) -> None:
    """However long the training lets them wait."""
    sample_bytes = 3 * 224 * 224 + 8 * 78
    need = Need(1, 2, samples_at_once(32, sample_bytes) * sample_bytes)
    most = 0
    with closing(loader(make_dataset(tmp_path / "x", size=64), num_workers=2)) as run:  # type: ignore[type-var]
        next(run)
        end = time.monotonic() + 60
        while most < 0.7 * need.num_bytes and time.monotonic() < end:
            most = max(most, handed_over())
        end = time.monotonic() + 1
        while time.monotonic() < end:
            most = max(most, handed_over())
    assert 0.7 * need.num_bytes <= most <= 1.05 * need.num_bytes
