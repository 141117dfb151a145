"""run.json: what ran, where, with which versions, from when to when, and why it ended."""

import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import mlip_cli
from mlip_cli.commands.run_start import command_line
from mlip_cli.config import Recipe
from mlip_cli.distributed import world_size
from mlip_cli.errors import Stopped
from mlip_cli.files import write_json
from mlip_cli.run_folder import Run, now

PACKAGES = ("torch", "torchvision", "timm", "open_clip_torch", "numpy", "pillow", "simplejpeg")


def commit() -> str | None:
    """The commit of the source tree that runs, or None where it is no checkout."""
    root = Path(mlip_cli.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        asked = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:  # no git on this machine
        return None
    return asked.stdout.strip() or None


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that results depend on."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found | {"torch": str(torch.__version__)}  # with the build, which the package's version leaves out


@contextmanager
def stamped(
    run: Run, recipe: Recipe, *, device: torch.device, fingerprints: dict[str, str], step: int
) -> Iterator[None]:
    """Write when and where the block began, and at its end why it ended: finished, stopped, interrupted or failed."""
    _write_start(run, recipe, device=device, fingerprints=fingerprints, step=step)
    reason = "interrupted"
    try:
        yield
        reason = "finished"
    except Stopped as stop:
        reason = str(stop)
        raise
    except Exception as error:
        reason = f"failed: {error}"
        raise
    finally:
        with suppress(OSError):  # on a full disk the first error is the one to show
            write_json(run.stamp, {**run.read_stamp(), "ended": now(), "end_reason": reason})


def _write_start(run: Run, recipe: Recipe, *, device: torch.device, fingerprints: dict[str, str], step: int) -> None:
    """Begin the stamp, or note in it that the run went on at `step`."""
    session = {
        "command": command_line(),
        "started": now(),
        "from_step": step,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "ranks": world_size(),
        "threads": torch.get_num_threads(),
    }
    earlier = run.read_stamp()
    stamp: dict[str, Any] = {
        "mlip_version": mlip_cli.__version__,
        "commit": commit(),
        "versions": versions(),
        "platform": f"{platform.system()} {platform.machine()}, {sys.byteorder} endian",
        "seed": recipe.seed,
        "data": fingerprints,
        "started": earlier.get("started", session["started"]),
        "ended": None,
        "end_reason": None,
        "sessions": [*earlier.get("sessions", []), session],
    }
    write_json(run.stamp, stamp)
