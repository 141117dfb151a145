"""The run folder during training: its lock, recipe, log.txt and stamp."""

import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import mlip_cli
from mlip_cli.data.dataset import ShardDataset
from mlip_cli.distributed import world_size
from mlip_cli.errors import Stopped, UsageError
from mlip_cli.files import full_disk_named, lock, write_bytes, write_json, write_text
from mlip_cli.recipe.config import Recipe
from mlip_cli.recipe.load import absolute_paths, recipe_yaml
from mlip_cli.runs.checkpoint import remove_leftovers
from mlip_cli.runs.folder import RUNS, Run, now, remember_latest, step_of, sweep, with_tokenizer
from mlip_cli.runs.result_files import json_value
from mlip_cli.runs.start import command_line
from mlip_cli.terminal.output import is_main, logger


@contextmanager
def recorded(
    run: Run, recipe: Recipe, *, device: torch.device, fingerprints: dict[str, str], step: int
) -> Iterator[None]:
    """Write recipe, stamp and log.txt, and at the end why the run ended. Only rank 0 writes.

    Args:
        fingerprints: those of the training data, by folder.
        step: the last step of the checkpoint that the run starts from; 0 for a new run.

    Raises:
        UsageError: another process trains in this folder, or saved a checkpoint here after `step` was chosen.
        RunError: the disk is full.
    """
    if not is_main():
        yield
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    text = recipe_yaml(with_tokenizer(absolute_paths(recipe), run.tokenizer))
    with full_disk_named(run.folder, "make room and go on with --resume"):
        if not run.recipe.is_file():  # first of all: without it the folder is not a run folder
            write_text(run.recipe, text)
        with locked_log(run):
            newest = run.latest_checkpoint()
            if newest is not None and step_of(newest) != step:
                raise UsageError(f"{newest}: another process saved it just now; start again with --resume")
            write_text(run.recipe, text)
            if recipe.model.text.tokenizer is not None and not run.tokenizer.is_file():
                write_bytes(run.tokenizer, Path(recipe.model.text.tokenizer.file).read_bytes())
            run.checkpoints.mkdir(exist_ok=True)
            run.evals.mkdir(exist_ok=True)
            remove_leftovers(run.checkpoints)
            sweep(run)
            if run.folder.absolute().parent == RUNS.absolute():
                remember_latest(run)
            with stamped(run, recipe, device=device, fingerprints=fingerprints, step=step):
                yield


def data_cards(training: Sequence[ShardDataset], validation: Sequence[ShardDataset]) -> dict[str, dict[str, Any]]:
    """Cards of the data by role, without their lists of shards. A second data set of a role gets a number."""
    cards = {}
    for role, datasets in (("training", training), ("validation", validation)):
        for number, dataset in enumerate(datasets, start=1):
            card = {key: value for key, value in dataset.card.items() if key != "shards"}
            cards[role if number == 1 else f"{role} {number}"] = {"folder": dataset.place, **card}
    return cards


class _LogFile(logging.FileHandler):
    """Raises if a line cannot be written. logging's own handler prints a traceback and continues."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        assert error is not None
        raise error


@contextmanager
def locked_log(run: Run) -> Iterator[None]:
    """Also log to log.txt inside the block. Only one process at a time can hold the file.

    Raises:
        UsageError: another process holds it.
    """

    def refuse() -> None:
        raise UsageError(f"{run.folder}: another mlip pretrain is running here; wait for it, or name another --out")

    log = _LogFile(run.log, encoding="utf-8", errors="backslashreplace")
    log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    try:
        assert log.stream is not None  # it is opened with its handler
        with suppress(OSError):  # a file system without locks
            lock(log.stream, when_held=refuse)
        logger.addHandler(log)
        yield
    finally:
        logger.removeHandler(log)
        with suppress(OSError):  # on a full disk, the first error is the one to show
            log.close()


PACKAGES = ("torch", "torchvision", "timm", "open_clip_torch", "numpy", "pillow", "simplejpeg")


def commit() -> str | None:
    """The commit of the running source tree, or None if it is not a git checkout."""
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
    """Versions of Python and of the packages that affect results."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found | {"torch": str(torch.__version__)}  # with the build, which the package's version leaves out


def made_with() -> dict[str, Any]:
    """The program and the machine, for a stamp."""
    return {
        "mlip_version": mlip_cli.__version__,
        "commit": commit(),
        "versions": versions(),
        "platform": f"{platform.system()} {platform.machine()}, {sys.byteorder} endian",
    }


@contextmanager
def stamped(
    run: Run, recipe: Recipe, *, device: torch.device, fingerprints: dict[str, str], step: int
) -> Iterator[None]:
    """Write when and where the block began, and later why it ended: finished, stopped, interrupted or failed."""
    session: dict[str, Any] = {
        "command": command_line(),
        "started": now(),
        "from_step": step,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "ranks": world_size(),
        "threads": torch.get_num_threads(),
    }
    earlier = run.read_stamp()
    stamp: dict[str, Any] = {
        **made_with(),
        "seed": recipe.seed,
        "data": fingerprints,
        "started": earlier.started or session["started"],
        "ended": None,
        "end_reason": None,
        "sessions": [*map(json_value, earlier.sessions), session],
    }
    write_json(run.stamp, stamp)
    began_s = sum(os.times()[:4])
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
        session["cpu_s"] = round(sum(os.times()[:4]) - began_s, 2)  # of this process and of children that have ended
        with suppress(OSError):  # on a full disk, the first error is the one to show
            write_json(run.stamp, {**stamp, "ended": now(), "end_reason": reason})
