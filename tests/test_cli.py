"""The command line's contract: light, and one clear line with the right exit code for every mistake."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_for_tests import mlip

from mlip_cli import __version__
from mlip_cli.terminal.endings import interrupt

ROOT = Path(__file__).parents[1]
HEAVY = ["torch", "torchvision", "timm", "webdataset", "open_clip", "clip_benchmark", "numpy", "pyarrow"]

PROBE = """
import json, sys
from mlip_cli.cli import main
try:
    main()
except SystemExit as end:
    print(json.dumps({"code": end.code, "modules": sorted(sys.modules)}), file=sys.stderr)
"""


def loaded_modules(*arguments: str) -> tuple[int, set[str]]:
    """Exit code, and all modules that `mlip ARGUMENTS` loads."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    report = json.loads(done.stderr.splitlines()[-1])
    return report["code"], set(report["modules"])


def test_help_loads_nothing_heavy() -> None:
    code, modules = loaded_modules("--help")
    assert code == 0
    assert modules.isdisjoint([*HEAVY, "pydantic", "yaml", "mlip_cli.recipe.config"])


def test_help_of_a_command_loads_nothing_heavy() -> None:
    """typer itself loads pydantic for the arguments of a command; we load nothing."""
    code, modules = loaded_modules("pretrain", "--help")
    assert code == 0
    assert modules.isdisjoint([*HEAVY, "yaml", "mlip_cli.recipe.config"])


def test_a_mistake_in_a_recipe_is_found_before_torch_is_loaded() -> None:
    code, modules = loaded_modules("pretrain", "recipes/smoke.yaml", "optim.lr=fast")
    assert code == 2
    assert "pydantic" in modules
    assert modules.isdisjoint(HEAVY)


def test_mistakes_of_a_recipe_are_printed_one_a_line() -> None:
    done = mlip("pretrain", "recipes/smoke.yaml", "optim.lr=fast", "train.step=5", folder=ROOT)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: command line: optim.lr=fast: expected a number above 0, not 'fast'",
        "error: command line: train.step=5: unknown key train.step; did you mean train.steps?",
    ]


def test_version() -> None:
    """In a process of its own, as `python -m mlip_cli`."""
    command = [sys.executable, "-m", "mlip_cli", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"mlip {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "mlip: no such command 'frobnicate'; try mlip --help"),
        (["pretrai"], "mlip: no such command 'pretrai'; did you mean 'pretrain'?"),
        (["pretrain"], "mlip pretrain: missing argument 'RECIPE'; try mlip pretrain --help"),
        (["pretrain", "smoke", "--resum"], "mlip pretrain: no such option: --resum; did you mean --resume?"),
        (
            ["pretrain", "smoke", "--train.steps=5"],
            "mlip pretrain: --train.steps: recipe keys have no dashes; write train.steps=VALUE",
        ),
        (
            ["merge-sweep", "--rates", "0.3", "0.5"],
            "mlip merge-sweep: RUN: '0.5' is a number, not a run; lists take commas, as in 0.3,0.5",
        ),
        (
            ["merge-sweep", "--rates", "0.3,x"],
            "mlip merge-sweep: --rates: 'x' is not a number; rates look like 0,0.3,0.5",
        ),
        (
            ["merge-sweep", "--rates", "0.3,1"],
            "mlip merge-sweep: --rates: 1 is not in [0, 1); a rate is the fraction of patch tokens that merge away",
        ),
    ],
)
def test_wrong_usage_is_one_clear_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    done = mlip(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {message}\n"


def complete(shell: str, **environment: str) -> list[str]:
    return mlip(_MLIP_COMPLETE=f"complete_{shell}", **environment).stdout.split()


def bash(*words: str) -> list[str]:
    """What bash is offered when the cursor stands behind the last word."""
    return complete("bash", COMP_WORDS=" ".join(words), COMP_CWORD=str(len(words) - 1))


def test_the_shell_completes_names_of_recipes() -> None:
    assert bash("mlip", "pretrain", "openm") == ["openmoji", "openmoji_clip"]


def test_the_shell_completes_keys_of_recipes() -> None:
    assert bash("mlip", "pretrain", "smoke", "model.merging") == [
        "model.merging=",
        "model.merging.rate=",
        "model.merging.method=",
        "model.merging.guidance=",
        "model.merging.strength=",
        "model.merging.at=",
        "model.merging.active=",
    ]
    assert bash("mlip", "pretrain", "smoke", "seed", "=", "3", "data.augment.f") == ["data.augment.flip="]


def test_the_shell_completes_values() -> None:
    """bash splits words at the equals sign, the others do not."""
    assert bash("mlip", "pretrain", "smoke", "model.merging.method", "=") == ["guided", "tome", "random_drop"]
    assert bash("mlip", "pretrain", "smoke", "data.augment.flip", "=", "t") == ["true"]
    words = "mlip pretrain smoke seed=3 train.precision=f"
    offered = complete("fish", _TYPER_COMPLETE_ARGS=words, _TYPER_COMPLETE_FISH_ACTION="get-args")
    assert offered == ["train.precision=fp32", "train.precision=fp16"]


def test_completion_loads_nothing_heavy() -> None:
    code = "import json, sys; from mlip_cli.recipe.shipped import complete_override; complete_override([], 'optim.')"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print(json.dumps(sorted(sys.modules)))"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(json.loads(done.stdout)).isdisjoint([*HEAVY, "pydantic", "yaml"])


def test_ctrl_c_during_an_import_ends_the_command(tmp_path: Path) -> None:
    """A library may catch the exception while it is imported, as numpy does."""
    (tmp_path / "swallower.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt:\n    pass\n"
    )
    program = (
        "import signal; from mlip_cli.terminal.endings import interrupt; signal.signal(signal.SIGINT, interrupt)\n"
        "import swallower; print('went on')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


@pytest.mark.parametrize("error", ["Stopped('stopped', exit_code=130)", "KeyboardInterrupt"])
def test_one_more_ctrl_c_while_a_command_leaves_is_no_traceback(error: str) -> None:
    program = (
        "import atexit, os, signal, sys\nfrom mlip_cli.errors import Stopped\nfrom mlip_cli.terminal import endings\n"
        "signal.signal(signal.SIGINT, endings.interrupt)\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
        f"def app(**_): raise {error}\n"
        "sys.exit(endings.exit_code(app))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGINT
    assert "Traceback" not in done.stderr


def test_ctrl_c_at_other_times_raises_keyboard_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupt(2, None)
