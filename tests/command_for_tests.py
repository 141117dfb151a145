"""`mlip` commands inside the process of a test: what they print, and their exit code. No new Python is started."""

import contextlib
import io
import os
import sys
from pathlib import Path
from subprocess import CompletedProcess
from unittest.mock import patch

import pytest

from mlip_cli import cli


def mlip(*arguments: str, folder: Path | None = None, **environment: str) -> CompletedProcess[str]:
    """Run `mlip ARGUMENTS` in `folder`, as subprocess.run would."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(folder or Path.cwd()),
        patch.dict(os.environ, {"COLUMNS": "80", **environment}),
        patch.object(sys, "argv", ["mlip", *arguments]),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        pytest.raises(SystemExit) as end,
    ):
        cli.main()
    code = end.value.code
    assert code is None or isinstance(code, int)
    return CompletedProcess(["mlip", *arguments], code or 0, stdout.getvalue(), stderr.getvalue())
