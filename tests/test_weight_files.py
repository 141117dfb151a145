"""Weights that others wrote: read without running them, or refused with the cure."""

import argparse
import os
import pickle
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mlip_cli.errors import UsageError
from mlip_cli.runs.weight_files import read_weights


def test_files_that_torch_saved_are_read_without_running_them(tmp_path: Path) -> None:
    model = nn.Linear(2, 3)
    of_trainer = tmp_path / "epoch.pt"
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, of_trainer)
    assert torch.equal(read_weights(of_trainer)["weight"], model.weight)
    program = tmp_path / "it's.pt"
    torch.save({"state_dict": model.state_dict(), "args": argparse.Namespace(lr=1)}, program)
    with pytest.raises(UsageError, match="or a pickle that could run any program"):
        read_weights(program)


@pytest.mark.parametrize(
    "keys", [("state_dict",), ("model",), ("model_state_dict",), ("module",), ("model", "state_dict")]
)
def test_the_state_dict_is_found_where_trainers_put_it(tmp_path: Path, keys: tuple[str, ...]) -> None:
    content: object = {"weight": torch.ones(2)}
    for key in reversed(keys):
        content = {"epoch": 3, key: content, "best": [0.5], "name": "x"}
    torch.save(content, tmp_path / "a.pt")
    assert torch.equal(read_weights(tmp_path / "a.pt")["weight"], torch.ones(2))


@pytest.mark.parametrize(
    "beside",
    [np.float64(0.3), np.float32(1), np.int64(3), np.bool_(True), np.arange(3), [np.array([[1.5]])], np.dtype("f4")],
)
def test_numbers_of_numpy_beside_the_weights_are_no_obstacle(tmp_path: Path, beside: object) -> None:
    torch.save({"best": beside, "state_dict": {"weight": torch.ones(2)}}, tmp_path / "a.pt")
    assert torch.equal(read_weights(tmp_path / "a.pt")["weight"], torch.ones(2))


class Bomb:
    """Runs a program where it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch exploded",)


def test_nothing_is_run_although_numpy_is_let_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    of_objects = np.array([Bomb()], dtype=object)
    for content in (Bomb(), {"a": of_objects, "state_dict": {"weight": torch.ones(2)}}):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(
            UsageError, match=r"it holds posix\.system, so it is a whole module, or a pickle that could"
        ):
            read_weights(tmp_path / "a.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        lambda model: {"model": model},
        lambda model: {"args": Bomb, "state_dict": model.state_dict()},
    ],
)
def test_a_pickled_module_is_refused_with_the_command_that_extracts_its_weights(
    tmp_path: Path, wrap: Callable[[nn.Module], object]
) -> None:
    model, file = nn.Linear(2, 3), tmp_path / "it's.pt"
    torch.save(wrap(model), file)
    with pytest.raises(
        UsageError, match=r"alone: it holds .*; if you trust it, extract its weights with: .*python -c "
    ) as said:
        read_weights(file)
    assert "\n" not in str(said.value)
    run_cure(str(said.value))
    assert torch.equal(read_weights(tmp_path / "it's.weights.pt")["weight"], model.weight)


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
    assert (python, option) == (sys.executable, "-c")
    exec(program, {})


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.pt", b"no"), ("hello.pt", b"hello\n"), ("a.safetensors", b"no"), ("b.bin", b"PK\x03\x04no")],
)
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


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_runs_a_program_is_refused_and_not_run(tmp_path: Path) -> None:
    class Program:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path}/ran",)

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "a.pt").write_bytes(pickle.dumps({"state_dict": Program()}, protocol))
        with pytest.raises(UsageError, match=r"a\.pt: (not a|a pickle that torch did not write, which could run any)"):
            read_weights(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()
