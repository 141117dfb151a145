"""What people hand over is read right, or refused in one line: random sources, whole and damaged."""

import contextlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from borders_for_tests import (
    CAPTION,
    FORMATS,
    Files,
    class_trees,
    damaged,
    is_wrong,
    number_of,
    object_tables,
    outcome_of,
    sidecars,
    tables,
    tars,
    training_pairs,
)
from hypothesis import HealthCheck, given, settings
from sources_for_tests import prepare, rejects, samples, write_files

from mlip_cli.evaluate.datasets.find import find_benchmark
from mlip_cli.evaluate.datasets.open import open_benchmark

SOURCES = {
    "tables": tables(),
    "objects": object_tables(),
    "sidecars": sidecars(),
    "classes": class_trees(),
    "tars": tars(),
}
FEW = settings(max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@contextlib.contextmanager
def written(files: Files) -> Iterator[Path]:
    """A folder with these files, beside room for what becomes of them."""
    with tempfile.TemporaryDirectory() as folder:
        yield write_files(Path(folder) / "in", files)


def check_damaged(files: Files) -> None:
    """Prepare the files; read them as they are too, where they are tars or class folders.

    No caption is another picture's, every row becomes a sample, a caption or a reject, and errors are one line.
    """
    with written(files) as source, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        out = source.parent / "out"
        summary = outcome_of(lambda: prepare(source, out, size=16))
        prepared = None
        if not isinstance(summary, Exception):
            found = [sample for split in summary["splits"] for sample in samples(out, split)]
            prepared = [(sample["image"], caption["text"]) for sample in found for caption in sample["captions"]]
            check_pairs(prepared)
            check_counts(summary, found, out)
        if any(name.endswith(".tar") for name in files):
            check_tars(source, prepared)
        if isinstance(summary, dict) and summary["request"]["format"] == "classes":
            check_classes(source)


def check_pairs(pairs: list[tuple[bytes, str]]) -> None:
    wrong = [(number_of(image), caption) for image, caption in pairs if is_wrong(image, caption)]
    assert not wrong, f"(picture, caption of another one): {wrong}"


def check_counts(summary: dict, found: list[dict], out: Path) -> None:
    """Pictures in are samples and rejects out, as the summary says and as they lie on the disk."""
    assert sum(split["num_samples"] for split in summary["splits"].values()) == len(found)
    assert len(rejects(out)) == summary["rejects"]
    assert summary["pictures"] == len(found) + summary["rejects"] <= summary["rows"]


def check_tars(source: Path, prepared: list[tuple[bytes, str]] | None) -> None:
    """Training on the tars as they are reads the pairs that prepare-data makes of them."""
    pairs = outcome_of(lambda: training_pairs(source, source.parent / "cache"))
    if isinstance(pairs, Exception):
        return
    pairs = [(image, caption) for image, caption in pairs if _is_whole(image)]  # training names the others
    check_pairs(pairs)
    if prepared is not None:
        trained = {(number_of(image), caption) for image, caption in pairs}
        assert trained == {(number_of(image), caption) for image, caption in prepared}


def _is_whole(image: bytes) -> bool:
    with contextlib.suppress(Exception):
        return number_of(image) >= 0
    return False


def check_classes(source: Path) -> None:
    """`folder:` has for each picture the class that is its number."""
    pictures = outcome_of(lambda: open_benchmark(find_benchmark(f"folder:{source}")))
    if isinstance(pictures, Exception):
        return
    for path, label in pictures.items:
        assert not _is_whole(path.read_bytes()) or not is_wrong(path.read_bytes(), pictures.class_names[label])


@pytest.mark.parametrize("kind", SOURCES)
def test_a_whole_source_of_any_kind_is_read_whole(kind: str) -> None:
    @FEW
    @given(SOURCES[kind])
    def whole(files: Files) -> None:
        check_whole(files)

    whole()


def check_whole(files: Files) -> None:
    """Every picture becomes a sample, and its first caption is its number."""
    with written(files) as source, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        summary = outcome_of(lambda: prepare(source, source.parent / "out", size=16))
        if isinstance(summary, Exception):
            assert_asked(files, str(summary))
            return
        found = [sample for split in summary["splits"] for sample in samples(source.parent / "out", split)]
        for sample in found:
            for caption in sample["captions"]:
                assert CAPTION.fullmatch(caption["text"]), caption
                assert not is_wrong(sample["image"], caption["text"])
        assert summary["rejects"] == 0, summary
        assert len(found) == (sum(Path(name).suffix[1:] in FORMATS for name in files) or len(found))


def assert_asked(files: Files, message: str) -> None:
    """A whole source may be refused only where nobody could know what is meant: then an option is named."""
    is_one_class = len(files) == 1 or len({Path(name).parent for name in files}) == 1
    assert "--" in message or (is_one_class and "several classes" in message), message


@pytest.mark.parametrize("kind", SOURCES)
def test_a_damaged_source_never_pairs_a_picture_with_the_caption_of_another(kind: str) -> None:
    @FEW
    @given(damaged(SOURCES[kind]))
    def damage(files: Files) -> None:
        check_damaged(files)

    damage()
