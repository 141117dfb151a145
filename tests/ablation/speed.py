"""CPU time of a training step of each recipe: python -m ablation.speed DATA OUT [ROUNDS].

The steps of stage D are fixed from the ratios. Each recipe trains in a process of its own on one thread, reading its
batches, in turn with the others. Only CPU time counts: a training of the queue may run on another core, as it does
while the runs are made.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from statistics import median

import torch
from ablation.train_all import RECIPES, THREADS

from mlip_cli.files import write_json
from mlip_cli.profiling.step import RepeatedStep
from mlip_cli.recipe.load import load_recipe
from mlip_cli.terminal.output import print_table
from mlip_cli.train.setup import build, open_batches, open_data, training_device

NAMES = ("clip", "mlip", "mlip_half", "mlip_half_tome")
WARM_UP, STEPS, STEPS_OF_CLIP = 3, 15, 500


def seconds_a_step(name: str, data: Path) -> float:
    """CPU seconds of this process for a step, reading included: a mean over `STEPS`."""
    sources = [f"data.train={data / 'train'}", "data.validation=null"]
    recipe = load_recipe(str(RECIPES / f"{name}.yaml"), sources).recipe
    device = training_device(recipe)
    model = build(recipe, device, fresh=True)[0].plain.train()
    with closing(open_batches(recipe, open_data(recipe), device, start_step=0)) as batches:  # type: ignore[type-var]
        step = RepeatedStep(model, recipe, next(batches), device)
        for number in range(WARM_UP + STEPS):
            if number == WARM_UP:
                began = time.process_time()
            step.batch = next(batches)
            step()
    return (time.process_time() - began) / STEPS


def main(data: Path, out: Path, rounds: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(rounds):
        for name in NAMES:
            one = [sys.executable, "-m", "ablation.speed", str(data), name]
            found = subprocess.run(one, env=os.environ | THREADS, check=True, stdout=subprocess.PIPE).stdout
            seconds[name].append(float(found))
    against = {base: {name: ratios(seconds[base], own) for name, own in seconds.items()} for base in ("clip", "mlip")}
    steps = {name: round(STEPS_OF_CLIP * median(speeds)) for name, speeds in against["clip"].items()}
    write_json(out, {"cpu_seconds_a_step": seconds, f"steps_in_the_time_of_{STEPS_OF_CLIP}_of_clip": steps})
    rows = [
        [name, f"{median(seconds[name]):.2f}", *(shown(speeds[name]) for speeds in against.values()), str(steps[name])]
        for name in NAMES
    ]
    columns = ["recipe", "CPU s a step", "speed / clip's (range)", "speed / mlip's (range)"]
    print_table([*columns, f"steps in the time of {STEPS_OF_CLIP}"], rows)


def ratios(base: list[float], own: list[float]) -> list[float]:
    """How many times as fast as the base, of each round."""
    return [b / o for b, o in zip(base, own, strict=True)]


def shown(speeds: list[float]) -> str:
    """Median and range."""
    return f"{median(speeds):.2f} ({min(speeds):.2f}-{max(speeds):.2f})"


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[2] in NAMES:
        print(json.dumps(seconds_a_step(sys.argv[2], Path(sys.argv[1]))))
    else:
        main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 5)
