"""Train and measure what is not measured yet: python -m ablation.train_all DATA OUT [--jobs N] [--stages PSHCE].

Stages follow one another by the rules of stages.py, until one says stop. Results are JSONs in OUT/results, written when
they are whole; a training that was interrupted goes on from its checkpoint. To go on from the results of another
machine, copy them there.
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
from ablation.results import found_in
from ablation.runs import AblationRun, Missing
from ablation.stages import STAGES, Stage

from mlip_cli.recipe.config import Recipe
from mlip_cli.recipe.load import load_recipe, recipe_yaml
from mlip_cli.runs.folder import checkpoint_name

FOLDER = Path(__file__).resolve().parent
RECIPES = FOLDER.parents[1] / "recipes" / "ablation"
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


@dataclass
class Queue:
    """What the workers share."""

    data: Path
    out: Path
    stopping: threading.Event = field(default_factory=threading.Event)

    def result(self, name: str) -> Path:
        return self.out / "results" / f"{name}.json"

    def is_done(self, run: AblationRun) -> bool:
        return all(self.result(name).exists() for name in run.results)

    def overrides(self, run: AblationRun) -> list[str]:
        """Changes to the recipe."""
        return [f"data.train={self.data / run.train}", *run.overrides, f"seed={run.seed}"]

    def work(self, run: AblationRun) -> None:
        """Train, then measure; nothing once another run has failed or been interrupted."""
        folder = self.out / "runs" / run.label
        stop = ["--stop-at", str(run.checkpoints[-1])] if run.checkpoints else []
        recipe = str(RECIPES / f"{run.recipe}.yaml")
        self._call(run, ["-m", "ablation.train_one", str(folder), recipe, *self.overrides(run), *stop])
        places = [folder / "checkpoints" / checkpoint_name(step) for step in run.checkpoints] or [folder]
        for place, name in zip(places, run.results, strict=True):
            measure = ["-m", "ablation.measure", str(place), str(self.result(name))]
            self._call(run, [*measure, "--data", str(self.data), "--split", run.split])
        if not self.stopping.is_set():
            print(f"{run.label}: measured", flush=True)

    def _call(self, run: AblationRun, arguments: Sequence[str]) -> None:
        if self.stopping.is_set():
            return
        log = self.out / "logs" / f"{run.label}.log"
        paths = os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])  # for ablation.*
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


def check(runs: Sequence[AblationRun], queue: Queue) -> None:
    """Load every recipe, so that a mistake shows before the first training.

    Raises:
        SystemExit: a result is of a recipe that has changed since.
    """
    for run in runs:
        recipe = load_recipe(str(RECIPES / f"{run.recipe}.yaml"), queue.overrides(run)).recipe
        for name in run.results:
            result = queue.result(name)
            if result.exists() and (changes := changed_since(result, recipe)):
                cure = f"to train it again remove it and {queue.out / 'runs' / run.label}"
                raise SystemExit(f"{result}: the recipe has changed since ({', '.join(changes)}); {cure}")


def train_all(runs: Sequence[AblationRun], queue: Queue, *, jobs: int) -> None:
    """Do every run that has no result yet, `jobs` at a time.

    Raises:
        SystemExit: see `check`.
        RuntimeError: a training or its measure failed; those that were at work have ended, no other was begun.
    """
    for name in ("results", "logs", "runs"):
        (queue.out / name).mkdir(parents=True, exist_ok=True)
    check(runs, queue)
    pending = [run for run in runs if not queue.is_done(run)]
    print(f"{len(pending)} of {len(runs)} runs to do, {jobs} at a time", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for done in [pool.submit(queue.work, run) for run in pending]:
                done.result()
        except KeyboardInterrupt:
            queue.stopping.set()  # the trainings got the signal too: they save and end
            raise


def train_stages(stages: Sequence[Stage], queue: Queue, *, jobs: int) -> None:
    """One stage after the other; a decision to stop ends them.

    Raises:
        SystemExit: a stage needs a result of an earlier one that is not among `stages` and not there.
    """
    for stage in stages:
        try:
            runs = stage.runs(found_in(queue.out / "results"))
        except Missing as missing:
            raise SystemExit(f"stage {stage.letter}: {missing}; train the stages before it") from None
        print(f"stage {stage.letter}", flush=True)
        train_all(runs, queue, jobs=jobs)
        if stage.decide is not None:
            decision = stage.decide(found_in(queue.out / "results"))
            print(f"{'go on' if decision.goes_on else 'stop'}: {decision.reason}", flush=True)
            if not decision.goes_on:
                return


def main() -> None:
    parser = argparse.ArgumentParser(prog="ablation.train_all", description=__doc__)
    parser.add_argument("data", type=Path, help="folder that ablation.prepare wrote")
    parser.add_argument("out", type=Path)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings at a time, one thread each")
    letters = "".join(stage.letter for stage in STAGES)
    parser.add_argument("--stages", default=letters, help="letters of the stages to run, see stages.py")
    arguments = parser.parse_args()
    stages = [stage for stage in STAGES if stage.letter in arguments.stages]
    try:
        train_stages(stages, Queue(arguments.data.resolve(), arguments.out.resolve()), jobs=arguments.jobs)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
