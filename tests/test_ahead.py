"""Batches that are copied one step ahead of the step that takes them."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from models_for_tests import small_batch, small_recipe

from mlip_cli.losses.objective import Objective
from mlip_cli.train.ahead import Copier, ReadyBatch, one_ahead
from mlip_cli.train.gradients import begin_counting, captions_counted
from mlip_cli.types import Batch, PartOf

CPU = torch.device("cpu")


class Recorder(Copier):
    """Notes what it copies."""

    def __init__(self, done: list[str], *, works_ahead: bool) -> None:
        super().__init__(Objective(small_recipe().losses), CPU)
        self.done, self.works_ahead = done, works_ahead

    def __call__(self, batch: Batch, part: PartOf = nullcontext) -> ReadyBatch:
        self.done.append(f"copy {batch.keys[0]}")
        return super().__call__(batch, part)


def named_batches(names: str, done: list[str]) -> Iterator[Batch]:
    for name in names:
        done.append(f"load {name}")
        yield Batch(torch.zeros(1, 3, 4, 4), torch.zeros(1, 8, dtype=torch.long), (name,))


@pytest.mark.parametrize(
    ("works_ahead", "order"),
    [
        (True, "load a, copy a, load b, copy b, step a, load c, copy c, step b, step c"),
        (False, "load a, copy a, step a, load b, copy b, step b, load c, copy c, step c"),
    ],
)
def test_the_next_batch_is_on_its_way_before_a_step_only_where_copies_wait(works_ahead: bool, order: str) -> None:
    done: list[str] = []
    ready = one_ahead(named_batches("abc", done), Recorder(done, works_ahead=works_ahead))
    while (own := next(ready, None)) is not None:
        done.append(f"step {own.batch.keys[0]}")
    assert ", ".join(done) == order


def test_counts_begun_earlier_are_those_of_their_own_batch() -> None:
    recipe = small_recipe(losses={"spatial_words": {"weight": 0.5}})
    objective = Objective(recipe.losses)
    batches = [small_batch(seed=seed) for seed in (0, 1)]
    begun = [begin_counting(objective, batch) for batch in batches]
    for batch, counts in zip(batches, begun, strict=True):
        early, late = captions_counted(objective, batch, counts), captions_counted(objective, batch)
        assert early[1] is not None
        assert late[1] is not None
        assert torch.equal(early[0].word_ids, late[0].word_ids)  # type: ignore[arg-type]
        assert torch.equal(early[1].word_weights, late[1].word_weights)
