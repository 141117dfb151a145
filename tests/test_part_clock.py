"""The clock that gives every moment to one part, and functions that are replaced for a while."""

import pytest

from mlip_cli.profiling.step import PartClock, replaced


class Time:
    """A clock that the test moves."""

    now = 0.0

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def time() -> Time:
    return Time()


def test_a_moment_counts_for_the_innermost_part_alone(time: Time) -> None:
    clock = PartClock(now=lambda: time.now)
    time.pass_(100)  # nothing is open
    with clock.part("outer"):
        time.pass_(1)
        for _ in range(2):
            with clock.part("inner"):
                time.pass_(2)
            time.pass_(4)
        clock.switch("rest")
        time.pass_(8)
    time.pass_(100)
    assert clock.take() == {"outer": 9, "inner": 4, "rest": 8}
    assert clock.take() == {}


def test_an_undivided_part_keeps_what_is_inside_it(time: Time) -> None:
    clock = PartClock(now=lambda: time.now, undivided=["first pass"])
    with clock.part("first pass"):
        time.pass_(1)
        with clock.part("block"):
            time.pass_(2)
        clock.switch("merging")
        time.pass_(4)
    with clock.part("block"):
        time.pass_(8)
    assert clock.take() == {"first pass": 7, "block": 8}


def test_a_timed_function_returns_and_raises_as_before(time: Time) -> None:
    clock = PartClock(now=lambda: time.now)

    def half(x: float, *, seconds: float) -> float:
        time.pass_(seconds)
        return 1 / (2 / x)

    assert clock.timed("half", half)(6, seconds=3) == 3
    with pytest.raises(ZeroDivisionError):
        clock.timed("half", half)(0, seconds=2)
    assert clock.take() == {"half": 5}


def test_what_was_replaced_is_back_even_after_an_error() -> None:
    class Owner:
        def method(self) -> str:
            return "own"

    original = vars(Owner)["method"]
    owner = Owner()
    with replaced(owner, "method", lambda: "new"):
        assert owner.method() == "new"
    assert vars(owner) == {}
    with pytest.raises(KeyError), replaced(Owner, "method", lambda self: {}["new"]):
        owner.method()
    assert vars(Owner)["method"] is original
