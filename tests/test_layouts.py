"""The layouts that people download, from start to score by README's words alone."""

from pathlib import Path

import pytest
from borders_for_tests import numbered
from command_for_tests import mlip
from layouts_for_tests import LAYOUTS, Pair
from shards_for_tests import COLORS
from sources_for_tests import samples

NUM_PAIRS = 80
SMALL = (
    "data.image_size=32", "data.num_workers=0", "model.vision.width=16", "model.vision.num_heads=2",
    "model.text.width=16", "model.text.num_heads=2", "model.embed_dim=16", "train.steps=2", "train.global_batch_size=8",
    "optim.warmup_steps=1", "evaluate.every_steps=2", "evaluate.zeroshot=[]", "train.device=cpu",
    "train.precision=fp32",
)  # fmt: skip


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    """Pictures with two captions each, in eight classes."""
    return [
        Pair(numbered(i, "jpg"), (f"picture {i} in {COLORS[i % 8]}", f"{COLORS[i % 8]}, number {i}"), COLORS[i % 8])
        for i in range(NUM_PAIRS)
    ]


@pytest.mark.parametrize(
    ("layout", "captions", "splits"),
    [
        ("flickr8k", 2, {"train": NUM_PAIRS}),
        ("coco", 2, {"train": 64, "validation": 16}),
        ("imagefolder", 1, {"train": 64, "validation": 16}),
        ("hub", 2, {"train": 64, "validation": 16}),
        ("img2dataset", 1, {"train": NUM_PAIRS}),
    ],
)
def test_a_layout_goes_from_start_to_score(
    layout: str, captions: int, splits: dict[str, int], pairs: list[Pair], tmp_path: Path
) -> None:
    LAYOUTS[layout](tmp_path / "mine", pairs)
    prepared = mlip("prepare-data", "mine", "data/mine", folder=tmp_path)
    assert prepared.returncode == 0, prepared.stderr
    found = {split: samples(tmp_path / "data" / "mine", split) for split in ("train", "validation", "test")}
    if len(splits) == 1:  # held out by us
        found["train"] += found.pop("validation")
    assert {split: len(own) for split, own in found.items() if own} == splits
    for sample in (sample for own in found.values() for sample in own):
        assert len(sample["captions"]) == captions
    trained = mlip("pretrain", "openmoji_clip", "--out", "runs/mine", "data.train=data/mine/train",
                   "data.validation=data/mine/validation", *SMALL, folder=tmp_path)  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert "image to text" in trained.stderr
