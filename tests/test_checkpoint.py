"""Checkpoint folders: whole or absent, the right ones kept, damage named with what to do."""

import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mlip_cli.errors import RunError, UsageError
from mlip_cli.runs import checkpoint
from mlip_cli.runs.checkpoint import load_state, load_weights, remove_leftovers, remove_old_checkpoints, save_checkpoint


def save(folder: Path, *steps: int) -> None:
    for step in steps:
        save_checkpoint(folder, step=step, weights={"a": torch.ones(3) * step}, state={"step": step})


def test_a_checkpoint_comes_back_and_replaces_one_of_its_step(tmp_path: Path) -> None:
    save(tmp_path, 5, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000005"]
    assert torch.equal(load_weights(tmp_path / "step_0000005")["a"], torch.full((3,), 5.0))
    assert load_state(tmp_path / "step_0000005") == {"step": 5}


def test_the_newest_the_named_and_foreign_folders_stay(tmp_path: Path) -> None:
    save(tmp_path, 5, 10, 15, 20, 25)
    (tmp_path / "step_0000005.bak").mkdir()
    (tmp_path / ".step_0000030.123.tmp").mkdir()
    remove_leftovers(tmp_path)
    remove_old_checkpoints(tmp_path, last=2, every_steps=10)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_0000005.bak", "step_0000010", "step_0000020", "step_0000025",
    ]  # fmt: skip


def test_a_checkpoint_that_was_being_replaced_comes_back(tmp_path: Path) -> None:
    save(tmp_path, 5, 10)
    (tmp_path / "step_0000010").rename(tmp_path / ".step_0000010.old.tmp")
    (tmp_path / ".step_0000010.123.tmp").mkdir()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_0000005", "step_0000010"]
    (tmp_path / ".step_0000010.old.tmp").mkdir()  # the new one has its place already
    remove_leftovers(tmp_path)
    assert load_state(tmp_path / "step_0000010") == {"step": 10}


def test_a_link_in_place_of_a_checkpoint_is_unlinked_and_its_target_stays(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    save(elsewhere, 5, 10)
    save(folder, 15)
    for name, target in (("step_0000005", elsewhere / "step_0000005"), ("step_0000010", tmp_path / "nothing")):
        (folder / name).symlink_to(target)
    remove_old_checkpoints(folder, last=1, every_steps=None)
    assert [path.name for path in folder.iterdir()] == ["step_0000015"]
    for target in (elsewhere / "step_0000010", tmp_path / "nothing"):  # and in place of the one that is saved
        (folder / "step_0000020").symlink_to(target)
        save(folder, 20)
        assert not (folder / "step_0000020").is_symlink()
        (folder / "step_0000020").rename(tmp_path / f"saved-{target.name}")
    for name in (".step_0000005.123.tmp", ".step_0000015.old.tmp"):
        (folder / name).symlink_to(elsewhere / "step_0000005")
    remove_leftovers(folder)
    assert [path.name for path in folder.iterdir()] == ["step_0000015"]
    assert sorted(path.name for path in elsewhere.iterdir()) == ["step_0000005", "step_0000010"]
    assert load_state(elsewhere / "step_0000005") == {"step": 5}


def test_only_whole_checkpoints_count_as_kept(tmp_path: Path) -> None:
    """A checkpoint that somebody took apart must not push the only whole ones out."""
    save(tmp_path, 5, 6)
    for step in (3, 9):
        (tmp_path / f"step_{step:07d}").mkdir()
    remove_old_checkpoints(tmp_path, last=1, every_steps=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_0000006", "step_0000009"]


def test_a_checkpoint_that_cannot_be_deleted_does_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    save(tmp_path, 5, 6)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "remove", busy)
        remove_old_checkpoints(tmp_path, last=1, every_steps=None)
    half = tmp_path / f".step_0000005.{os.getpid()}.tmp"
    cure = "could not be deleted (Device or resource busy); the next mlip pretrain in this run tries it again"
    assert caplog.messages == [f"{half}: {cure}"]
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000006"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_all_files_of_a_checkpoint_have_the_mode_that_the_umask_gives(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        save(tmp_path, 5)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "step_0000005").iterdir()}
    assert modes == dict.fromkeys(("model.safetensors", "state.pt"), 0o666 & ~mask)


def test_damage_is_named_with_what_to_do(tmp_path: Path) -> None:
    save(tmp_path, 5)
    saved = tmp_path / "step_0000005"
    for name, load in (("model.safetensors", load_weights), ("state.pt", load_state)):
        path = saved / name
        path.write_bytes(path.read_bytes()[:40])
        with pytest.raises(UsageError) as error:
            load(saved)
        assert str(error.value).startswith(f"{path}: not a whole ")
        assert str(error.value).endswith(f"); remove {saved}, and mlip takes the checkpoint before it")
        path.unlink()
        with pytest.raises(UsageError) as error:
            load(saved)
        assert str(error.value) == (f"{saved}: not a checkpoint (no {name} inside); name a run folder or a checkpoint")


@pytest.fixture
def _small_files_only() -> Iterator[None]:
    """Files end at 64 KiB, as on a disk that is full then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("_small_files_only")
def test_without_room_for_the_first_checkpoint_there_is_nothing_to_go_on_with(tmp_path: Path) -> None:
    with pytest.raises(RunError) as error:
        save_checkpoint(tmp_path / "c", step=6, weights={"a": torch.ones(1 << 16)}, state={})
    assert str(error.value) == (
        f"{tmp_path / 'c' / 'step_0000006'}: File too large; make room and start again: no checkpoint was saved yet"
    )
    assert list((tmp_path / "c").iterdir()) == []


@pytest.mark.usefixtures("_small_files_only")
@pytest.mark.parametrize("part", ["weights", "state"])
def test_without_room_for_either_file_the_cure_is_named_and_nothing_stays(tmp_path: Path, part: str) -> None:
    save(tmp_path, 5)
    parts = {"weights": {"a": torch.ones(3)}, "state": {"a": torch.ones(3)}}
    parts[part] = {"a": torch.ones(1 << 16)}
    with pytest.raises(RunError) as error:
        save_checkpoint(tmp_path, step=6, **parts)
    assert str(error.value) == f"{tmp_path / 'step_0000006'}: File too large; make room and go on with --resume"
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000005"]
