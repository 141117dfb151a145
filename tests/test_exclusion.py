"""Pictures of evaluation sets stay out of training, wherever and in whatever form these sets lie."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from photographs_for_tests import encoded, photographs
from sources_for_tests import prepare, rejects, write_files, write_tar

from mlip_cli.cli import main
from mlip_cli.data.prepare import exclusion
from mlip_cli.data.prepare.duplicates import EVALUATION_ROW
from mlip_cli.data.prepare.evaluation_places import EvaluationPlace
from mlip_cli.data.prepare.exclusion import hash_part, hashed_set
from mlip_cli.errors import UsageError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Six photographs."""
    files: dict[str, bytes | str] = {}
    for i, photograph in enumerate(photographs(6)):
        files[f"{i}.png"], files[f"{i}.txt"] = encoded(photograph), f"photograph {i}"
    return write_files(tmp_path / "in", files)


def evaluation_files() -> dict[str, bytes | str]:
    """Three of them: the same bytes, the same pixels, and a JPEG; a fourth picture, and what is damaged."""
    first, second, third = photographs(6)[:3]
    return {
        "cat/0.png": encoded(first),
        "cat/1.webp": encoded(second, "WEBP", lossless=True),
        "dog/2.jpg": encoded(third, "JPEG", quality=90),
        "dog/3.png": encoded(photographs(1, seed=9)[0]),
    }


NAMES = ("0.png", "1.png", "2.png")
HOW = ("same bytes as cat/0.png row 0", "same pixels as cat/1.webp row 0", "looks the same as dog/2.jpg row 0")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["folder:eval", "imagenet"])
def test_pictures_of_folders(
    name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    root = Path("eval") if name == "folder:eval" else Path("data/imagenet/val")
    folders = {"cat": "cat", "dog": "dog"} if name == "folder:eval" else {"cat": "n02123045", "dog": "n02084071"}
    damaged = {"dog/4.jpg": b"not a picture"}
    for file, content in (evaluation_files() | damaged).items():
        folder, _, own = file.partition("/")
        write_files(root / folders[folder], {own: content})
    with caplog.at_level("INFO", logger="mlip_cli"):
        summary = prepare(source, Path("out"), exclude=(name,))
    how = [re.sub("cat|dog", lambda found: folders[found[0]], words) for words in HOW]
    assert rejects(Path("out")) == [
        (file, 0, f"in evaluation data: {name}", words) for file, words in zip(NAMES, how, strict=True)
    ]
    assert summary["reasons"] == {f"in evaluation data: {name}": 3}
    assert f"{name}: 5 pictures that stay out of training" in caplog.messages
    assert f"{name}: 1 of 5 pictures cannot be decoded, and are known by bytes alone" in caplog.messages
    assert not Path("out/.prepare").exists()


@pytest.mark.slow
def test_pictures_of_prepared_data_are_known_by_their_original_bytes(source: Path, tmp_path: Path) -> None:
    photograph = photographs(6)[4]
    jpeg = encoded(photograph, "JPEG")
    write_files(source, {"9.jpg": jpeg, "9.txt": "a jpeg whose stored pixels are others"})
    prepare(write_files(tmp_path / "eval", {"x.jpg": jpeg, "x.txt": "the same file"}), tmp_path / "prepared", size=64)
    prepare(source, tmp_path / "out", exclude=(f"shards:{tmp_path}/prepared/train",), size=200)
    assert rejects(tmp_path / "out") == [
        ("4.png", 0, f"in evaluation data: shards:{tmp_path}/prepared/train", "looks the same as x.jpg row 0"),
        ("9.jpg", 0, f"in evaluation data: shards:{tmp_path}/prepared/train", "same bytes as x.jpg row 0"),
    ]


@pytest.mark.slow
def test_pictures_of_tars_need_no_captions(source: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "eval" / "0.tar", {"a.png": evaluation_files()["cat/0.png"], "a.cls": "3"})
    name = f"shards:{tmp_path}/eval"
    prepare(source, tmp_path / "out", exclude=(name,))
    assert rejects(tmp_path / "out") == [("0.png", 0, f"in evaluation data: {name}", "same bytes as 0.tar row 0")]


@pytest.mark.slow
def test_a_changed_evaluation_set_is_another_request(source: Path, tmp_path: Path) -> None:
    evaluation = write_files(tmp_path / "eval", {"cat/0.png": encoded(photographs(1)[0])})
    rules = {"exclude": (f"folder:{evaluation}",)}
    summary = prepare(source, tmp_path / "out", **rules)
    assert prepare(source, tmp_path / "out", **rules) == summary
    os.utime(evaluation / "cat" / "0.png", (1, 1))
    with pytest.raises(UsageError) as error:
        prepare(source, tmp_path / "out", **rules)
    assert str(error.value) == (
        f"{tmp_path / 'out'}: was prepared from another source or with other options (evaluation sets of --exclude "
        "have changed since); remove it or name another folder"
    )


def test_hashes_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path / "eval", evaluation_files())
    place = EvaluationPlace("folder:eval", str(tmp_path / "eval"), "1")
    first = hashed_set(place, folder=tmp_path, size=256, num_workers=1)
    assert first.rows.dtype == EVALUATION_ROW
    assert [name.decode() for name in first.rows["name"]] == [f"{file} row 0" for file in sorted(evaluation_files())]
    assert len(set(first.rows["pixels"].tolist())) == 4
    monkeypatch.setattr(exclusion, "hash_part", None)
    assert (hashed_set(place, folder=tmp_path, size=256, num_workers=1).rows == first.rows).all()
    monkeypatch.setattr(exclusion, "hash_part", hash_part)
    other = hashed_set(place, folder=tmp_path, size=32, num_workers=1)
    assert (np.array(other.rows["sha256"]) == np.array(first.rows["sha256"])).all()
    assert not (other.rows["pixels"] == first.rows["pixels"]).any()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("folder:nowhere", "--exclude folder:nowhere: no such folder"),
        ("shards:nowhere", "--exclude shards:nowhere: nowhere: no such file or folder"),
        ("imagenet", "--exclude imagenet: not found; looked for"),
        ("imagnet", "--exclude imagnet: unknown data set 'imagnet'; did you mean imagenet?"),
        ("empty", "--exclude empty: unknown data set 'empty'; for the folder of this name write folder:empty"),
        (
            "nothing",
            "--exclude nothing: no such data set; use imagenet, folder:PATH or shards:PATH, or for splits of the "
            "source validation or test",
        ),
        (
            "digits",
            "--exclude digits: mlip does not find its pictures as files; use imagenet, folder:PATH or shards:PATH, or "
            "for splits of the source validation or test",
        ),
        ("folder:empty", "/empty: the folder is empty; looked for"),
    ],
)
def test_wrong_evaluation_sets_are_named_before_the_work(
    name: str, words: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    with pytest.raises(UsageError, match=re.escape(words)):
        prepare(source, Path("out"), exclude=(name,))
    assert not Path("out").exists()


@pytest.mark.slow
def test_the_command_line_takes_a_preset_rules_and_sets(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path / "eval", evaluation_files())
    command = "mlip prepare-data in out --workers 1 --holdout 0 --clean datacomp_basic --min-words 2 --dedupe near:3"
    monkeypatch.setattr("sys.argv", [*command.split(), "--exclude", "folder:eval,validation"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    said = capsys.readouterr().err
    assert "6 rows: 3 samples, 3 rejects\n  3 x in evaluation data: folder:eval\n" in said
    assert "warning: --exclude validation: the source has no pictures in a validation split of its own\n" in said
    monkeypatch.setattr("sys.argv", ["mlip", "prepare-data", "in", "out", "--dedupe", "near"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "error: --dedupe near: no such way" in capsys.readouterr().err
