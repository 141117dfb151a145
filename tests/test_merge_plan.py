"""Small merge rates, where a token more or less is a large part of the rate. Other plans are in test_merging.py."""

from itertools import pairwise, product
from typing import Any, get_args

import pytest

from mlip_cli.errors import UsageError
from mlip_cli.recipe.config import Merging
from mlip_cli.recipe.merge_plan import METHODS, MergePlan, default_places

RATES = (0.001, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.06, 0.08, 0.1, 0.2, 0.3, 0.45)


def resolve(**changes: Any) -> MergePlan:
    return MergePlan.resolve(**({"depth": 12, "at": None, "method": "guided"} | changes))


@pytest.mark.parametrize(
    ("settings", "at", "tokens"),
    [
        ({"rate": 0.03, "num_patches": 64, "at": (3, 5)}, (3, 5), (64, 64, 63, 63, 62)),
        ({"rate": 0.05, "num_patches": 64, "at": (3, 5)}, (3, 5), (64, 64, 62, 62, 61)),
        # the first merge would remove half of a token and is left out
        ({"rate": 0.01, "num_patches": 64, "at": (3, 5)}, (5,), (64, 64, 64, 64, 63)),
        # of four merges by default, one would remove less than half of a token
        ({"rate": 0.05, "num_patches": 64}, (2, 3, 5), (64, 63, 62, 62, 61)),
    ],
)
def test_small_rates_are_kept(settings: dict[str, Any], at: tuple[int, ...], tokens: tuple[int, ...]) -> None:
    plan = resolve(**settings)
    assert (plan.at, plan.tokens[:5]) == (at, tokens)


@pytest.mark.parametrize("method", ["guided", "random_drop"])
def test_the_true_rate_is_the_rate_asked_to_the_nearest_token(method: str) -> None:
    """Each merge of a plan removes tokens; a rate that removes none is refused."""
    for num_patches, at, rate in product((4, 16, 49, 64, 144, 196, 576), ((2,), (2, 4), (2, 3, 4, 5)), RATES):
        if num_patches * rate <= 0.5:
            with pytest.raises(UsageError, match="removes none of"):
                resolve(rate=rate, num_patches=num_patches, at=at, method=method)
            continue
        plan = resolve(rate=rate, num_patches=num_patches, at=at, method=method)
        counts = [num_patches, *plan.merges.values()]
        assert set(plan.at) <= set(at)
        assert all(after < before for before, after in pairwise(counts))
        assert counts[-1] == plan.tokens[-1] < num_patches
        assert abs(plan.rate - rate) <= 0.5 / num_patches


def test_a_rate_that_removes_nothing_is_refused_with_one_that_does() -> None:
    with pytest.raises(UsageError) as caught:
        resolve(rate=0.005, num_patches=64)
    assert str(caught.value) == "merge rate 0.005: removes none of 64 tokens; use 0, or at least 0.016"
    assert resolve(rate=0.016, num_patches=64).tokens[-1] == 63


def test_an_unknown_method_is_refused_wherever_a_plan_meets_it() -> None:
    assert tuple(METHODS) == get_args(Merging.model_fields["method"].annotation)
    by_hand = MergePlan((16, 8), num_patches=16, method="kmeans", at=(2,))
    for use in (lambda: default_places(12, "kmeans"), lambda: by_hand.drops, lambda: by_hand.asks_spatial):
        with pytest.raises(UsageError, match=r"unknown method kmeans; use guided, tome or random_drop$"):
            use()
