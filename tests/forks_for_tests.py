"""`mlip` commands as real processes, forked from one that has torch imported already.

Importing what `mlip pretrain` needs takes seconds of CPU, a small training less; forked like this it begins at once.
Everything else is as from the shell: a process group of its own, its loader processes in it.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import IO

# the process that forks is told no sys.path in Python 3.11, and would import nothing before it forks
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["warm_for_tests"])

PATIENCE_S = 240


def own_group() -> None:
    """What a shell does for a command; and loader processes start as they do from the shell."""
    os.setsid()
    multiprocessing.set_start_method(None, force=True)


def command(words: Sequence[str], stdout: str, stderr: str) -> None:
    """Body of a forked process: `mlip WORDS`, what it says appended to two files."""
    assert "mlip_cli.commands.training" in sys.modules, "what forks has imported nothing: see PYTHONPATH above"
    own_group()
    for number, path in enumerate((stdout, stderr), start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = ["mlip", *words]
    from mlip_cli.__main__ import main

    main()


def answering(words: Sequence[str], environment: Mapping[str, str], folder: str, answer: str) -> None:
    """Body of a forked process: `mlip WORDS` in `folder`, and its words in two files of the folder `answer`."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    command(words, f"{answer}/stdout", f"{answer}/stderr")


def mlip(words: Sequence[str], *, environment: Mapping[str, str], folder: Path | None = None) -> CompletedProcess[str]:
    """Run `mlip WORDS` to its end, as subprocess.run would."""
    with tempfile.TemporaryDirectory() as answer:
        process = FORKS.Process(target=answering, args=(words, dict(environment), str(folder or Path.cwd()), answer))
        process.start()
        process.join(PATIENCE_S)
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            raise TimeoutError(f"mlip {' '.join(words)}: not at its end after {PATIENCE_S} s")
        stdout, stderr = (Path(answer, name).read_text() for name in ("stdout", "stderr"))
    return CompletedProcess(["mlip", *words], process.exitcode, stdout, stderr)


def module(name: str, words: Sequence[str], environment: Mapping[str, str], log: str) -> None:
    """Body of a forked process: `python -m NAME WORDS`, what it says appended to the file `log`."""
    own_group()
    os.environ.update(environment)
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = [name, *words]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def call(command: Sequence[str], *, stdout: IO[str], stderr: int, env: Mapping[str, str]) -> int:
    """`subprocess.call` for `python -m NAME WORDS` whose two streams go to one file: its exit code."""
    _, _, name, *words = command
    process = FORKS.Process(target=module, args=(name, words, dict(env), stdout.name))
    process.start()
    process.join(PATIENCE_S)
    assert process.exitcode is not None, f"{name}: not at its end after {PATIENCE_S} s"
    return process.exitcode
