"""Parameter groups: with and without layer decay, and with a tower that is frozen."""

from typing import Any

import pytest
import torch
from models_for_tests import small_batch, small_model, small_recipe
from torch import Tensor, nn

from mlip_cli.losses.objective import Objective
from mlip_cli.recipe.config import Recipe, Vision
from mlip_cli.train.gradients import Precision, add_gradients
from mlip_cli.train.optim import build_optimizer, is_decayed, set_learning_rate

CPU = torch.device("cpu")


def gradients_of(model: nn.Module, recipe: Recipe) -> None:
    precision = Precision.named("fp32", CPU)
    add_gradients(
        model.train(),
        Objective(recipe.losses),
        small_batch(),
        precision=precision,
        micro_batch_size=None,
        plan=model.plan,
    )


def scales_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Name of each parameter -> lr_scale of its group; each must be in exactly one."""
    names = {id(p): name for name, p in model.named_parameters()}
    listed = [(names[id(p)], group["lr_scale"]) for group in optimizer.param_groups for p in group["params"]]
    assert len(listed) == len(dict(listed))
    return dict(listed)


@pytest.mark.slow
def test_without_layer_decay_a_step_is_that_of_two_groups_to_the_bit() -> None:
    recipe = small_recipe()
    model, plain = (small_model(recipe, dtype=torch.float32) for _ in range(2))
    named = list(plain.named_parameters())
    reference = torch.optim.AdamW(
        [
            {"params": [p for name, p in named if is_decayed(name, p)], "weight_decay": recipe.optim.weight_decay},
            {"params": [p for name, p in named if not is_decayed(name, p)], "weight_decay": 0.0},
        ],
        lr=recipe.optim.lr,
        betas=recipe.optim.betas,
        eps=recipe.optim.eps,
        fused=True,
    )
    optimizer = build_optimizer(model, recipe.optim)
    assert [len(group["params"]) for group in optimizer.param_groups] == [
        len(group["params"]) for group in reference.param_groups
    ]
    for step in (1, 2, 3):
        for changed, own in ((model, optimizer), (plain, reference)):
            gradients_of(changed, recipe)
            set_learning_rate(own, 1e-3 * step)
            own.step()
            own.zero_grad()
    assert all(torch.equal(p, dict(named)[name]) for name, p in model.named_parameters())


def expected_scale(name: str, decay: float, *, image_depth: int, text_depth: int) -> float:
    """The rule once more, by names: blocks count down from the top, all below the first block is one further down."""
    words = name.split(".")
    if words[0] not in ("vision", "text"):
        return 1.0
    inside = words[2:] if words[0] == "vision" else words[1:]
    depth = image_depth if words[0] == "vision" else text_depth
    if inside[0] == "blocks":
        return decay ** (depth - 1 - int(inside[1]))
    return 1.0 if inside[0] in ("norm", "fc_norm", "attn_pool") else decay**depth


@pytest.mark.parametrize(
    ("vision", "size", "depth"),
    [
        ({}, 32, 4),
        ({"timm": "vit_xsmall_patch16_clip_224"}, 32, 10),
        ({"timm": "vit_tiny_r_s16_p8_224"}, 64, 12),
    ],
)
def test_layer_decay_counts_blocks_from_each_towers_top(vision: dict[str, Any], size: int, depth: int) -> None:
    recipe = small_recipe(optim={"layer_decay": 0.5}, data={"image_size": size})
    tower = Vision(**vision) if vision else recipe.model.vision
    towers = recipe.model.model_copy(update={"vision": tower, "merging": None})
    recipe = recipe.model_copy(update={"model": towers})
    model = small_model(recipe, dtype=torch.float32)
    optimizer = build_optimizer(model, recipe.optim)
    scales = scales_of(model, optimizer)
    assert scales == {
        name: expected_scale(name, 0.5, image_depth=depth, text_depth=2) for name, _ in model.named_parameters()
    }
    assert scales["vision.trunk.pos_embed"] == 0.5**depth
    assert scales["text.token_embedding.weight"] == 0.25
    assert scales["frequency.blocks.0.filter.kernel"] == scales["image_projection.weight"] == 1
    set_learning_rate(optimizer, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.1 * group["lr_scale"])
        for p in group["params"]:
            decayed = is_decayed(names[id(p)], p)
            assert group["weight_decay"] == (recipe.optim.weight_decay if decayed else 0.0)


def test_blocks_of_a_spectral_stem_count_as_blocks_of_the_tower() -> None:
    frequency = {"placement": "stem", "width": 32, "depth": 2}
    recipe = small_recipe(model={"frequency": frequency, "merging": None}, optim={"layer_decay": 0.5})
    model = small_model(recipe, dtype=torch.float32)
    scales = scales_of(model, build_optimizer(model, recipe.optim))
    kernels = {name: scale for name, scale in scales.items() if name.endswith("kernel")}
    assert sorted(kernels.values()) == [0.125, 0.25]  # the lower two of four blocks
    assert scales["vision.trunk.pos_embed"] == 0.0625
    assert scales["vision.trunk.norm.weight"] == 1


def test_rates_without_a_scale_and_after_loading_stay_what_they_are() -> None:
    recipe = small_recipe(optim={"layer_decay": 0.5})
    model = small_model(recipe, dtype=torch.float32)
    saved = build_optimizer(model, recipe.optim).state_dict()
    optimizer = build_optimizer(model, recipe.optim)
    optimizer.load_state_dict(saved)
    assert set(scales_of(model, optimizer).values()) == {1.0, 0.5, 0.25, 0.125, 0.0625}
    plain = torch.optim.SGD(model.parameters(), lr=1.0)
    set_learning_rate(plain, 0.1)
    assert plain.param_groups[0]["lr"] == 0.1


def parameters_of(tower: str) -> tuple[str, str]:
    return {"image": ("vision.", "image_projection."), "text": ("text.", "text_projection.")}[tower]


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch_size", [None, 3])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_frozen_tower_keeps_its_bits_and_the_rest_trains(tower: str, micro_batch_size: int | None) -> None:
    recipe = small_recipe(optim={"layer_decay": 0.9})
    model = small_model(recipe, dtype=torch.float32).train()
    model.freeze(tower)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, recipe.optim)
    for seed in range(3):
        add_gradients(
            model,
            Objective(recipe.losses),
            small_batch(seed=seed),
            precision=Precision.named("fp32", CPU),
            micro_batch_size=micro_batch_size,
            plan=model.training_plan,
        )
        assert {n for n, p in model.named_parameters() if p.grad is None} == {
            n for n in before if n.startswith(parameters_of(tower))
        }
        optimizer.step()
        optimizer.zero_grad()
    unchanged = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert unchanged == {name for name in before if name.startswith(parameters_of(tower))}
    assert scales_of(model, optimizer).keys() == before.keys() - unchanged


def test_a_frozen_text_tower_drops_nothing_and_the_image_tower_goes_on_merging() -> None:
    recipe = small_recipe(model={"text": {"width": 32, "depth": 2, "num_heads": 2, "dropout": 0.5}})

    def texts(model: Any, *, training: bool) -> Tensor:
        return model.train(training)(small_batch(), model.training_plan).text_features

    model = small_model(recipe, dtype=torch.float32)
    kept = texts(model, training=False)
    assert not torch.equal(texts(model, training=True), kept)
    model.train().freeze("text")  # takes hold at once, and again with each train()
    assert torch.equal(model(small_batch(), model.training_plan).text_features, kept)
    assert torch.equal(texts(model, training=True), kept)
    assert model.vision.training
    assert model.frequency.training
    model.freeze("image")
    assert not any(module.training for module in model.vision.modules())
    assert model.train()(small_batch(), model.training_plan).image_tokens.shape[1] == model.plan.tokens[-1] < 16
