"""Weights that others wrote: read without running them, or refused with the cure."""

import argparse
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

from mlip_cli.errors import UsageError
from mlip_cli.runs.initial_weights import read_weights


def test_files_that_torch_saved_are_read_without_running_them(tmp_path: Path) -> None:
    model = nn.Linear(2, 3)
    of_trainer = tmp_path / "epoch.pt"
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, of_trainer)
    assert torch.equal(read_weights(of_trainer)["weight"], model.weight)
    program = tmp_path / "it's.pt"
    torch.save({"state_dict": model.state_dict(), "args": argparse.Namespace(lr=1)}, program)
    with pytest.raises(UsageError, match="or a pickle that could run any program"):
        read_weights(program)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_torchscript_archive_is_refused_with_the_command_that_extracts_its_weights(tmp_path: Path) -> None:
    model = nn.Linear(2, 3)
    archive = tmp_path / "it's.pt"
    torch.jit.trace(model, torch.zeros(1, 2)).save(str(archive))
    with pytest.raises(UsageError, match="a TorchScript archive, which is a program; if you trust it") as said:
        read_weights(archive)
    run_cure(str(said.value))
    assert torch.equal(read_weights(tmp_path / "it's.weights.pt")["weight"], model.weight)


def run_cure(message: str) -> None:
    """Do what the command at the end of a message does."""
    python, option, program = shlex.split(message.partition("with: ")[2])
    assert (python, option) == ("python", "-c")
    exec(program, {})


@pytest.mark.parametrize(("name", "content"), [("a.pt", b"no"), ("a.safetensors", b"no"), ("b.bin", b"PK\x03\x04no")])
def test_damaged_files_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=rf"^{tmp_path}/{name}: "):
        read_weights(tmp_path / name)


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"<!doctype html>"])
def test_a_pointer_or_a_web_page_is_named_and_not_run(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(UsageError, match=rf"^{tmp_path}/a.bin: not a file of tensors and plain values, but a Git LFS"):
        read_weights(tmp_path / "a.bin")


def test_a_file_without_a_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UsageError, match=r"list.pt: no state dict \(names and tensors\)"):
        read_weights(tmp_path / "list.pt")
