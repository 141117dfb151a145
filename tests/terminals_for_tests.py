"""Code that runs on a real terminal or through real pipes, and what a person sees of it."""

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import textwrap
import traceback
from collections.abc import Mapping, Sequence
from subprocess import CompletedProcess

from mlip_cli.terminal import output

START = "from mlip_cli.terminal import output, panel as drawing\noutput.start_logging()\n"


def environment(**changes: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "RANK")}
    return kept | {"TERM": "xterm-256color"} | changes


def in_pipe(code: str, **changes: str) -> CompletedProcess[str]:
    """Run `code` with both streams in pipes."""
    (stdout, to_stdout), (stderr, to_stderr) = os.pipe(), os.pipe()
    stdin = os.open(os.devnull, os.O_RDONLY)
    child = _fork(code, (stdin, to_stdout, to_stderr), environment(**changes))
    said, complained = _read(stdout, stderr)
    os.close(stdin)
    assert _exit_code(child) == 0, complained
    return CompletedProcess(["python"], 0, said, complained)


def on_terminal(code: str, *, width: int = 80, stdout_in_pipe: bool = False, **changes: str) -> tuple[str, str]:
    """Run `code` on a pseudo-terminal of `width` columns: (all that the terminal received, stdout if in a pipe)."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    pipe = os.pipe() if stdout_in_pipe else None
    child = _fork(code, (slave, pipe[1] if pipe else slave, slave), environment(**changes))
    received, *piped = _read(master, *([pipe[0]] if pipe else []))
    assert _exit_code(child) == 0, received
    return received, "".join(piped)


def _fork(code: str, streams: Sequence[int], environment: Mapping[str, str]) -> int:
    """Number of a fork of this process that runs `code` on these three streams; they are closed here.

    A fork begins at once, a new Python after a third of a second.
    """
    child = os.fork()
    if child != 0:
        for stream in set(streams[1:]):
            os.close(stream)
        return child
    status = 1
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.environ.clear()
        os.environ.update(environment)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        output.error_console.cache_clear()
        exec(START + textwrap.dedent(code), {"__name__": "__main__"})
        status = 0
    except BaseException:  # noqa: BLE001 - the child must not return into pytest
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _read(*streams: int) -> list[str]:
    """All that comes out of these streams, until each is closed on the other side."""
    received = dict.fromkeys(streams, b"")
    still_open = set(streams)
    while still_open:
        ready, _, _ = select.select(still_open, [], [], 60)
        assert ready, "the child says nothing more and does not end"
        for stream in ready:
            try:
                part = os.read(stream, 65536)
            except OSError:  # Linux: the other side of the terminal is closed
                part = b""
            received[stream] += part
            if not part:
                still_open.remove(stream)
                os.close(stream)
    return [text.decode() for text in received.values()]


def _exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def screen(received: str, width: int = 80) -> list[str]:
    """What a terminal shows at the end: the few control sequences that Rich uses, applied."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|.", received, re.S):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
        elif token.startswith("\x1b["):
            if token.endswith("A"):
                row -= int(token[2:-1] or 1)
            elif token == "\x1b[2K":
                lines[row] = ""
        else:
            if column == width:
                row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
            line = lines[row].ljust(column)
            lines[row], column = line[:column] + token + line[column + 1 :], column + 1
        lines += [""] * (row + 1 - len(lines))
    return [line.rstrip() for line in lines]
