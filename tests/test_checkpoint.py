"""Checkpoint folders: whole or absent, the right ones kept, damage named with what to do."""

from pathlib import Path

import pytest
import torch

from mlip_cli.errors import UsageError
from mlip_cli.train.checkpoint import (
    load_state,
    load_weights,
    remove_leftovers,
    remove_old_checkpoints,
    save_checkpoint,
)


def save(folder: Path, *steps: int) -> None:
    for step in steps:
        save_checkpoint(folder, step=step, weights={"a": torch.ones(3) * step}, state={"step": step})


def test_a_checkpoint_comes_back_and_replaces_one_of_its_step(tmp_path: Path) -> None:
    save(tmp_path, 5, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000005"]
    assert torch.equal(load_weights(tmp_path / "step_0000005")["a"], torch.full((3,), 5.0))
    assert load_state(tmp_path / "step_0000005") == {"step": 5}


def test_the_newest_and_the_named_ones_stay_and_what_is_not_ours(tmp_path: Path) -> None:
    save(tmp_path, 5, 10, 15, 20, 25)
    (tmp_path / "step_0000005.bak").mkdir()
    (tmp_path / ".step_0000030.123.tmp").mkdir()
    remove_leftovers(tmp_path)
    remove_old_checkpoints(tmp_path, last=2, every_steps=10)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_0000005.bak", "step_0000010", "step_0000020", "step_0000025",
    ]  # fmt: skip


def test_damage_is_named_with_what_to_do(tmp_path: Path) -> None:
    save(tmp_path, 5)
    checkpoint = tmp_path / "step_0000005"
    for name, load in (("model.safetensors", load_weights), ("state.pt", load_state)):
        path = checkpoint / name
        path.write_bytes(path.read_bytes()[:40])
        with pytest.raises(UsageError) as error:
            load(checkpoint)
        assert str(error.value).startswith(f"{path}: not a whole ")
        assert str(error.value).endswith(f"); remove {checkpoint}, and the one before it is taken")
        path.unlink()
        with pytest.raises(UsageError) as error:
            load(checkpoint)
        assert str(error.value) == (
            f"{checkpoint}: not a checkpoint (no {name} inside); name a run folder or a checkpoint"
        )
