"""Towers of the large recipes are OpenCLIP's, so that runs of the plain ones export."""

from pathlib import Path

import pytest
from models_for_tests import make_run

from mlip_cli.errors import UsageError
from mlip_cli.export.write import write_format
from mlip_cli.recipe.architecture import of_open_clip
from mlip_cli.recipe.load import load_recipe
from mlip_cli.runs.foreign import open_clip_configuration
from mlip_cli.runs.loading import load_run

PLAIN = ("model.frequency=null", "model.vision.pool=null")
"""What makes a run of an MLIP recipe exportable, by its header."""
BASELINES = ("clip", "clip_tome", "filip", "flip", "siglip")


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        *((f"baselines/{name}", "ViT-B-16") for name in BASELINES),
        ("cc12m", "ViT-B-16"),
        ("cc3m", "ViT-B-16"),
        ("yfcc15m_v1", "ViT-B-16"),
        ("yfcc15m_v2", "ViT-B-32"),
        ("single_gpu", "ViT-S-16"),
    ],
)
def test_the_towers_are_open_clips(name: str, theirs: str) -> None:
    recipe = load_recipe(name, () if name.startswith("baselines/") else PLAIN).recipe
    described = of_open_clip(open_clip_configuration(theirs), source=theirs)
    assert recipe.model.vision == described.model.vision
    assert recipe.model.text == described.model.text
    assert recipe.data.image_size == described.data.image_size
    stem = load_recipe(name).recipe.model.frequency
    assert (stem is not None and stem.placement == "stem") != name.startswith("baselines/")


@pytest.mark.slow
def test_a_plain_run_of_single_gpu_exports_with_its_features(tmp_path: Path) -> None:
    recipe = load_recipe("single_gpu", (*PLAIN, "model.text.depth=3", "model.vision.depth=4")).recipe
    make_run(tmp_path / "run", recipe)
    loaded = load_run(str(tmp_path / "run"), device="cpu")
    for format in ("open_clip", "huggingface"):
        (tmp_path / format).mkdir()
        written = write_format(loaded, tmp_path / format, format=format, merge_rate=None)
        assert written.difference < 1e-5, format


@pytest.mark.slow
def test_a_run_with_its_spectral_blocks_does_not_export(tmp_path: Path) -> None:
    make_run(tmp_path / "run", load_recipe("single_gpu", ("model.text.depth=1", "model.vision.depth=4")).recipe)
    loaded = load_run(str(tmp_path / "run"), device="cpu")
    with pytest.raises(UsageError, match="the image tower begins with 2 spectral blocks"):
        write_format(loaded, tmp_path, format="open_clip", merge_rate=None)
