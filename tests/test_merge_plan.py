"""Small merge rates, where a token more or less is a large part of the rate. Other plans are in test_merging.py."""

from itertools import pairwise, product
from typing import Any

import pytest

from mlip_cli.errors import UsageError
from mlip_cli.recipe.merge_plan import MergePlan

RATES = (0.001, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.06, 0.08, 0.1, 0.2, 0.3, 0.45)


def resolve(**changes: Any) -> MergePlan:
    return MergePlan.resolve(**({"depth": 12, "num_prefix": 1, "at": None, "method": "guided"} | changes))


@pytest.mark.parametrize(
    ("settings", "at", "tokens"),
    [
        # 63 + 1 tokens are a multiple of 8, and half or a third of the rate away
        ({"rate": 0.03, "num_patches": 64}, (3, 5), (64, 64, 63, 63, 62)),
        ({"rate": 0.05, "num_patches": 64}, (3, 5), (64, 64, 62, 62, 61)),
        # 191 + 1 are too, and would remove 5 tokens, not 2
        ({"rate": 0.008, "num_patches": 196}, (3, 5), (196, 196, 195, 195, 194)),
        # the first merge of half of a token is none
        ({"rate": 0.01, "num_patches": 64}, (5,), (64, 64, 64, 64, 63)),
        # 137 before block 4 is rounded to 135, and nothing is left to do before block 5
        ({"rate": 0.06, "num_patches": 144, "at": (2, 3, 4, 5)}, (2, 3, 4), (144, 142, 140, 135, 135)),
    ],
)  # fmt: skip
def test_small_rates_are_kept(settings: dict[str, Any], at: tuple[int, ...], tokens: tuple[int, ...]) -> None:
    plan = resolve(**settings)
    assert (plan.at, plan.tokens[:5]) == (at, tokens)


@pytest.mark.parametrize("method", ["guided", "random_drop"])
def test_a_positive_rate_removes_tokens_at_each_place_of_its_plan_or_is_refused(method: str) -> None:
    """And the true rate is less than 0.02 and than half of the rate away, but for the nearest whole token."""
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
        assert abs(plan.rate - rate) <= min(0.02, rate / 2) + 0.5 / num_patches


@pytest.mark.parametrize("num_merges", [1, 2, 3])
def test_rounding_refuses_no_rate_that_exact_counts_reach(num_merges: int) -> None:
    """A first merge rounded up could leave the next one more than half to remove."""
    for num_patches, rate in product((49, 64, 144, 196, 256, 576), (n / 1000 for n in range(400, 880, 2))):
        settings = {"num_patches": num_patches, "rate": rate, "at": range(2, 2 + num_merges)}
        try:
            exact = resolve(**settings, multiple_of=1)
        except UsageError:
            continue
        assert abs(resolve(**settings).rate - exact.rate) < 0.02


def test_a_rate_that_removes_nothing_is_refused_with_one_that_does() -> None:
    with pytest.raises(UsageError) as caught:
        resolve(rate=0.005, num_patches=64)
    assert str(caught.value) == "merge rate 0.005: removes none of 64 tokens; use 0, or 0.016 or more"
    assert resolve(rate=0.016, num_patches=64).tokens[-1] == 63
