"""The size of micro-batches that is found by trying."""

from pathlib import Path

import pytest
import torch
from models_for_tests import small_model, small_recipe, small_training
from test_training import recipe, run

from mlip_cli.distributed import all_sum, gather, without_exchange
from mlip_cli.recipe.checks import check
from mlip_cli.runs.checkpoint import load_state
from mlip_cli.train.micro_batches import (
    chosen_micro_batch_size,
    largest_that_fits,
    least_merging,
    try_once,
)
from mlip_cli.train.state import Progress

__all__ = ["recipe"]


@pytest.mark.parametrize(("room", "found"), [(100, 48), (48, 48), (47, 24), (5, 3), (2, 2), (0, 1)])
def test_the_share_is_halved_until_it_fits(room: int, found: int) -> None:
    tried = []

    def attempt(size: int) -> None:
        tried.append(size)
        if size > room:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert largest_that_fits(48, attempt) == found
    assert tried == [size for size in (48, 24, 12, 6, 3, 2) if size >= max(found, 2)]


def test_a_trial_leaves_the_training_as_it_was() -> None:
    recipe = small_recipe()
    training = small_training(small_model(recipe, dtype=torch.float32))
    before = {name: value.clone() for name, value in training.plain.state_dict().items()}
    try_once(recipe, training, share=8, size=3)
    assert all(p.grad is None for p in training.plain.parameters())
    assert all(torch.equal(value, before[name]) for name, value in training.plain.state_dict().items())
    assert not training.optimizer.state


def test_a_trial_of_one_rank_meets_pairs_of_all_ranks_and_waits_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """So its losses need the memory that they need in training."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    rows = torch.randn(2, 5, requires_grad=True)
    with without_exchange():
        everyone = gather(rows)
        assert all_sum(torch.tensor(4)) == 4
    assert everyone.shape == (6, 5)
    everyone.sum().backward()
    assert rows.grad is not None
    recipe = small_recipe(losses={"positives": "concept", "spatial_token": {"kind": "filip"}})
    try_once(recipe, small_training(small_model(recipe, dtype=torch.float32)), share=4, size=2)


def test_a_trial_keeps_the_tokens_that_a_phase_without_merging_keeps() -> None:
    for active, merges in (((0.0, 1.0), True), ((0.0, 0.95), False)):
        recipe = small_recipe(model={"merging": {"rate": 0.5, "active": active}})
        training = small_training(small_model(recipe, dtype=torch.float32))
        assert bool(least_merging(recipe, training).merges) is merges


def test_what_was_found_stays_and_without_cuda_it_is_the_share() -> None:
    recipe = small_recipe()
    auto = recipe.model_copy(update={"train": recipe.train.model_copy(update={"micro_batch_size": "auto"})})
    training = small_training(small_model(recipe, dtype=torch.float32))
    progress = Progress()
    assert chosen_micro_batch_size(auto, training, progress, share=8) == 8
    assert progress.micro_batch_size is None  # a GPU that goes on has to try
    found_before = Progress(micro_batch_size=3)
    assert chosen_micro_batch_size(auto, training, found_before, share=8) == 3
    assert chosen_micro_batch_size(auto, training, found_before, share=2) == 2
    assert chosen_micro_batch_size(recipe, training, progress, share=8) is None


def test_a_run_says_what_it_took_and_keeps_it(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = run(recipe, "--out", str(folder), "train.micro_batch_size=auto", "train.steps=2")
    assert done.returncode == 0, done.stderr
    assert "train.micro_batch_size auto: 8 of 8 samples a rank at a time" in done.stderr.splitlines()
    assert load_state(folder / "checkpoints" / "step_0000002")["progress"]["micro_batch_size"] is None


def test_sharded_models_cannot_be_tried_by_one_rank_alone() -> None:
    recipe = small_recipe()
    train = recipe.train.model_copy(update={"micro_batch_size": "auto", "parallel": "fsdp"})
    assert check(recipe.model_copy(update={"train": train})) == [
        (
            "train.micro_batch_size",
            "auto does not work with train.parallel fsdp; give a number",
        )
    ]
