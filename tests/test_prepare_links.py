"""Links in the output folder of prepare-data: nothing is written or deleted through them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_for_tests import mlip
from sources_for_tests import contents, prepare, write_sidecars

from mlip_cli.data.prepare.locks import opened
from mlip_cli.data.prepare.workspace import Workspace, refuse_links
from mlip_cli.errors import UsageError

LINKS = (
    ".prepare",
    ".prepare/parts",
    ".prepare/parts/part-000000.tar",
    ".prepare/parts/.part-000001.tar.7.tmp",
    ".prepare/request.json",
    ".prepare/lock",
    ".prepare/finished",
    ".prepare/finished/train",
    "train",
    "rejects.parquet",
    "prepared.json",
    ".prepared.json.7.tmp",
)
"""Places in OUT that prepare-data writes, renames or deletes."""


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("place", LINKS)
@pytest.mark.parametrize("kind", ["folder", "file", "nothing"])
def test_a_link_in_the_output_folder_is_refused_and_what_it_leads_to_stays(
    tmp_path: Path, place: str, kind: str
) -> None:
    source, out, theirs = write_sidecars(tmp_path / "in", 3), tmp_path / "out", tmp_path / "theirs"
    prepare(source, tmp_path / "first")
    request = json.loads((tmp_path / "first" / "prepared.json").read_text())["request"]
    with opened(out, request):  # half prepared
        pass
    (theirs / "parts").mkdir(parents=True)
    (theirs / "request.json").write_text(json.dumps(request))
    (theirs / "parts" / "part-000000.json").write_text("{}")
    target = {"folder": theirs, "file": theirs / "request.json", "nothing": tmp_path / "nothing"}[kind]
    before = snapshot(theirs)
    link = out / place
    if link.is_dir():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(target)
    done = mlip("prepare-data", "in", "out", "--holdout", "0", folder=tmp_path)
    if (place, kind) == ("prepared.json", "file"):  # it is read, and is not ours
        assert done.stderr == "error: out/prepared.json: not written by mlip prepare-data; name another folder\n"
    else:
        assert done.stderr.splitlines()[-1] == (
            f"error: out/{place}: a link, which could lead out of out; remove it, or name another folder"
        )
    assert done.returncode == 2
    assert snapshot(theirs) == before
    assert link.is_symlink()
    assert not (tmp_path / "nothing").exists()


def test_the_output_folder_itself_may_be_a_link_to_a_folder(tmp_path: Path) -> None:
    source = write_sidecars(tmp_path / "in", 3)
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    prepare(source, tmp_path / "out")
    prepare(source, tmp_path / "plain")
    assert contents(tmp_path / "disk") == contents(tmp_path / "plain")
    prepare(source, tmp_path / "out")  # says that nothing is to do
    (tmp_path / "gone").symlink_to("nothing")
    with pytest.raises(UsageError) as error:
        prepare(source, tmp_path / "gone")
    assert str(error.value) == (
        f"OUT {tmp_path / 'gone'}: {tmp_path / 'gone'} is a link to nothing; make the folder that it names, or remove "
        "the link"
    )


def test_a_source_without_a_sample_leaves_the_link_that_is_the_output_folder(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    with opened(tmp_path / "out", {"source_fingerprint": "a"}):
        pass
    Workspace(tmp_path / "out").discard()
    assert (tmp_path / "out").is_symlink()
    assert list((tmp_path / "disk").iterdir()) == []


def test_a_name_with_bytes_that_are_no_text_is_shown_escaped(tmp_path: Path) -> None:
    (tmp_path / "out\udcff").mkdir()
    (tmp_path / "out\udcff" / "train").symlink_to("x")
    with pytest.raises(UsageError, match=r"out\\udcff/train: a link"):
        refuse_links(tmp_path / "out\udcff")


@pytest.mark.parametrize("content", [b"", b'{"size": ', b"[1]", b"null", b"\xff"])
@pytest.mark.parametrize("name", ["request.json", "parts/part-000000.json"])
def test_a_damaged_journal_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    write_sidecars(tmp_path / "in", 3)
    prepare(tmp_path / "in", tmp_path / "first")
    request = json.loads((tmp_path / "first" / "prepared.json").read_text())["request"]
    with opened(tmp_path / "out", request):
        pass
    path = tmp_path / "out" / ".prepare" / name
    path.write_bytes(content)
    done = mlip("prepare-data", "in", "out", "--holdout", "0", folder=tmp_path)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: out/.prepare/{name}: damaged (")
    assert last.endswith("; remove out and prepare it again")


@pytest.mark.parametrize(
    "edit",
    [
        {"rows": "3"},
        {"rows": -3},
        {"reasons": []},
        {"reasons": {"x": "y"}},
        {"number": 1},
        {"tar": "../x.tar"},
        {"a": 1},
    ],
)
def test_a_part_that_was_edited_is_named(tmp_path: Path, edit: dict[str, Any]) -> None:
    write_sidecars(tmp_path / "in", 3)
    words = ("prepare-data", "in", "out", "--holdout", "0", "--workers", "1")
    assert mlip(*words, "--part", "1/1", folder=tmp_path).returncode == 0
    path = tmp_path / "out" / ".prepare" / "parts" / "part-000000.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    done = mlip(*words, "--finish", folder=tmp_path)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2,
        "error: out/.prepare/parts/part-000000.json: damaged (it does not describe this part); remove out and prepare "
        "it again",
    )
