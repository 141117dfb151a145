"""Vectors in files: every search finds what brute force finds, whatever lies in the files."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mlip_cli.evaluate import vector_files as module
from mlip_cli.evaluate.vector_files import DamagedVectorsError, VectorFiles

DIM = 24


def vectors(n: int, seed: int = 0, spread: float = 1.0) -> NDArray[np.float32]:
    """Unit vectors; a small spread puts them near each other, so that cosines differ late."""
    random = np.random.default_rng(seed)
    own = random.standard_normal(DIM) + spread * random.standard_normal((n, DIM))
    return (own / np.linalg.norm(own, axis=1, keepdims=True)).astype(np.float32)


def keys(n: int, seed: int = 0) -> NDArray[np.uint64]:
    return np.random.default_rng(seed).permutation(10 * n)[:n].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def brute_force(queries: NDArray[np.float32], own: NDArray[np.float32], k: int) -> list[list[int]]:
    """In fp64; of equal cosines the earlier picture comes first."""
    cosines = queries.astype(np.float64) @ own.astype(np.float64).T
    return [np.argsort(-row, kind="stable")[:k].tolist() for row in cosines]


def opened(folder: Path) -> VectorFiles:
    files = VectorFiles(folder, DIM)
    files.open()
    return files


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4, 0.0])
@pytest.mark.parametrize("n", [1, 7, 5_000])
def test_recall_is_one_against_brute_force(
    n: int, spread: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", 256)
    own, names, queries = vectors(n, spread=spread), keys(n), np.concatenate([vectors(3, seed=0), vectors(4, seed=9)])
    files = opened(tmp_path)
    for part in np.array_split(np.random.default_rng(1).permutation(n), 5):
        if len(part):
            files.add(names[part], own[part])
    found = opened(tmp_path).search(queries, names, k=10)
    expected = brute_force(queries, own, 10)
    exact = queries.astype(np.float64) @ own.astype(np.float64).T
    for nearest, best, cosines in zip(found, expected, exact, strict=True):
        assert nearest.cosines == pytest.approx(cosines[best], abs=1e-15)
        if spread > 0:
            assert nearest.items.tolist() == best


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rows_of_other_pictures_and_double_rows_do_not_matter(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    own, names = vectors(60), keys(60)
    files = opened(tmp_path_factory.mktemp("vectors"))
    held: set[int] = set()
    for _ in range(data.draw(st.integers(1, 5))):
        part = np.array(data.draw(st.lists(st.integers(0, 59), min_size=1, max_size=40, unique=True)))
        files.add(names[part], own[part])
        held |= set(part.tolist())
    wanted = np.array(data.draw(st.lists(st.integers(0, 59), min_size=1, max_size=60, unique=True)))
    files = opened(files.folder)
    there = [place for place, row in enumerate(wanted.tolist()) if row in held]
    assert files.missing(names[wanted]).tolist() == [
        place for place, row in enumerate(wanted.tolist()) if row not in held
    ]
    queries = vectors(2, seed=5)
    for _ in range(2):  # before and after tidying
        found = files.search(queries, names[wanted], k=4)
        for nearest, best in zip(found, brute_force(queries, own[wanted[there]], 4), strict=True):
            assert nearest.items.tolist() == [there[place] for place in best]
        files.tidy(names[wanted])


def test_many_files_and_stale_rows_become_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_FILES", 3)
    own, names, files = vectors(40), keys(40), opened(tmp_path)
    for start in range(0, 40, 10):
        files.add(names[start : start + 10], own[start : start + 10])
    files.tidy(names)
    assert len(list(tmp_path.iterdir())) == 1
    assert len(files.missing(names)) == 0
    files.tidy(names[:19])
    [file] = tmp_path.iterdir()
    assert file.stat().st_size == 64 + 19 * (8 + 4 * DIM)
    assert len(opened(tmp_path).missing(names)) == 21


@pytest.mark.parametrize("at", [0, 9, 13, 17, 22, 70, 64 + 8 * 30, -1])
def test_every_flipped_byte_is_seen(at: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened(tmp_path).add(keys(30), vectors(30))
    [file] = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[at] ^= 4
    file.write_bytes(content)
    with caplog.at_level("WARNING", logger="mlip_cli"):
        assert len(opened(tmp_path).missing(keys(30))) == 30
    assert not list(tmp_path.iterdir())
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("size", [0, 10, 63, 64, 500])
def test_a_file_that_was_cut_is_seen(size: int, tmp_path: Path) -> None:
    opened(tmp_path).add(keys(30), vectors(30))
    [file] = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:size])
    assert len(opened(tmp_path).missing(keys(30))) == 30


@pytest.mark.parametrize("value", [np.nan, np.inf, 9000.0])
def test_vectors_without_a_checked_sum_show_damage_by_their_cosines(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHECKED_BYTES", 0)
    opened(tmp_path).add(keys(30), vectors(30))
    [file] = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[-4:] = np.float32(value).tobytes()
    file.write_bytes(content)
    files = opened(tmp_path)
    with pytest.raises(DamagedVectorsError, match=r"a cosine is not in \[-1, 1\]"):
        files.search(vectors(1, seed=3), keys(30), k=3)
    assert len(files.missing(keys(30))) == 30
    assert not file.exists()


def _add_and_tidy(folder: Path, number: int) -> None:
    module.MOST_FILES = 2
    own, names = vectors(400), keys(400)
    for start in range(0, 400, 50):
        files = opened(folder)
        part = np.roll(np.arange(400), 100 * number)[start : start + 50]
        files.add(names[part], own[part])
        files.tidy(names)


@pytest.mark.slow
def test_processes_that_write_and_tidy_at_once_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=_add_and_tidy, args=(tmp_path, number)) for number in range(3)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    files = opened(tmp_path)
    assert len(files.missing(keys(400))) == 0
    queries = vectors(3, seed=8)
    found = files.search(queries, keys(400), k=20)
    assert [own.items.tolist() for own in found] == brute_force(queries, vectors(400), 20)


def test_no_pictures_and_no_files(tmp_path: Path) -> None:
    files = opened(tmp_path / "nowhere")
    assert len(files.missing(keys(3))) == 3
    [nearest] = files.search(vectors(1), keys(3), k=2)
    assert len(nearest.items) == 0
    files.tidy(keys(3))
