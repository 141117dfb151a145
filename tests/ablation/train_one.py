"""One training and its CPU time: ablation.train_one RUN RECIPE [KEY=VALUE...] [--stop-at STEP].

It goes on where it was. A training whose learning rate stays constant is the beginning of a very long one: `--stop-at`
ends it after the checkpoint of that step.
"""

import argparse
import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

from mlip_cli.__main__ import main as mlip
from mlip_cli.runs.folder import Run, checkpoint_name
from mlip_cli.train.signals import TERMINATED

CPU_TIMES = "cpu_s.jsonl"
"""In the run's folder: a line with the CPU seconds of each session that ended by itself or by a signal."""

POLL_S = 0.2


def has_ended(run: Run, stop_at: int | None) -> bool:
    """Whether nothing is left to train."""
    return run.is_finished() if stop_at is None else (run.checkpoints / checkpoint_name(stop_at)).is_dir()


def stop_after(run: Run, stop_at: int) -> None:
    """Ask this process to end as soon as the checkpoint is there."""
    while not has_ended(run, stop_at):
        time.sleep(POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)


def cpu_s() -> float:
    """CPU seconds of this process and of those that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--stop-at", type=int)
    arguments = parser.parse_args()
    run, stop_at = Run(arguments.run), arguments.stop_at
    if has_ended(run, stop_at):
        return
    if stop_at is not None:
        threading.Thread(target=stop_after, args=(run, stop_at), daemon=True).start()
    sys.argv = ["mlip", "pretrain", arguments.recipe, *arguments.overrides, "--out", str(run.folder), "--resume"]
    try:
        mlip()
    except SystemExit as end:
        is_as_asked = stop_at is not None and has_ended(run, stop_at) and end.code == TERMINATED
        if end.code and not is_as_asked:
            raise
    finally:
        if run.folder.is_dir():
            with open(run.folder / CPU_TIMES, "a", encoding="utf-8") as file:
                file.write(json.dumps({"cpu_s": round(cpu_s(), 1)}) + "\n")


if __name__ == "__main__":
    main()
