"""What a training step of each recipe costs, in turn in one process: python -m ablation.speed DATA OUT [ROUNDS].

One thread, one real batch. The steps of stage D are fixed from the ratios, so run it while nothing else runs.
"""

import sys
from contextlib import closing
from pathlib import Path

import torch
from ablation.train_all import RECIPES

from mlip_cli.commands.training_setup import build, open_batches, open_data
from mlip_cli.commands.training_step import TrainingStep
from mlip_cli.files import write_json
from mlip_cli.output import print_table
from mlip_cli.profiling import measure_interleaved
from mlip_cli.recipe import load_recipe

NAMES = ("clip", "mlip", "mlip_half", "mlip_half_tome", "mlip_half_drop", "mlip_third")
CPU = torch.device("cpu")


def training_step(name: str, data: Path) -> TrainingStep:
    """A step of the recipe on its own first batch."""
    sources = [f"data.train={data / 'train'}", f"data.validation={data / 'validation'}"]
    recipe = load_recipe(str(RECIPES / f"{name}.yaml"), sources).recipe
    with closing(open_batches(recipe, open_data(recipe), CPU, start_step=0)) as batches:  # type: ignore[type-var]
        batch = next(batches)
    model = build(recipe, CPU, fresh=True)[0].plain
    return TrainingStep(model.train(), recipe, batch, CPU)


def main(data: Path, out: Path, rounds: int) -> None:
    torch.set_num_threads(1)
    timings = measure_interleaved({name: training_step(name, data) for name in NAMES}, rounds)
    steps = 500
    found = {
        name: {
            "speed_of_clip": timing.speedup,
            "interval": timing.speedup_interval,
            "steps_in_the_time_of_clip": round(steps * timing.speedup),
            "seconds": timing.seconds,
        }
        for name, timing in timings.items()
    }
    write_json(out, found)
    against_mlip = timings["mlip"].median_s
    rows = [
        [
            name,
            f"{timing.speedup:.3f} ({timing.speedup_interval[0]:.3f}-{timing.speedup_interval[1]:.3f})",
            f"{against_mlip / timing.median_s:.2f}",
            str(round(steps * timing.speedup)),
        ]
        for name, timing in timings.items()
    ]
    print_table(["recipe", "speed / clip's (95 %)", "speed / mlip's", f"steps in the time of {steps}"], rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 7)
