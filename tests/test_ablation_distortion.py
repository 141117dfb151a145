"""The ablation's distortion on a small run, against loops."""

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from ablation import distortion
from models_for_tests import make_run, small_recipe
from PIL import Image

from mlip_cli.runs.loading import load_run


def test_rows_equal_loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "run", small_recipe(mlip=False))
    pictures = np.full((3, 32, 32, 3), 255, dtype=np.uint8)
    pictures[:, 8:16, 8:24] = np.random.default_rng(0).integers(256, size=(3, 8, 16, 3))  # 2 of 16 patches are drawn
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for number, picture in enumerate(pictures):
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "PNG")
            member = tarfile.TarInfo(f"{number}.png")
            member.size = file.tell()
            tar.addfile(member, io.BytesIO(file.getvalue()))
    out = tmp_path / "out.json"
    given = ["", str(out), "--runs", str(tmp_path / "run"), "--pictures", f"mine={tmp_path / 'set.tar'}"]
    monkeypatch.setattr(sys, "argv", [*given, "--rates", "0.5", "0.9", "--places", "default", "2,3"])
    distortion.main()
    rows = json.loads(out.read_text())
    # rate 0.9 takes four merges, and the tower has places for three
    found = [(row["method"], row["at"], row["rate"]) for row in rows]
    assert found == [(m, at, 0.5) for m in ("guided", "tome") for at in ([2, 3, 4], [2, 3])]

    model = load_run(str(tmp_path / "run"), device="cpu").model
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    plan, row = model.merge_plan(0.5, "guided"), rows[0]
    assert row["tokens"] == pytest.approx(sum(plan.tokens) / 64, abs=1e-4)
    unmerged, merged = (model.encode_image(images, p).double() for p in (model.merge_plan(0.0), plan))
    moved = [1 - torch.cosine_similarity(a, b, dim=0).item() for a, b in zip(unmerged, merged, strict=True)]
    assert row["mean"] == pytest.approx(np.mean(moved), rel=1e-3, abs=1e-9)
    assert row["p95"] == pytest.approx(np.quantile(moved, 0.95), rel=1e-3, abs=1e-9)

    stages, drawn = model.merge_stages(images, plan), {5, 6}
    shares: dict[bool, list[float]] = {True: [], False: []}
    for groups in stages[-1].groups.tolist():
        for patch in range(16):
            shares[patch in drawn].append(1 / groups.count(groups[patch]))
    for is_drawn, name in ((True, "drawn"), (False, "blank")):
        own = shares[is_drawn]
        assert row[f"{name}_patches_a_token"] == pytest.approx(len(own) / sum(own), abs=0.006)
        maps = [stage.mixed for stage in stages if stage.mixed is not None]
        means = [values[:, [(i in drawn) == is_drawn for i in range(16)]].mean().item() for values in maps]
        assert row[f"{name}_guidance"] == pytest.approx(means, abs=6e-4)
    assert rows[-1]["drawn_guidance"] == []
