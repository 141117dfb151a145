"""How far guided merging moves the features of a trained model, against ToMe's rule at the same tokens.

    make bench                    or, alone:    python tests/benchmarks/bench_distortion.py

Printed are means and 95th percentiles of 1 - cosine to the unmerged feature over the run's validation pictures, times
1000. Aim: half of ToMe's mean or less at rates 0.5 and 0.7.

MLIP_BENCH_RUN: a run folder, or one of its checkpoints. Without it recipes/openmoji_clip.yaml trains first, in minutes.
"""

import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import torch

from mlip_cli.evaluate.merge_points import distortions, sweep_points
from mlip_cli.evaluate.sweep import DISTORTED_PICTURES, open_datasets
from mlip_cli.evaluate.wanted import VALIDATION, WantedData
from mlip_cli.runs.loading import load_run
from mlip_cli.terminal.output import print_lines, print_table

RATES = (0.3, 0.5, 0.6, 0.7, 0.8)
METHODS = ("guided", "tome")
BATCH_SIZE = 64
RECIPE = Path(__file__).parents[2] / "recipes" / "openmoji_clip.yaml"


def trained(folder: Path) -> str:
    """The run that the environment names, or a new one in `folder`."""
    if named := os.environ.get("MLIP_BENCH_RUN"):
        return named
    for command in (("prepare-data", "openmoji", "data/openmoji"), ("pretrain", str(RECIPE), "--out", "run")):
        subprocess.run([sys.executable, "-m", "mlip_cli", *command], cwd=folder, check=True)
    return str(folder / "run")


def rows(run: str) -> list[list[str]]:
    """One row a rate that both methods reach."""
    loaded = load_run(run, device="cpu")
    [dataset], _ = open_datasets(loaded, WantedData({VALIDATION: None}, {}), batch_size=BATCH_SIZE)
    images = torch.stack([chosen.image for chosen in dataset.choose(DISTORTED_PICTURES)])
    points = sweep_points(loaded, RATES, METHODS)
    found = distortions(loaded, points, images, batch_size=BATCH_SIZE)
    pairs = sorted(zip(found, points[1:], strict=True), key=lambda pair: pair[0].rate)
    return [
        [
            f"{guided.true_rate:.3f}",
            " ".join(map(str, point.encoder.plan.tokens)),
            *(f"{1000 * own.mean:.4f} ({1000 * own.p95:.3f})" for own in (guided, tome)),
            f"{guided.mean / tome.mean:.2f}",
            str(len(images)),
        ]
        for (guided, point), (tome, _) in list(pairwise(pairs))[::2]
    ]


def test_distortion_of_merging() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = trained(Path(folder))
        columns = [
            "rate",
            "tokens of the blocks",
            "guided: mean (p95)",
            "tome: mean (p95)",
            "guided / tome",
            "pictures",
        ]
        print_table(columns, rows(run), title=f"1000 x (1 - cosine) to the unmerged feature: {run}")
        print_lines(f"{torch.get_num_threads()} threads")


if __name__ == "__main__":
    test_distortion_of_merging()
