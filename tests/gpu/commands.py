"""A row about commands, as a user runs them: a training that is killed and goes on, profile, and both sweeps."""

import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

from forks_for_tests import mlip
from gpu.rows import Found, Scale
from killed_for_tests import Forked, last_step, raw_lines
from waits_for_tests import wait_until

from mlip_cli.recipe.shipped import recipes_folder
from mlip_cli.runs.folder import Run, step_of

SMOKE = str(recipes_folder() / "smoke.yaml")
STEPS, EVERY = 30, 5
"""Of the training, and between its checkpoints, so that the kill has one behind it and many before it."""


def said(folder: Path, *words: str) -> Any:
    """What `mlip WORDS --json` prints in `folder`."""
    done = mlip([*words, "--json"], environment=os.environ, folder=folder)
    if done.returncode != 0:
        raise RuntimeError(f"mlip {words[0]} ended with {done.returncode}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def trained(folder: Path, overrides: Sequence[str]) -> tuple[dict[str, bool], dict[str, Any]]:
    """`mlip pretrain recipes/smoke.yaml`, killed in the middle, and resumed: statements and figures."""
    run, words = folder / "runs" / "smoke", folder / "words"
    steps = f"train.steps={STEPS}", f"train.checkpoint_every.steps={EVERY}", "log.every_steps=1"
    arguments = [SMOKE, *overrides, *steps, "--out", str(run)]
    with Forked(arguments, words) as training:
        wait_until(
            lambda: last_step(run) > EVERY or not training.is_at_work(),
            what="no sixth step of mlip pretrain",
            every_s=0.02,
        )
        is_killed = training.is_at_work()
        training.kill()
    newest = Run(run).latest_checkpoint()
    stood_at, before = step_of(newest) if newest is not None else 0, losses(run)
    done = said(folder, "pretrain", *arguments, "--resume")
    after = losses(run)
    twice = {step: (loss, after[step]) for step, loss in before.items() if step > stood_at}
    statements = {
        "the training was killed in the middle": is_killed and 0 < stood_at < STEPS,
        "the resumed training is finished": done["step"] == STEPS,
        "steps that were taken twice have one loss, within 1 %": all(abs(a / b - 1) < 0.01 for a, b in twice.values()),
    }
    return statements, {"killed_at_checkpoint": stood_at, "steps": done["step"], "taken_twice": twice}


def losses(run: Path) -> dict[int, float]:
    """Step -> loss."""
    return {line["step"]: line["loss"] for line in raw_lines(run) if "loss" in line}


def commands(scale: Scale) -> Found:
    """Prepare data, train, measure the run's speed, and its merge rates in fp32 and bf16."""
    with tempfile.TemporaryDirectory(prefix="mlip-gpu-") as name, chdir(name):
        folder = Path(name)
        said(folder, "prepare-data", "openmoji", "data/openmoji", "--limit", str(scale.samples))
        statements, figures = trained(folder, scale.overrides)
        size = ("--rounds", "5", "--batch-size", str(scale.small_batch_size))
        profiled = said(folder, "profile", "runs/smoke", *size)
        lines = []
        for precision in ("fp32", "bf16"):
            options = ("--rates", "0.5", "--pictures", "0", "--precision", precision)
            sweep = said(folder, "merge-sweep", "runs/smoke", *options, *size)
            lines.append({"precision": sweep["precision"], "device": sweep["device"], "points": sweep["points"]})
    devices = {profiled["device"].partition(":")[0], *(own["device"].partition(":")[0] for own in lines)}
    return Found(
        f"killed at {figures['killed_at_checkpoint']}, finished at {figures['steps']}; all commands ended well",
        statements={
            **statements,
            f"commands chose {scale.device_type}": devices == {scale.device_type},
            "sweeps ran in the precision that was asked for": [own["precision"] for own in lines] == ["fp32", "bf16"],
        },
        figures=figures | {"limit": profiled["limit"], "sweeps": lines},
    )
