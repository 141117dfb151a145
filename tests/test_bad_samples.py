"""How many bad samples end a run: the share of a whole window, and of fewer samples what chance leaves room for."""

import pytest

from mlip_cli.data.bad_samples import BAD_WINDOW, BadSampleLimit
from mlip_cli.errors import RunError
from mlip_cli.types import BadSample

BAD = BadSample("train-000000.tar", "000000007", "its checksum is wrong")


def seen_until_the_end(limit: BadSampleLimit, *, every: int, most: int) -> int | None:
    """Feed samples of which each `every`-th is bad, in steps of 8; how many were seen when the run ended."""
    for start in range(0, most, 8):
        replaced = [number % every == every - 1 for number in range(start, start + 8)]
        try:
            limit.check(replaced, [BAD] * sum(replaced))
        except RunError:
            return start + 8
    return None


@pytest.mark.parametrize(
    ("share", "every", "ended"),
    [
        (0.01, 2, 24),  # 12 of 24, where 10 may be bad by chance
        (0.01, 10, 112),
        (0.01, 50, 952),  # 19 of 952: twice the share, and chance has room for 18
        (0.01, 90, 9_096),  # 101, more than a whole window may hold
        (0.01, 110, None),
        (0.0, 5_000, 5_000),
        (0.0001, 3_000, 6_000),
        (0.5, 3, None),
        (1.0, 2, None),
    ],
)
def test_bad_samples_end_the_run_early_but_not_by_chance(share: float, every: int, ended: int | None) -> None:
    assert seen_until_the_end(BadSampleLimit(share), every=every, most=BAD_WINDOW - 8) == ended


def test_the_share_of_a_whole_window_is_exact() -> None:
    limit = BadSampleLimit(0.01)
    limit.check([False] * BAD_WINDOW, [])
    for _ in range(100):
        limit.check([True, False], [BAD])
    with pytest.raises(RunError) as error:
        limit.check([True], [BAD])
    assert str(error.value) == (
        "train-000000.tar: sample 000000007: its checksum is wrong; 101 of the last 10,000 samples were bad, "
        "data.max_bad_share 0.01 allows 100 of so many"
    )
