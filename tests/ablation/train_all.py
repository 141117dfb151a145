"""Train and measure what is not measured yet: python -m ablation.train_all DATA OUT [--jobs N] [--stages ABCDE].

One JSON a run in OUT/results, written when it is whole; a training that was interrupted goes on from its checkpoint.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from ablation.runs import RUNS, AblationRun

from mlip_cli.recipe.config import Recipe
from mlip_cli.recipe.load import load_recipe, recipe_yaml

FOLDER = Path(__file__).resolve().parent
RECIPES = FOLDER.parents[1] / "recipes" / "ablation"
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


@dataclass
class Queue:
    """What the workers share."""

    data: Path
    out: Path
    stopping: threading.Event = field(default_factory=threading.Event)

    def result(self, run: AblationRun) -> Path:
        return self.out / "results" / f"{run.label}.json"

    def overrides(self, run: AblationRun) -> list[str]:
        """Changes to the recipe; what it measures while training would cost time and be read by nobody."""
        return [f"data.train={self.data / 'train'}", "data.validation=null", *run.overrides, f"seed={run.seed}"]

    def work(self, run: AblationRun) -> None:
        """Train, then measure; nothing once another run has failed or been interrupted."""
        folder = self.out / "runs" / run.label
        train = ["-m", "mlip_cli", "pretrain", str(RECIPES / f"{run.recipe}.yaml"), *self.overrides(run)]
        self._call(run, [*train, "--out", str(folder), "--resume"])
        measure = ["-m", "ablation.measure", str(folder), str(self.result(run))]
        self._call(run, [*measure, "--data", str(self.data), "--split", run.split])
        if not self.stopping.is_set():
            print(f"{run.label}: measured", flush=True)

    def _call(self, run: AblationRun, arguments: Sequence[str]) -> None:
        if self.stopping.is_set():
            return
        log = self.out / "logs" / f"{run.label}.log"
        paths = os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])  # for ablation.measure
        environment = os.environ | THREADS | {"PYTHONPATH": paths}
        with open(log, "a", encoding="utf-8") as file:
            code = subprocess.call([sys.executable, *arguments], stdout=file, stderr=subprocess.STDOUT, env=environment)
        if code and not self.stopping.is_set():
            self.stopping.set()
            raise RuntimeError(f"{run.label}: ended with {code}; see {log}")


def changed_since(result: Path, recipe: Recipe) -> list[str]:
    """What the recipe of a result had and the recipe of today has not; where the data lies is no matter."""
    then = leaves(yaml.safe_load(json.loads(result.read_bytes())["recipe"]))
    now = leaves(yaml.safe_load(recipe_yaml(recipe)))
    began = [key for key in then if any(name.startswith(f"{key}.") for name in now)]  # sections that were null
    return [f"{key} null -> a section" for key in began] + [
        f"{key} {value} -> {now.get(key)}"
        for key, value in then.items()
        if value != now.get(key) and key not in ("data.train", "data.validation")
    ]


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def train_all(runs: Sequence[AblationRun], queue: Queue, *, jobs: int) -> None:
    """Do every run that has no result yet, `jobs` at a time; a mistake in a recipe shows before the first training.

    Raises:
        SystemExit: a result is of a recipe that has changed since.
        RuntimeError: a training or its measure failed; those that were at work have ended, no other was begun.
    """
    for name in ("results", "logs", "runs"):
        (queue.out / name).mkdir(parents=True, exist_ok=True)
    pending = [run for run in runs if not queue.result(run).exists()]
    for run in runs:
        recipe = load_recipe(str(RECIPES / f"{run.recipe}.yaml"), queue.overrides(run)).recipe
        changes = changed_since(queue.result(run), recipe) if run not in pending else []
        if changes:
            folder = queue.out / "runs" / run.label
            cure = f"to train it again remove it and {folder}"
            raise SystemExit(f"{queue.result(run)}: the recipe has changed since ({', '.join(changes)}); {cure}")
    print(f"{len(pending)} of {len(runs)} runs to do, {jobs} at a time", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for done in [pool.submit(queue.work, run) for run in pending]:
                done.result()
        except KeyboardInterrupt:
            queue.stopping.set()  # the trainings got the signal too: they save and end
            raise


def main() -> None:
    parser = argparse.ArgumentParser(prog="ablation.train_all", description=__doc__)
    parser.add_argument("data", type=Path, help="folder with train/, validation/ and test/, made by ablation.prepare")
    parser.add_argument("out", type=Path)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings at a time, one thread each")
    parser.add_argument("--stages", default="ABCDE", help="letters of the stages to run, see runs.py")
    arguments = parser.parse_args()
    runs = [run for run in RUNS if run.stage in arguments.stages]
    try:
        train_all(runs, Queue(arguments.data.resolve(), arguments.out.resolve()), jobs=arguments.jobs)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
