"""The host never waits for the device in a step, shown on fake CUDA tensors without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
RECIPES = ["cc12m.yaml", "baselines/clip.yaml", "baselines/siglip.yaml", "baselines/filip.yaml", "baselines/flip.yaml"]


@pytest.mark.slow
def test_the_host_never_waits_in_a_step() -> None:
    """MLIP, CLIP, SigLIP, FILIP and FLIP, as one rank of eight in bf16, with and without micro-batches, and the vote
    on stopping."""
    asked = [(str(FOLDER.parent / "recipes" / name), size) for name in RECIPES for size in (None, 3)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(FOLDER / "fake_step_for_tests.py")],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert dict(zip(asked, found, strict=True)) == {step: {} for step in asked}
