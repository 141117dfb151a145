"""Checkpoint folders: whole or absent, the right ones kept, damage named with what to do."""

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mlip_cli.errors import RunError, UsageError
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


def test_damage_is_named_with_what_to_do(tmp_path: Path) -> None:
    save(tmp_path, 5)
    checkpoint = tmp_path / "step_0000005"
    for name, load in (("model.safetensors", load_weights), ("state.pt", load_state)):
        path = checkpoint / name
        path.write_bytes(path.read_bytes()[:40])
        with pytest.raises(UsageError) as error:
            load(checkpoint)
        assert str(error.value).startswith(f"{path}: not a whole ")
        assert str(error.value).endswith(f"); remove {checkpoint}, and mlip takes the checkpoint before it")
        path.unlink()
        with pytest.raises(UsageError) as error:
            load(checkpoint)
        assert str(error.value) == (
            f"{checkpoint}: not a checkpoint (no {name} inside); name a run folder or a checkpoint"
        )


@pytest.fixture
def _small_files_only() -> Iterator[None]:
    """Files end at 64 KiB, as on a disk that is full then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


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
