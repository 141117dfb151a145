"""kill -9 at 30 random moments, then --resume: the whole of what tests/test_killed.py has a part of.

    make bench                    or, alone:    python tests/benchmarks/bench_kills.py

1, 2 and 3 ranks, fp32 and bf16, with and without loader processes; five kills in each run, in steps, checkpoints and
evaluations. After each kill the newest checkpoint is loaded; in the end metrics.jsonl and the last checkpoint are
compared to the bit with a run that was never stopped.
"""

import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from killed_for_tests import assert_same_run, killed_again_and_again, moments, trained_whole
from open_clip_peer import write_numbers
from test_killed import EVERY, STEPS, write_recipe

from mlip_cli.terminal.output import print_lines, print_table

DURING = ("evaluation", "checkpoint", "step", "checkpoint", "evaluation")
RUNS = tuple((ranks, precision) for ranks in (1, 2, 3) for precision in ("fp32", "bf16"))


def test_thirty_kills() -> None:
    rows, numbers = [], []
    with tempfile.TemporaryDirectory() as temporary:
        recipe = write_recipe(Path(temporary))
        for seed, (ranks, precision) in enumerate(RUNS):
            num_workers = 2 if ranks == 1 else seed % 2
            folder = Path(temporary) / f"run-{seed}"
            killed = killed_again_and_again(
                recipe,
                folder,
                [f"train.precision={precision}", f"data.num_workers={num_workers}"],
                ranks=ranks,
                moments=moments(100 + seed, steps=STEPS, during=DURING),
                every=EVERY,
            )
            assert_same_run(folder, trained_whole(recipe, ranks, precision))
            print_lines(f"{ranks} ranks, {precision}: equal after {len(killed)} kills")
            hits = Counter(kill.hit for kill in killed)
            counts = [str(hits[kind]) for kind in ("step", "checkpoint", "evaluation")]
            steps = " ".join(str(kill.step) for kill in killed)
            rows.append([str(ranks), precision, str(num_workers), *counts, steps, "equal"])
            numbers.append({"ranks": ranks, "precision": precision, "killed": [vars(kill) for kill in killed]})
    columns = ["ranks", "precision", "loaders", "in steps", "in checkpoints", "in evaluations", "after steps", "bits"]
    print_table(columns, rows)
    assert sum(len(run["killed"]) for run in numbers) >= 20  # type: ignore[arg-type]
    write_numbers("kills", numbers)


if __name__ == "__main__":
    test_thirty_kills()
