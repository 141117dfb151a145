"""The command line as people meet it: help, wrong usage, and what it says then."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_for_tests import mlip

from mlip_cli.terminal.endings import exit_code

COMMANDS = (
    *("prepare-data", "pretrain", "merge-sweep", "eval-zeroshot", "search", "average", "export"),
    *("profile", "report", "doctor"),
)


@pytest.fixture(scope="module")
def main_help() -> str:
    done = mlip("--help")
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_help_lists_every_command_in_full(main_help: str) -> None:
    listed = main_help.split("Commands:\n")[1]
    assert tuple(re.findall(r"^  ([a-z-]+)  ", listed, re.M)) == COMMANDS
    assert "..." not in listed
    assert max(map(len, main_help.splitlines())) <= 80


@pytest.mark.parametrize("arguments", [(), ("-h",)])
def test_no_command_and_short_option_show_the_same_help(arguments: tuple[str, ...], main_help: str) -> None:
    done = mlip(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (0, main_help, "")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_ends_with_an_example(command: str) -> None:
    done = mlip(command, "-h")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith(f"  Example: mlip {command}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--foo"], "mlip: no such option: --foo; try mlip --help"),
        (["profile", "--batch-siz", "3"], "mlip profile: no such option: --batch-siz; did you mean --batch-size?"),
        (
            ["eval-zeroshot", "--dataset", "digits", "openmoji"],
            "mlip eval-zeroshot: RUN: 'openmoji' is a data set, not a run; "
            "name it with --dataset openmoji (lists take commas)",
        ),
        (
            ["merge-sweep", "wds/cars"],
            "mlip merge-sweep: RUN: 'wds/cars' is a data set, not a run; name it with --dataset wds/cars "
            "(lists take commas)",
        ),
        (
            ["merge-sweep", "--methods", "tome,"],
            "mlip merge-sweep: --methods: 'tome,' has an empty part; lists look like a,b",
        ),
        (
            ["profile", "--device", "gpu"],
            "mlip profile: --device: 'gpu' is not one of 'auto', 'cuda', 'mps', 'cpu'; try mlip profile --help",
        ),
        (
            ["profile", "--rounds", "1"],
            "mlip profile: --rounds: 1 should be greater than or equal to 5; try mlip profile --help",
        ),
        (
            ["merge-sweep", "runs/a", "--rates", "0.2", "0.3"],
            "mlip merge-sweep: RUN: '0.3' is a number, not a run; lists take commas, as in 0.3,0.3",
        ),
        (
            ["merge-sweep", "runs/a", "--methods", "guided", "tome"],
            "mlip merge-sweep: got unexpected extra argument(s) (tome); lists take commas, as in a,b",
        ),
        (["doctor", "a", "b"], "mlip doctor: got unexpected extra argument(s) (a b); try mlip doctor --help"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], message: str) -> None:
    done = mlip(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {message}\n")


def test_a_reader_that_leaves_the_pipe_ends_the_command_without_an_error() -> None:
    code = (
        "import os, sys; from mlip_cli import __main__, cli\n"
        "from mlip_cli.terminal import output\n"
        "cli.app = lambda **_: output.print_lines('x' * 200_000)\n"
        "sys.argv = ['mlip']; __main__.main()"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_current_folder_that_was_removed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert exit_code(lambda **_: os.path.abspath("relative")) == 2
    assert capsys.readouterr().err == "error: the current folder was removed; change to another one with cd\n"


def test_operating_system_errors_name_the_file_first(capsys: pytest.CaptureFixture[str]) -> None:
    def app(**_: object) -> None:
        open("/nowhere/at/all").close()

    assert exit_code(app) == 1
    assert capsys.readouterr().err == "error: /nowhere/at/all: No such file or directory\n"
