"""Pass 2 of prepare-data: killed at any step it goes on to the same bytes, and the disk holds the data about once."""

import io
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs_of_prepare_for_tests import SIZES, at_each_step, counted, disk_bytes, killed_at, limited, run
from sources_for_tests import contents, prepare, rejects, samples, write_files, write_sidecars

from mlip_cli.data.prepare import assemble, plan, shards
from mlip_cli.data.prepare.fates import decided
from mlip_cli.data.prepare.filters import AS_IT_IS
from mlip_cli.data.prepare.part_tables import PartTables
from mlip_cli.data.prepare.plan import Plan
from mlip_cli.data.prepare.reasons import SourceError
from mlip_cli.data.prepare.rejects import rejects_of
from mlip_cli.data.prepare.shards import PART_ROW, shard_bounds
from mlip_cli.data.sources import records
from mlip_cli.errors import RunError

pytestmark = pytest.mark.timeout(600)
SAME_BYTES, SAME_PIXELS = "duplicate: same bytes", "duplicate: same pixels"
HALF = ("in", "out", "--holdout", "0.3", "--workers", "1", "--dedupe", "pixels")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """46 pictures; two are not pictures, three are copies."""
    folder = write_sidecars(tmp_path / "in", 46)
    for i in (7, 30):
        (folder / f"{i:05d}.png").write_bytes(b"broken")
    for i in (11, 12, 45):
        (folder / f"{i:05d}.png").write_bytes((folder / "00003.png").read_bytes())
    return folder


def steps_of(folder: Path) -> Iterator[int]:
    """Numbers of the steps of a whole run at which to kill: 10 drawn ones, and every third of the last 50."""
    code, said = run(folder, *HALF, prelude=counted("out", folder / "steps"))
    assert code == 0, said
    last = int((folder / "steps").read_text())
    assert last > 300
    (folder / "out").rename(folder / "whole")
    yield from sorted(random.Random(17).sample(range(1, last - 50), 10))
    yield from range(last - 50, last + 1, 3)


@pytest.mark.slow
@pytest.mark.usefixtures("source")
def test_a_kill_before_any_step_leaves_what_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    kept = 0
    for step in steps_of(tmp_path):
        code, said = run(tmp_path, *HALF, prelude=killed_at("out", step))
        assert code == -9, (step, said)
        finished = list((tmp_path / "out").rglob("*-0000*.idx"))
        before = {path.name: path.stat().st_ino for path in finished}
        code, said = run(tmp_path, *HALF)
        assert code == 0, (step, said)
        assert contents(tmp_path / "out") == contents(tmp_path / "whole"), step
        assert not (tmp_path / "out" / ".prepare").exists()
        after = {path.name: path.stat().st_ino for path in (tmp_path / "out").rglob("*.idx")}
        assert before.items() <= after.items(), "a finished shard was written again"
        kept += len(before)
        shutil.rmtree(tmp_path / "out")
    assert kept > 100


@pytest.mark.slow
@pytest.mark.usefixtures("source")
def test_kill_after_kill_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """Each run dies a few steps after it began to do something new, so most of pass 2 is done by runs that die."""
    assert run(tmp_path, *HALF)[0] == 0
    (tmp_path / "out").rename(tmp_path / "whole")
    draw, kills = random.Random(3), 0
    while (code := run(tmp_path, *HALF, prelude=killed_at("out", draw.randrange(100, 280)))[0]) == -9:
        kills += 1
    assert code == 0
    assert kills >= 5
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_disk_that_fills_in_pass_2_is_named_and_the_next_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sidecars(tmp_path / "in", 46)
    assert run(tmp_path, *HALF, sizes=(4, 20))[0] == 0
    (tmp_path / "out").rename(tmp_path / "whole")
    code, said = run(tmp_path, *HALF, prelude=limited(30_000), sizes=(4, 20))
    assert code == 1
    assert said.splitlines()[-1] == ("error: out: File too large; make room and run the same command again: it goes on")
    finished = tmp_path / "out" / ".prepare" / "finished"
    assert (finished / "rejects.parquet").exists()
    assert list(finished.rglob(".*")) == []
    assert run(tmp_path, *HALF, sizes=(4, 20))[0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_shard_that_is_not_the_planned_one_is_written_again(tmp_path: Path, source: Path) -> None:
    assert run(tmp_path, *HALF)[0] == 0
    (tmp_path / "out").rename(tmp_path / "whole")
    assert run(tmp_path, *HALF, prelude=killed_at("finished/train/train-000000.idx", 1))[0] == -9
    finished = tmp_path / "out" / ".prepare" / "finished"
    shutil.copy(tmp_path / "whole" / "train" / "train-000000.tar", finished / "train" / "train-000000.tar")
    shutil.copy(tmp_path / "whole" / "train" / "train-000001.idx", finished / "train" / "train-000000.idx")
    (finished / "train" / "train-000099.tar").write_bytes(b"of another plan")
    write_files(finished, {"test/dataset.json": "{}"})
    assert run(tmp_path, *HALF)[0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_part_that_somebody_removed_is_named(tmp_path: Path, source: Path) -> None:
    assert run(tmp_path, *HALF, prelude=killed_at("finished", 1))[0] == -9
    tar = Path("out/.prepare/parts/part-000005.tar")
    (tmp_path / tar).unlink()
    code, said = run(tmp_path, *HALF)
    assert code == 1
    assert said.splitlines()[-1] == (
        f"error: {tar}: is gone, and samples of it are in no shard yet; remove out, start again"
    )


@pytest.mark.slow
def test_a_part_that_changed_is_named_and_not_copied(tmp_path: Path, source: Path) -> None:
    assert run(tmp_path, *HALF, prelude=killed_at("finished", 1))[0] == -9
    tar = Path("out/.prepare/parts/part-000005.tar")
    content = bytearray((tmp_path / tar).read_bytes())
    content[content.index(b"WEBP") + 20] ^= 1
    (tmp_path / tar).write_bytes(content)
    code, said = run(tmp_path, *HALF)
    assert code == 1
    assert said.splitlines()[-1] == (
        f"error: {tar}: changed since it was written; remove out, start again; is the disk sound?"
    )


@pytest.mark.parametrize("content", [None, b"{}\n", b"\xff", b'{"place": "7"}\n', b"[]\n"])
def test_rejects_of_a_part_that_changed_are_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "out/.prepare/parts/part-000005.rejects.jsonl"
    write_files(tmp_path, {} if content is None else {str(path.relative_to(tmp_path)): content})
    with pytest.raises(RunError) as error:
        rejects_of(path.with_name("part-000005.tar"))
    assert str(error.value) == f"{path}: gone, or changed since it was written; remove {tmp_path}/out, start again"


def test_dropped_rows_become_rejects_in_their_place(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "PART_ROWS", 4)
    Image.open(source / "00003.png").save(source / "00012.png", compress_level=0)  # other bytes, the same pixels
    summary = prepare(source, tmp_path / "out", holdout=0.3, dedupe="pixels")
    assert rejects(tmp_path / "out") == [
        ("00007.png", 0, "not a picture", "not JPEG, PNG, WEBP, GIF, BMP or TIFF"),
        ("00011.png", 0, SAME_BYTES, "as 00003.png row 0"),
        ("00012.png", 0, SAME_PIXELS, "as 00003.png row 0"),
        ("00030.png", 0, "not a picture", "not JPEG, PNG, WEBP, GIF, BMP or TIFF"),
        ("00045.png", 0, SAME_BYTES, "as 00003.png row 0"),
    ]
    assert summary["reasons"] == {"not a picture": 2, SAME_BYTES: 2, SAME_PIXELS: 1}
    assert sum(split["num_samples"] for split in summary["splits"].values()) == 41
    prepared = {sample["key"] for split in summary["splits"] for sample in samples(tmp_path / "out", split)}
    assert prepared == {f"{i:09d}" for i in range(46)} - {f"{i:09d}" for i in (7, 11, 12, 30, 45)}


def test_rows_are_in_the_order_of_the_source_whatever_that_of_the_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "PART_ROWS", 4)
    monkeypatch.setattr(shards, "SHARD_SAMPLES", SIZES[1])
    source = write_sidecars(tmp_path / "in", 30)
    for i in (3, 17, 18):
        (source / f"{i:05d}.png").write_bytes(b"broken")
    prepare(source, tmp_path / "whole", holdout=0.3)

    def in_another_order(found: Iterator[records.Record]) -> Iterator[records.SourcePart]:
        for part in reversed(list(parts_of(found))):
            yield replace(part, number=part.number * 3 % 8)

    parts_of = records.parts_of
    monkeypatch.setattr(assemble, "parts_of", in_another_order)
    prepare(source, tmp_path / "other", holdout=0.3)
    assert contents(tmp_path / "other") == contents(tmp_path / "whole")


def noise(seed: int) -> bytes:
    """A JPEG of about 20 kB."""
    pixels = np.random.default_rng(seed).integers(0, 256, (96, 96, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=92)
    return file.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("split_by", ["hash", "source"])
def test_the_disk_holds_the_data_once_and_a_few_shards(tmp_path: Path, split_by: str) -> None:
    """Looked at before each step of the run that changes a file, so the peak is not missed."""
    n = 240
    places = [f"{'val' if split_by == 'source' and i % 3 == 0 else 'train'}/{i:05d}" for i in range(n)]
    files: dict[str, bytes | str] = {f"{place}.jpg": noise(i) for i, place in enumerate(places)}
    write_files(tmp_path / "in", files | {f"{place}.txt": f"noise {i}" for i, place in enumerate(places)})
    peak = os.open(tmp_path / "peak", os.O_RDWR | os.O_CREAT)
    most = 0

    def look(step: int) -> None:
        nonlocal most
        now = disk_bytes(tmp_path / "out")
        if now > most:
            most = now
            os.pwrite(peak, f"{now:12d}".encode(), 0)

    code, said = run(tmp_path, *HALF, prelude=lambda: at_each_step("out", look), sizes=(16, 10))
    assert code == 0, said
    made = list((tmp_path / "out").rglob("*.tar"))
    output, shard = disk_bytes(tmp_path / "out"), max(map(os.path.getsize, made))
    share = int((tmp_path / "peak").read_text()) / output
    print(f"{split_by}: {len(made)} shards, {output / 2**20:.1f} MiB, peak {share:.3f} of it")
    assert len(made) >= 20
    assert share * output <= 1.2 * output + shard


def planned(n: int, *, holdout: float) -> Plan:
    """A plan of `n` rows, drawn."""
    draw = np.random.default_rng(0)
    table = np.zeros(n, PART_ROW)
    table["split"], table["pixels"] = 255, draw.integers(0, 2**64, n, np.uint64)
    blocks = draw.integers(4, 400, n).astype(np.uint32)
    tables = PartTables([Path("tar")] * (n // 500), np.arange(0, n + 1, 500), table["split"], blocks)
    splits = plan.assign_splits(table["pixels"], table["split"], holdout=holdout)
    return Plan(tables, decided(table, AS_IT_IS, []), splits)


def test_shards_are_written_by_their_first_rows_and_each_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_SAMPLES", 300)
    ours = planned(20_000, holdout=0.1)
    written = ours.shards()
    assert sorted(np.concatenate([shard.rows for shard in written]).tolist()) == list(range(20_000))
    last = ours.last_uses(written)
    done = np.zeros(20_000, bool)
    for number, shard in enumerate(written):
        assert done[: shard.rows[0]].all()
        assert (np.diff(shard.rows) > 0).all()
        assert len(shard.rows) <= 300
        done[shard.rows] = True
        for part in range(40):
            assert done[part * 500 : (part + 1) * 500].all() == (last[part] <= number)


@pytest.mark.parametrize("most_bytes", [1, 1_000, 5_000, 10**9])
def test_bounds_of_shards_are_those_of_a_loop(monkeypatch: pytest.MonkeyPatch, most_bytes: int) -> None:
    monkeypatch.setattr(shards, "SHARD_SAMPLES", 7)
    monkeypatch.setattr(shards, "SHARD_BYTES", most_bytes)
    sizes = np.random.default_rng(1).integers(1, 2_000, 100)
    expected, start, total = [], 0, 0
    for number, size in enumerate(sizes.tolist()):
        if number > start and (number - start == 7 or total + size > most_bytes):
            expected.append((start, number))
            start, total = number, 0
        total += size
    assert list(shard_bounds(sizes)) == [*expected, (start, len(sizes))]


def test_a_source_of_which_pass_2_drops_all_is_named_and_nothing_is_kept(tmp_path: Path) -> None:
    source = write_sidecars(tmp_path / "in", 4)
    with pytest.raises(SourceError) as error:
        prepare(source, tmp_path / "out", exclude=(f"folder:{source}",))
    excluded = f"4 x in evaluation data: folder:{source}"
    assert str(error.value) == (f"{source}: none of the 4 rows became a sample: {excluded}; nothing was kept")
    assert not (tmp_path / "out").exists()
