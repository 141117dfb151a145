"""One gradient, however it is computed: by micro-batches, or on two processes."""

import os
import weakref
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from forks_for_tests import own_group
from killed_for_tests import Forked
from models_for_tests import small_batch, small_model, small_recipe, with_lengths
from torch import nn

from mlip_cli.distributed import full_on_main, process_group, rank, unwrap, world_size, wrap
from mlip_cli.errors import RunError
from mlip_cli.losses.features import IMAGE, TEXT, TEXT_TOKENS, features_of
from mlip_cli.losses.objective import Objective
from mlip_cli.model import packing
from mlip_cli.recipe.config import LOSS_NAMES, Recipe
from mlip_cli.train import step
from mlip_cli.train.gradients import Precision, RandomState, add_gradients
from mlip_cli.train.optim import Schedule, build_optimizer, clamp_scales, is_decayed
from mlip_cli.train.state import Progress
from mlip_cli.train.step import MOST_SKIPPED_IN_A_ROW, FiniteGuard
from mlip_cli.types import Batch

CPU = torch.device("cpu")
SIGMOID = {"spatial_global": {"kind": "sigmoid"}}
FILIP = {"spatial_token": {"kind": "filip"}, "frequency_token": {"kind": "filip", "weight": 0.25}}
SMOOTH = {"spatial_global": {"label_smoothing": 0.1}}
WORDS_AND_POOLED = {
    **{f"{domain}_words": {"weight": 0.5} for domain in ("spatial", "frequency")},
    **{f"{domain}_token": {"kind": "pooled"} for domain in ("spatial", "frequency")},
}
CONCEPT = {"positives": "concept"}
RECIPES = {
    "clip": small_recipe(mlip=False),
    "sigmoid": small_recipe(mlip=False, losses=SIGMOID | CONCEPT),
    "mlip": small_recipe(),
    "mlip_sigmoid": small_recipe(losses=SIGMOID),
    "filip": small_recipe(losses=FILIP),
    "filip_sparc": small_recipe(losses=SMOOTH | CONCEPT | {"spatial_token": {"kind": "filip"}}),
    "stem": small_recipe(
        mlip=False,
        data={"captions_per_image": 3},
        model={"frequency": {"depth": 1}, "merging": {"rate": 0.25, "at": [3]}},
        losses={"frequency_global": {}, **WORDS_AND_POOLED},
    ),
    "align": small_recipe(losses=CONCEPT | WORDS_AND_POOLED | {"align": {"weight": 0.5}}),
}
SHARDED = ("mlip_sigmoid", "filip_sparc", "align")
"""Recipes whose gradient is also computed with sharded weights: between them they have every kind of loss."""
WORDS = [1, 2, 3, 4, 1, 6, 1, 1]
"""Of each caption: two ranks have 3 and 1 captions that losses inside pairs can use, and different numbers of words."""


@pytest.fixture(autouse=True)
def short_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions of 3 to 8 tokens in batches 10 wide run in several groups."""
    monkeypatch.setattr(packing, "WIDTHS", (4, 6, 8))


def batch_for(recipe: Recipe, *, packed: bool = True) -> Batch:
    """With concepts that two ranks, and several micro-batches, have in common."""
    labels = torch.tensor([4, 1, 2, 4, 1, 1, 7, 4]) if recipe.losses.positives == "concept" else None
    batch = small_batch(words=WORDS * recipe.data.captions_per_image)
    token_ids = torch.where(batch.token_ids < 3000, batch.token_ids % 50, batch.token_ids)  # captions share words
    other_images = small_batch(seed=1).images if recipe.losses.align is not None else None
    batch = replace(batch, token_ids=token_ids, labels=labels, other_images=other_images)
    return with_lengths(batch) if packed else batch


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(((found[n] - g).norm() / g.norm().clamp(min=1e-30)).item() for n, g in expected.items())


def one_process(recipe: Recipe, micro_batch_size: int | None, *, packed: bool = True) -> dict[str, torch.Tensor]:
    model = small_model(recipe).train()
    precision = Precision.named("fp32", CPU)
    add_gradients(
        model, Objective(recipe.losses), batch_for(recipe, packed=packed),
        precision=precision, micro_batch_size=micro_batch_size, plan=model.training_plan,
    )  # fmt: skip
    return gradients(model)


@pytest.mark.parametrize("name", RECIPES)
def test_texts_at_their_own_lengths_give_the_gradient_of_padded_ones(name: str) -> None:
    recipe = RECIPES[name]
    model, batch = small_model(recipe), batch_for(recipe)
    groups = model.text.groups(batch.text_lengths, 10)
    assert groups is not None
    assert [width for _, width in groups] == [4, 6, 8]
    packed, padded = (one_process(recipe, None, packed=packed) for packed in (True, False))
    assert relative_error(packed, padded) < 1e-10


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("micro_batch_size", [2, 3, 7])
def test_micro_batches_give_the_gradient_of_the_whole_batch(name: str, micro_batch_size: int) -> None:
    whole = one_process(RECIPES[name], None, packed=False)
    assert relative_error(one_process(RECIPES[name], micro_batch_size), whole) < 1e-10
    assert any("log_scales" in n for n in whole)


def test_micro_batches_need_no_loss_over_the_whole_batch() -> None:
    recipe = small_recipe(mlip=False, losses={"spatial_global": None, "spatial_token": {"kind": "sparc"}})
    whole, parts = (one_process(recipe, size) for size in (None, 3))
    assert relative_error(parts, whole) < 1e-10


@pytest.mark.parametrize("name", ["mlip", "filip_sparc", "stem", "align"])
def test_micro_batches_report_the_same_terms(name: str) -> None:
    recipe = RECIPES[name]
    model = small_model(recipe)
    terms = [
        add_gradients(
            model, Objective(recipe.losses), batch_for(recipe),
            precision=Precision.named("fp32", CPU), micro_batch_size=size, plan=model.training_plan,
        ) for size in (None, 3)
    ]  # fmt: skip
    assert terms[0].keys() == terms[1].keys() == set(Objective(recipe.losses).terms)
    for name, value in terms[0].items():
        torch.testing.assert_close(terms[1][name], value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_a_step_follows_the_merge_plan_that_it_is_given(micro_batch_size: int | None) -> None:
    recipe = RECIPES["filip"]
    given = small_model(recipe)
    own = small_model(small_recipe(losses=FILIP, model={"merging": {"rate": 0.25, "at": [2, 3]}}))
    for model in (given, own):
        add_gradients(
            model, Objective(recipe.losses), batch_for(recipe),
            precision=Precision.named("fp32", CPU), micro_batch_size=micro_batch_size, plan=own.training_plan,
        )  # fmt: skip
    assert relative_error(gradients(given), gradients(own)) == 0
    assert relative_error(gradients(given), one_process(recipe, micro_batch_size)) > 1e-3


def test_tokens_are_cached_only_where_a_loss_compares_them_over_the_batch() -> None:
    for name, expected in (("mlip", ()), ("filip_sparc", ("spatial_token",))):
        recipe = RECIPES[name]
        model = small_model(recipe)
        seen = []
        objective = Objective(recipe.losses)
        batch_terms = objective.batch_terms
        objective.batch_terms = lambda f, part, seen=seen, terms=batch_terms: seen.append(f.tensors) or terms(f, part)  # type: ignore
        add_gradients(
            model, objective, batch_for(recipe),
            precision=Precision.named("fp32", CPU), micro_batch_size=2, plan=model.training_plan,
        )  # fmt: skip
        assert tuple(loss for loss in LOSS_NAMES if f"tokens.{loss}" in seen[0]) == expected
        assert (TEXT_TOKENS in seen[0]) == bool(expected)


def test_no_micro_batch_keeps_the_tokens_of_another() -> None:
    """Memory grows with the micro-batch, not with the share: in each second pass all tokens of the first are gone."""
    model = small_model()
    kept: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def look(module: torch.nn.Module, inputs: object) -> None:
        alive.append(sum(ref() is not None for ref in kept))

    model.register_forward_pre_hook(look)
    model.register_forward_hook(lambda module, inputs, encoded: kept.append(weakref.ref(encoded.image_tokens)))
    batch = small_batch(8)
    add_gradients(
        model, Objective(small_recipe().losses), batch,
        precision=Precision.named("fp32", CPU), micro_batch_size=2, plan=model.training_plan,
    )  # fmt: skip
    assert len(alive) == 8
    assert max(alive) <= 1


def test_micro_batches_replay_dropout() -> None:
    """With drop path, the second pass must see the random numbers of the first: else features and gradients differ."""
    recipe = RECIPES["clip"]
    model = small_model(recipe).train()
    for block in model.vision.trunk.blocks:
        block.mlp.drop1.p = 0.3
    batch, objective, precision = small_batch(), Objective(recipe.losses), Precision.named("fp32", CPU)
    torch.manual_seed(5)
    add_gradients(model, objective, batch, precision=precision, micro_batch_size=4, plan=model.plan)
    found = gradients(model)
    model.zero_grad()
    torch.manual_seed(5)
    halves = [model(part, model.plan) for part in batch.split(4)]
    first, second = (features_of(half) for half in halves)
    both = {name: torch.cat([first.tensors[name], second.tensors[name]]) for name in (IMAGE, TEXT)}
    objective.total(objective.batch_terms(replace(first, tensors=first.tensors | both))).backward()
    assert relative_error(found, gradients(model)) < 1e-10


def gradients_on_ranks(names: Sequence[str], environment: dict[str, str], out: str) -> None:
    """Body of one forked rank: the gradient of each recipe for a share of the batch; rank 0 writes them to `out`."""
    own_group()
    os.environ.update(environment)
    torch.set_num_threads(1)
    results, precision = {}, Precision.named("fp32", CPU)
    with process_group(CPU):
        share = 8 // world_size()
        for name, parallel, micro in product(names, ("ddp", "fsdp"), (None, share // 2)):
            if parallel == "fsdp" and name not in SHARDED:
                continue
            recipe = RECIPES[name]
            plain = small_model(recipe).train()
            model = wrap(plain, CPU, parallel=parallel, units=plain.blocks())
            batch = batch_for(recipe).split(share)[rank()]
            add_gradients(
                model, Objective(recipe.losses), batch,
                precision=precision, micro_batch_size=micro, plan=plain.training_plan,
            )  # fmt: skip
            results[name, parallel, micro] = full_on_main(gradients(unwrap(model)))
        if rank() == 0:
            torch.save(results, out)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "names"), [(2, list(RECIPES)), (4, ["filip_sparc", "stem", "align"])])
def test_gloo_processes_give_the_one_process_gradient(tmp_path: Path, ranks: int, names: list[str]) -> None:
    """Captions have 1 to 6 words, and the ranks different numbers of usable ones."""
    with Forked(names, tmp_path / "gradients.pt", ranks=ranks, body=gradients_on_ranks) as forked:
        assert forked.join() == [0] * ranks
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    assert len(found) == 2 * len(names) + 2 * len({*names} & {*SHARDED})
    for (name, _parallel, _micro), grads in found.items():
        assert relative_error(grads, one_process(RECIPES[name], None, packed=False)) < 1e-10


def test_learning_rate_rises_linearly_and_falls_to_almost_zero() -> None:
    schedule = Schedule(peak=1.0, warmup_steps=4, total_steps=12)
    rates = [schedule.learning_rate(step) for step in range(1, 13)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(a > b for a, b in pairwise(rates[4:]))
    assert 0 < rates[-1] < 0.05
    assert Schedule(peak=1.0, warmup_steps=0, total_steps=5).learning_rate(1) == 1.0


def test_matrices_decay_and_positions_filters_scales_do_not() -> None:
    decayed = {name for name, p in small_model().named_parameters() if is_decayed(name, p)}
    assert {
        "vision.trunk.blocks.0.attn.qkv.weight",
        "image_projection.weight",
        "text.token_embedding.weight",
    } <= decayed
    spared = ("pos_embed", "cls_token", "positional_embedding", "kernel", "log_scales", "bias", "norm")
    assert [n for n in decayed if any(word in n for word in spared)] == []
    assert not is_decayed("vision.trunk.dist_token", torch.nn.Parameter(torch.zeros(1, 1, 8)))


def test_scales_are_clamped_to_100() -> None:
    model = small_model()
    model.log_scales["spatial_global"].data.fill_(9.0)
    clamp_scales(model)
    assert model.log_scales["spatial_global"].exp().item() == pytest.approx(100)


def test_a_step_without_finite_gradient_changes_nothing_and_many_end_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(step, "warn", said.append)
    recipe = RECIPES["clip"]
    model = small_model(recipe, dtype=torch.float32)
    optimizer = build_optimizer(model, recipe.optim)
    progress = Progress(step=7)
    guard = FiniteGuard(CPU)
    before = {n: p.clone() for n, p in model.named_parameters()}
    for _ in range(MOST_SKIPPED_IN_A_ROW):
        for p in model.parameters():
            p.grad = torch.full_like(p, float("nan"))
        guard.step(optimizer, Precision.named("fp32", CPU), torch.tensor(float("nan")), step=8)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with pytest.raises(RunError, match="step 7: the gradient was not finite in 20 steps in a row"):
        guard.count(progress)
    assert said == ["step 8: the gradient was not finite, so the step was skipped; 20 steps of this run so far"]
    assert progress.skipped_steps == 20
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    guard.step(optimizer, Precision.named("fp32", CPU), torch.tensor(1.0), step=9)
    guard.count(progress)
    assert not torch.equal(model.image_projection.weight, before["image_projection.weight"])


def test_random_state_replays() -> None:
    state = RandomState.read(CPU)
    first = torch.rand(3)
    state.restore(CPU)
    assert torch.equal(torch.rand(3), first)
