"""How a command ends: an error as one line, and the exit code."""

import os
import re
import signal
import sys
import traceback
from types import FrameType

import typer

from mlip_cli.errors import RunError, Stopped, UsageError
from mlip_cli.paths import check_current_folder, escaped
from mlip_cli.terminal.output import ReaderLeft, drop_streams, is_main, say, say_to_copy
from mlip_cli.terminal.values import checked_measured_run


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handler of Ctrl-C: raise KeyboardInterrupt. Inside an import, end the process at once.

    Libraries swallow the exception while they are imported, or turn it into an ImportError; nothing is open then.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"error: interrupted\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def exit_code(app: typer.Typer) -> int:
    """Run the command in `sys.argv`, print an error as one line, and return the exit code."""
    try:
        check_current_folder()
        code = app(args=sys.argv[1:] or ["--help"], prog_name="mlip", standalone_mode=False)
        sys.stdout.flush()
    except typer.TyperException as error:
        return _fail(_wrong_usage(error), 2)
    except UsageError as error:
        return _fail(str(error), 2)
    except Stopped as stop:
        _leave_at_once_when_asked_again()
        words, *commands = str(stop).splitlines()
        say(words)
        for command in commands:
            say_to_copy(command)
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _leave_at_once_when_asked_again()
        return _fail("interrupted", 130)
    except ReaderLeft:
        drop_streams()
        return 128 + signal.SIGPIPE
    except OSError as error:
        drop_streams()
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
    except RunError as error:
        return _fail(str(error), 1)
    if code == 130:  # typer turns Ctrl-C into this code
        return _fail("interrupted", 130)
    return code if isinstance(code, int) else 0


def _leave_at_once_when_asked_again() -> None:
    """Let the system handle one more Ctrl-C: in the last steps of Python it would be a traceback."""
    if signal.getsignal(signal.SIGINT) is interrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _wrong_usage(error: typer.TyperException) -> str:
    """typer's sentence as `place: what; what to do`."""
    context = getattr(error, "ctx", None)
    place = context.command_path if context else "mlip"
    message = error.format_message().strip().rstrip(".")
    option = getattr(error, "option_name", "")
    if option.startswith("--") and "." in option:
        return f"{place}: {option}: recipe keys have no dashes; write {option.removeprefix('--')}=VALUE"
    similar = set(getattr(error, "possibilities", None) or ()) - {"--help"}
    if (
        place == "mlip pretrain"
        and message.startswith("No such option")
        and not similar
        and (key := _recipe_key(option))
    ):
        return f"{place}: no such option: {option}; for the recipe's {key} write {key}=VALUE"
    message = _list_with_spaces(message, context) if context else message
    message = re.sub(r"\. Did you mean| \(Did you mean", "; did you mean", message)
    message = re.sub(r" \(Possible options: (.*)\)", r"; did you mean \1?", message)
    if isinstance(error.__cause__, ValueError) and hasattr(error.__cause__, "errors"):  # a bound, checked by pydantic
        message = message.replace("Input should", f"{error.__cause__.errors()[0]['input']} should")
    message = re.sub(r"^Invalid value for '([^']*)': (?:Value error, )?", r"\1: ", message)
    cure = "" if ";" in message else f"; try {place} --help"
    is_sentence = message[1:2].islower()
    return f"{place}: {message[:1].lower() if is_sentence else message[:1]}{message[1:]}{cure}"


def _recipe_key(option: str) -> str | None:
    """`--steps` -> train.steps; None if no key of a recipe is similar."""
    from mlip_cli.recipe.schema import guess
    from mlip_cli.recipe.shipped import read_schema

    return guess(read_schema(), (), option.removeprefix("--").replace("-", "_"))


def _list_with_spaces(message: str, context: typer.Context) -> str:
    """`message`; if words are left over beside an option that is a list, also how to write a list."""
    left_over = re.search(r"unexpected extra argument.*? \((\S+?)[ )]", message)
    if left_over is None or all(parameter.name != "dataset" for parameter in context.command.params):
        return message
    try:
        checked_measured_run(left_over[1])
    except typer.BadParameter as error:
        return f"RUN: {error.message}"
    return f"{message}; lists take commas, as in a,b"


def _fail(message: str, code: int) -> int:
    if os.environ.get("MLIP_DEBUG") == "1":
        traceback.print_exc()
    # Every rank prints its error: it may concern one machine only.
    who = "" if is_main() else f"rank {os.environ['RANK']}: "
    try:
        for line in message.split("\n"):
            print(f"{who}error: {escaped(line)}", file=sys.stderr)
    except ReaderLeft:
        drop_streams()
        return 128 + signal.SIGPIPE
    return code
