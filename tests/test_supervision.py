"""What each loss of the shipped recipes teaches: its gradient in the blocks of the image tower."""

import pytest
import torch
from models_for_tests import small_recipe

from mlip_cli.losses.objective import Objective
from mlip_cli.model.clip import CLIP, build_model
from mlip_cli.recipe.config import LOSS_NAMES, Recipe
from mlip_cli.recipe.load import load_recipe
from mlip_cli.train.gradients import Precision, add_gradients
from mlip_cli.train.noise import noise_batch

CPU = torch.device("cpu")
SMALL = (
    "data.image_size=32",
    "model.vision={timm: null, patch_size: 8, width: 32, depth: 4, num_heads: 2}",
    "model.text={width: 32, depth: 2, num_heads: 2, context_length: 16}",
    "train.global_batch_size=8",
    "train.micro_batch_size=null",
)
MLIP = ("openmoji", "laptop", "single_gpu", "cc3m", "cc12m", "yfcc15m_v1", "yfcc15m_v2")


def taught_blocks(recipe: Recipe, loss: str) -> list[bool]:
    """Of each block of the image tower, whether `loss` alone changes all of its matrices."""
    others = {name: None for name in LOSS_NAMES if name != loss}
    torch.manual_seed(0)
    model: CLIP = build_model(recipe)
    batch = noise_batch(recipe, batch_size=8, num_tokens=8, device=CPU)
    add_gradients(
        model, Objective(recipe.losses.model_copy(update=others)), batch,
        precision=Precision.named("fp32", CPU), micro_batch_size=None, plan=model.training_plan,
    )  # fmt: skip
    return [
        all(p.grad is not None and p.grad.abs().max() > 0 for p in block.parameters() if p.ndim > 1)
        for block in model.vision.trunk.blocks
    ]


@pytest.mark.parametrize("name", MLIP)
def test_every_loss_of_a_shipped_recipe_teaches_the_tower_below_it(name: str) -> None:
    recipe = load_recipe(name, list(SMALL)).recipe
    frequency = recipe.model.frequency
    assert frequency is not None
    assert frequency.placement == "stem"
    depth = recipe.model.vision.depth or 0
    losses = [loss for loss in LOSS_NAMES if getattr(recipe.losses, loss) is not None]
    assert len(losses) >= 3
    for loss in losses:
        reached = frequency.depth if loss.startswith("frequency_") else depth
        assert taught_blocks(recipe, loss) == [True] * reached + [False] * (depth - reached), loss


def test_a_branch_teaches_the_whole_tower_by_alignment_alone() -> None:
    recipe = small_recipe(losses={"align": {}})
    assert taught_blocks(recipe, "align") == [True] * 4
    for loss in ("frequency_global", "frequency_token"):
        assert taught_blocks(recipe, loss) == [False] * 4
