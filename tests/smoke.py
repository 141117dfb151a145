"""Every command once, on real data, in a temporary folder, each with --json. Run by `make smoke`."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SMOKE = str(Path(__file__).parents[1] / "recipes" / "smoke.yaml")

COMMANDS = (
    ("prepare-data", "openmoji", "data/openmoji", "--limit", "200"),
    ("pretrain", SMOKE, "--out", "runs/smoke"),
    ("eval-zeroshot", "runs/smoke", "--dataset", "openmoji,openmoji_combinations", "--merge-rate", "0,0.5"),
    ("merge-sweep", "--rates", "0.3,0.5", "--rounds", "5", "--batch-size", "16"),
    ("eval-zeroshot", "--task", "retrieval"),
    ("search", "runs/smoke", "a red heart", "--images", "data/openmoji"),
    ("profile", "--rounds", "5", "--batch-size", "8"),
    ("report", "runs/smoke"),
)


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def run(*arguments: str, folder: Path) -> Any:
    """Run `mlip ARGUMENTS --json` inside `folder` and return what it printed, parsed strictly."""
    command = [sys.executable, "-m", "mlip_cli", *arguments, "--json"]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"smoke: mlip {' '.join(arguments)} --json ended with {done.returncode}")
    try:
        result = json.loads(done.stdout, parse_constant=refuse)
    except ValueError as error:
        sys.exit(f"smoke: mlip {' '.join(arguments)} --json printed no strict JSON ({error}):\n{done.stdout[:500]}")
    print(f"smoke: {arguments[0]} {time.perf_counter() - start:.1f} s", flush=True)
    return result


def main() -> None:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        for command in COMMANDS:
            run(*command, folder=Path(name))
    print(f"smoke: all fine, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
