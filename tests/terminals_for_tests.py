"""Code that runs on a real terminal or through real pipes, and what a person sees of it."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import textwrap

START = "from mlip_cli.terminal import output, panel as drawing\noutput.start_logging()\n"


def environment(**changes: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "RANK")}
    return kept | {"TERM": "xterm-256color"} | changes


def in_pipe(code: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run `code` with both streams in pipes."""
    done = subprocess.run(
        [sys.executable, "-c", START + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment(**changes),
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def on_terminal(code: str, *, width: int = 80, stdout_in_pipe: bool = False, **changes: str) -> tuple[str, str]:
    """Run `code` on a pseudo-terminal of `width` columns: (all that the terminal received, stdout if in a pipe)."""
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    try:
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
        stdout = subprocess.PIPE if stdout_in_pipe else slave
        process = subprocess.Popen(
            [sys.executable, "-c", START + textwrap.dedent(code)],
            stdin=slave,
            stdout=stdout,
            stderr=slave,
            env=environment(**changes),
        )
        os.close(slave)
        received = b""
        while True:
            ready, _, _ = select.select([master], [], [], 60)
            assert ready, "the child says nothing more and does not end"
            try:
                part = os.read(master, 65536)
            except OSError:  # Linux: the other side is closed
                break
            if not part:
                break
            received += part
        piped = process.stdout.read().decode() if process.stdout else ""
        assert process.wait(60) == 0, received.decode()
    finally:
        os.close(master)
    return received.decode(), piped


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
